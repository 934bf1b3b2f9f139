package e2e

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
)

// startCaddy runs a Caddy of its own with a plaintext site.
func startCaddy(t *testing.T, global, site string) (cmd *exec.Cmd, addr string, log *bytes.Buffer) {
	t.Helper()
	addr = proxytest.FreeAddress(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "Caddyfile")
	if !strings.Contains(global, "admin ") {
		global += "\tadmin off\n"
	}
	if !strings.Contains(global, "servers ") {
		global += "\tservers {\n\t\tprotocols h1 h2c\n\t}\n"
	}
	text := "{\n\tpersist_config off\n" + global + "}\nhttp://" + addr + " {\n" + site + "\n}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command(os.Args[0], "run", "--config", file, "--adapter", "caddyfile")
	// A race detector that waits a second at exit would count as ours.
	cmd.Env = append(os.Environ(), caddyEnv+"=1", "GORACE=atexit_sleep_ms=0", "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	log = new(bytes.Buffer)
	cmd.Stderr, cmd.Stdout = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		if t.Failed() {
			t.Log(log)
		}
	})
	return cmd, addr, log
}

// TestExit: when Caddy exits, running streams may go on for a while; then they end with a status, not with a reset, and
// the process leaves in good order.
func TestExit(t *testing.T) {
	for _, tc := range []struct {
		name, global, block string
		min, max            time.Duration
	}{
		{"exit_timeout", "", "\texit_timeout 700ms\n", 700 * time.Millisecond, 2 * time.Second},
		{"grace_period", "\tgrace_period 1s\n", "", 500 * time.Millisecond, time.Second},
		{"defaults", "", "", 4 * time.Second, 5 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.name == "defaults" && testing.Short() {
				t.Skip("takes 4 s")
			}
			b := backendtest.Start(t, backendtest.Options{})
			cmd, addr, _ := startCaddy(t, tc.global, "grpc_proxy "+b.Addr()+" {\n"+tc.block+"}")
			c := client(t, addr)
			var s testgrpc.TestService_FullDuplexCallClient
			eventually(t, "Caddy serves", func() bool {
				var err error
				if s, err = c.FullDuplexCall(t.Context()); err != nil {
					return false
				}
				return pingPong(s, 10) == nil
			})
			start := time.Now()
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := pingPong(s, 10); err != nil {
				t.Fatalf("cut at once: %v", err)
			}
			_, err := s.Recv()
			took := time.Since(start)
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "the proxy is shutting down") {
				t.Fatalf("the stream ended with %v", err)
			}
			if err := cmd.Wait(); err != nil {
				t.Fatalf("Caddy left with %v", err)
			}
			gone := time.Since(start)
			t.Logf("the stream ended after %v, the process after %v", took, gone)
			if took < tc.min || took > tc.max {
				t.Errorf("the stream ended after %v, want between %v and %v", took, tc.min, tc.max)
			}
			if gone > 5*time.Second {
				t.Errorf("the process took %v; systemd's TimeoutStopSec is 5s", gone)
			}
		})
	}
}

// TestExitAfterReload: streams of a configuration that a reload has replaced get a status at exit too, when their time is
// over, and the process waits for it.
func TestExitAfterReload(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	admin := proxytest.FreeAddress(t)
	site := "grpc_proxy " + b.Addr() + " {\n\texit_timeout 700ms\n"
	cmd, addr, _ := startCaddy(t, "\tadmin "+admin+"\n", site+"}")
	c := client(t, addr)
	var s testgrpc.TestService_FullDuplexCallClient
	eventually(t, "Caddy serves", func() bool {
		var err error
		if s, err = c.FullDuplexCall(within(t, 8*time.Second)); err != nil {
			return false
		}
		return pingPong(s, 10) == nil
	})
	text := "{\n\tadmin " + admin + "\n\tpersist_config off\n}\nhttp://" + addr + " {\n" + site + "\theader_up X-Generation 2\n}\n}\n"
	r, err := http.Post("http://"+admin+"/load", "text/caddyfile", strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		msg, _ := io.ReadAll(r.Body)
		t.Fatalf("reload: %s %s", r.Status, msg)
	}
	if err := pingPong(s, 10); err != nil {
		t.Fatalf("the reload cut the stream: %v", err)
	}
	start := time.Now()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := pingPong(s, 10); err != nil {
		t.Fatalf("cut at once: %v", err)
	}
	_, err = s.Recv()
	took := time.Since(start)
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "the proxy is shutting down") {
		t.Fatalf("the stream ended with %v", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("Caddy left with %v", err)
	}
	t.Logf("the stream ended after %v, the process after %v", took, time.Since(start))
	if took < 600*time.Millisecond || took > 3*time.Second {
		t.Errorf("the stream ended after %v, want about 700ms", took)
	}
}
