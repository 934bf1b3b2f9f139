package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
)

// figures are the numbers of one row of the table.
type figures struct{ calls, ok, notFound, deadline int }

var tableRow = regexp.MustCompile(`^ (\S+(?: :\d+(?: slow)?)?) +([\d,]+) +\d+% #* +\S+ +\S+ +([\d,]+) +([\d,]+) +([\d,]+)$`)

// readTable returns the rows of the last table in out, by name without port.
func readTable(t *testing.T, out string) map[string]figures {
	t.Helper()
	_, table, found := strings.Cut(out, "\nSummary: ")
	if !found {
		t.Fatalf("no summary in\n%s", out)
	}
	rows := make(map[string]figures)
	for line := range strings.Lines(table) {
		m := tableRow.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			continue
		}
		var n [4]int
		for i, text := range m[2:] {
			var err error
			if n[i], err = strconv.Atoi(strings.ReplaceAll(text, ",", "")); err != nil {
				t.Fatal(err)
			}
		}
		name, _, _ := strings.Cut(m[1], " ")
		rows[name] = figures{n[0], n[1], n[2], n[3]}
	}
	return rows
}

func sum(rows map[string]figures, names ...string) (s figures) {
	for _, name := range names {
		r := rows[name]
		s = figures{s.calls + r.calls, s.ok + r.ok, s.notFound + r.notFound, s.deadline + r.deadline}
	}
	return s
}

// The whole main job: every backend answers, over one connection, all four kinds, with the statuses asked for and no
// other, and nothing is left behind.
func TestDemoToItsEnd(t *testing.T) {
	p := startDemo(t, "--duration=2s", "--rate=100", "--policy=round_robin")
	code, out := p.wait(t)
	if code != 0 || p.errOut.Len() > 0 {
		t.Fatalf("exit code %d, standard error %q\n%s", code, &p.errOut, out)
	}
	p.checkNoFiles(t)
	if !strings.Contains(out, " calls over 1 connection in ") {
		t.Errorf("not over 1 connection:\n%s", out)
	}
	rows := readTable(t, out)
	all := rows["all"]
	if all.calls < 100 {
		t.Errorf("%d calls, want at least 100\n%s", all.calls, out)
	}
	if got := all.ok + all.notFound + all.deadline; got != all.calls {
		t.Errorf("%d calls ended as they should, of %d\n%s", got, all.calls, out)
	}
	if all.notFound == 0 || all.deadline == 0 {
		t.Errorf("no NOT_FOUND or no DEADLINE_EXCEEDED\n%s", out)
	}
	if got := sum(rows, "b1", "b2", "b3", "unanswered"); got != all {
		t.Errorf("backends sum up to %v, all is %v\n%s", got, all, out)
	}
	if got := sum(rows, "unary", "client-stream", "server-stream", "bidi"); got != all {
		t.Errorf("kinds sum up to %v, all is %v\n%s", got, all, out)
	}
	for _, name := range []string{"b1", "b2", "b3", "unary", "client-stream", "server-stream", "bidi"} {
		if rows[name].ok == 0 {
			t.Errorf("no call of %s ended OK\n%s", name, out)
		}
	}
	// Round robin, call by call over the one connection: equal shares, but for the calls around the start.
	for _, name := range []string{"b1", "b2", "b3"} {
		if got := 3 * rows[name].calls; got < all.calls-9 || got > all.calls+9 {
			t.Errorf("%s has %d of %d calls, want a third\n%s", name, rows[name].calls, all.calls, out)
		}
	}
}

// With the default policy the slow backend gets fewer calls than the fast ones.
func TestDemoSparesTheSlowBackend(t *testing.T) {
	p := startDemo(t, "--duration=2s", "--rate=100", "--slow=300ms")
	code, out := p.wait(t)
	if code != 0 {
		t.Fatalf("exit code %d: %s\n%s", code, &p.errOut, out)
	}
	rows := readTable(t, out)
	if rows["b3"].calls == 0 || rows["b3"].calls >= min(rows["b1"].calls, rows["b2"].calls) {
		t.Errorf("the slow backend was not spared:\n%s", out)
	}
}

func TestDemoBusyPort(t *testing.T) {
	for _, flag := range []string{"tls-port", "h2c-port"} {
		t.Run(flag, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			p := startDemo(t, fmt.Sprintf("--%s=%d", flag, portOf(ln)))
			code, out := p.wait(t)
			if code != 1 || out != "" {
				t.Errorf("exit code %d, want 1, and standard output %q, want none", code, out)
			}
			want := fmt.Sprintf("grpc-demo: port %d is in use by another program: choose another with --%s PORT (0 takes any free one)\n", portOf(ln), flag)
			if got := p.errOut.String(); got != want {
				t.Errorf("standard error\n%q, want\n%q", got, want)
			}
			p.checkNoFiles(t)
		})
	}
}

func TestDemoUnknownPolicy(t *testing.T) {
	p := startDemo(t, "--policy=no_such_policy")
	code, out := p.wait(t)
	if code != 1 || out != "" {
		t.Errorf("exit code %d, want 1, and standard output %q, want none", code, out)
	}
	if got := p.errOut.String(); !strings.HasPrefix(got, "grpc-demo: ") || !strings.Contains(got, "no_such_policy") || strings.Count(got, "\n") != 1 {
		t.Errorf("standard error %q is not one line that names the policy", got)
	}
	p.checkNoFiles(t)
}

// A signal ends the demo at any moment in less than 2 s, though a stream of somebody else is open, which gets a status.
func TestDemoStopsOnSignal(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			p := startDemo(t, "--rate=50")
			_, h2cPort := p.ports(t)
			conn := dial(t, h2cPort, insecure.NewCredentials())
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Header(); err != nil { // the stream has reached a backend
				t.Fatal(err)
			}
			p.until(t, func(line string) bool { return strings.Contains(line, " calls, 1 connection: ") })

			begin := time.Now()
			if err := p.cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			_, recvErr := stream.Recv()
			code, out := p.wait(t)
			if took := time.Since(begin); took >= 2*time.Second {
				t.Errorf("took %s to stop", took)
			} else {
				t.Logf("stopped in %s", took)
			}
			if code != 0 || p.errOut.Len() > 0 {
				t.Errorf("exit code %d, standard error %q", code, &p.errOut)
			}
			if !strings.Contains(out, "\nStopped in ") {
				t.Errorf("no last line:\n%s", out)
			}
			if rows := readTable(t, out); rows["all"].calls == 0 {
				t.Errorf("no calls:\n%s", out)
			}
			if got := status.Code(recvErr); got != codes.Unavailable {
				t.Errorf("the open stream ended with %v, want UNAVAILABLE", recvErr)
			}
			p.checkNoFiles(t)
		})
	}
}

// `grpc-demo | head` ends when head does.
func TestDemoStopsWithItsReader(t *testing.T) {
	p := startDemo(t)
	p.until(t, func(line string) bool { return strings.Contains(line, " calls, 1 connection: ") })
	p.closeOut()
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("%v, standard error %q", err, &p.errOut)
	}
	p.checkNoFiles(t)
}

// What the demo prints to be pasted works against it: curl as printed, and what grpcurl does, by its protocol.
func TestDemoPrintedLines(t *testing.T) {
	p := startDemo(t)
	tlsPort, h2cPort := p.ports(t)
	p.until(t, func(line string) bool { return strings.Contains(line, " calls, 1 connection: ") })
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()

	t.Run("curl", func(t *testing.T) {
		if _, err := exec.LookPath("curl"); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatal("curl is not installed")
			}
			t.Skip("curl is not installed")
		}
		script := regexp.MustCompile(`(?m)^  printf (?s:.*?)/EmptyCall$`).FindString(p.all.String())
		out, err := exec.CommandContext(ctx, "sh", "-c", script).CombinedOutput()
		if err != nil {
			t.Fatalf("%s\n%v: %s", script, err, out)
		}
		for _, want := range []string{"HTTP/2 200", "content-type: application/grpc", "demo-backend: b", "grpc-status: 0"} {
			if !strings.Contains(string(out), want) {
				t.Errorf("no %q in what curl shows:\n%s", want, out)
			}
		}
	})
	t.Run("list", func(t *testing.T) {
		stream, err := reflectionpb.NewServerReflectionClient(dial(t, h2cPort, insecure.NewCredentials())).ServerReflectionInfo(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&reflectionpb.ServerReflectionRequest{
			MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
		}); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, s := range resp.GetListServicesResponse().GetService() {
			names = append(names, s.GetName())
		}
		for _, want := range []string{testService, "grpc.health.v1.Health"} {
			if !strings.Contains(strings.Join(names, " "), want) {
				t.Errorf("services %q, without %s", names, want)
			}
		}
	})
	t.Run("server ID", func(t *testing.T) {
		// As `grpcurl -insecure`: the CA is nobody's business but the demo's.
		conn := dial(t, tlsPort, credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}))
		resp, err := testpb.NewTestServiceClient(conn).UnaryCall(ctx, &testpb.SimpleRequest{FillServerId: true})
		if err != nil {
			t.Fatal(err)
		}
		if got := resp.GetServerId(); got != "b1" && got != "b2" && got != "b3" {
			t.Errorf("server ID %q", got)
		}
	})
}

// ports reads the introduction up to the ports of Caddy.
func (p *process) ports(t *testing.T) (tlsPort, h2cPort int) {
	t.Helper()
	line := p.until(t, func(line string) bool { return strings.HasPrefix(line, "  Caddy ") })
	if _, err := fmt.Sscanf(strings.TrimSpace(line), "Caddy     https://localhost:%d (local CA) and http://localhost:%d", &tlsPort, &h2cPort); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return tlsPort, h2cPort
}

func dial(t *testing.T, port int, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	// By address, since localhost may be IPv6 first; by name to the proxy, which serves no other.
	conn, err := grpc.NewClient(fmt.Sprintf("passthrough:///127.0.0.1:%d", port),
		grpc.WithTransportCredentials(creds), grpc.WithAuthority("localhost"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
