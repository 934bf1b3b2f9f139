//go:build unix

package healthcheck

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// benchServers makes the test's binary a process of so many servers, which print their addresses, and ends with its input.
const benchServers = "HEALTHCHECK_BENCH_SERVERS"

func TestMain(m *testing.M) {
	if n, err := strconv.Atoi(os.Getenv(benchServers)); err == nil {
		for range n {
			b, err := backendtest.New(backendtest.Options{})
			if err != nil {
				fmt.Println("error:", err)
				os.Exit(1)
			}
			fmt.Println(b.Addr())
		}
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// servers starts n grpc-go servers in a process of their own, so that their work is not taken for the checks'.
func servers(b testing.TB, n int) (*exec.Cmd, []string) {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), benchServers+"="+strconv.Itoa(n))
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Signal(syscall.SIGCONT)
		_ = cmd.Wait()
	})
	lines := bufio.NewScanner(out)
	var addrs []string
	for len(addrs) < n && lines.Scan() {
		if !strings.HasPrefix(lines.Text(), "127.") {
			b.Fatal(lines.Text())
		}
		addrs = append(addrs, lines.Text())
	}
	if len(addrs) < n {
		b.Fatal("the servers have not started")
	}
	return cmd, addrs
}

// A process that is frozen keeps its connections and answers nothing. It is found out by the checks that come on top of
// the watch, and comes back when it thaws.
func TestFrozenProcess(t *testing.T) {
	wiretest.CheckLeaks(t)
	cmd, addrs := servers(t, 1)
	s := attend(t, active(t, &Active{Interval: 100 * ms, Timeout: 200 * ms}, new(GRPC)), addrs[0]).State
	eventually(t, "healthy", s.Usable)
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "unhealthy", func() bool { return s.Has(upstream.Unhealthy) })
	if text := s.Status().Text; text != "no answer to the health check within 200ms" {
		t.Errorf("text %q", text)
	}
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "healthy again", s.Usable)
}

func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var ru syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// BenchmarkThousandEndpoints measures what it costs to check 1,000 endpoints every second, in percent of one core. Run it
// with -benchtime 1x: an iteration takes five seconds.
func BenchmarkThousandEndpoints(b *testing.B) {
	const n = 1000
	_, addrs := servers(b, n)
	for _, mode := range []string{ModeAuto, ModeCheck, ModeWatch} {
		b.Run(mode, func(b *testing.B) {
			a := active(b, &Active{Interval: caddy.Duration(time.Second)}, &GRPC{Mode: mode})
			states := make([]*upstream.State, n)
			for i, addr := range addrs {
				states[i] = attend(b, a, addr).State
			}
			for i, s := range states {
				eventually(b, addrs[i]+" is healthy", s.Usable)
			}
			<-time.After(2 * time.Second) // past the first wave
			var used, passed time.Duration
			for b.Loop() {
				begin, cpu := time.Now(), cpuTime(b)
				<-time.After(5 * time.Second)
				used += cpuTime(b) - cpu
				passed += time.Since(begin)
			}
			for i, s := range states {
				if !s.Usable() {
					b.Errorf("%s: %+v", addrs[i], s.Status())
				}
			}
			b.ReportMetric(100*float64(used)/float64(passed), "%core")
			b.ReportMetric(float64(used.Microseconds())/(passed.Seconds()*n), "µs/endpoint")
		})
	}
}
