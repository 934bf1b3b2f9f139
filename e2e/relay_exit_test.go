package e2e

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// leaves waits until the process has left in good order, and returns how long that took since start.
func leaves(t *testing.T, cmd *exec.Cmd, start time.Time) time.Duration {
	t.Helper()
	left := make(chan error, 1)
	go func() { left <- cmd.Wait() }()
	select {
	case err := <-left:
		if err != nil {
			t.Fatalf("Caddy left with %v", err)
		}
	case <-time.After(4 * timeout):
		_ = cmd.Process.Kill()
		t.Fatalf("Caddy has not left: %v", <-left)
	}
	return time.Since(start)
}

// TestRelayExit: when Caddy exits, streams may go on for a while; then they end with a status, and the process leaves in good order, whoever
// has connected, and even if somebody does not read.
func TestRelayExit(t *testing.T) {
	for _, way := range relayWays {
		for _, tc := range []struct {
			name, global, block string
			least               time.Duration
		}{
			{"exit_timeout", "", "\texit_timeout 2500ms\n", 2500 * time.Millisecond},
			{"grace_period", "\tgrace_period 3s\n", "", 2500 * time.Millisecond},
		} {
			t.Run(way.name+"/"+tc.name, func(t *testing.T) {
				b := backendtest.Start(t, backendtest.Options{})
				global := way.global + tc.global + "\tservers {\n\t\tprotocols h1 h2c\n\t\t" + withRelay + "\n\t}\n"
				cmd, addr, _ := startCaddy(t, global, "grpc_proxy "+b.Addr()+" {\n"+tc.block+"}")
				c := client(t, addr)
				eventually(t, "Caddy serves", func() bool {
					_, err := c.EmptyCall(t.Context(), &testgrpc.Empty{})
					return err == nil
				})
				idle := wiretest.Dial(t, addr, nil, wiretest.Options{NoPingAck: true})
				idle.Barrier()
				s := openStream(t, c)
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
					t.Errorf("the stream ended with %v", err)
				}
				gone := leaves(t, cmd, start)
				t.Logf("the stream ended after %v, the process after %v", took, gone)
				if took < tc.least {
					t.Errorf("the stream ended after %v, want no less than %v", took, tc.least)
				}
				idle.ExpectGoAway()
			})
		}
	}
}

// TestRelayExitIdle: connections without streams do not keep Caddy from exiting.
func TestRelayExitIdle(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	cmd, addr, _ := startCaddy(t, "\tservers {\n\t\t"+withRelay+"\n\t}\n", "grpc_proxy "+b.Addr())
	c := client(t, addr)
	eventually(t, "Caddy serves", func() bool {
		_, err := c.EmptyCall(t.Context(), &testgrpc.Empty{})
		return err == nil
	})
	for range 20 {
		wiretest.Dial(t, addr, nil, wiretest.Options{NoPingAck: true}).Barrier()
		wiretest.DialRaw(t, addr) // says nothing
	}
	start := time.Now()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	t.Logf("the process left after %v", leaves(t, cmd, start))
}

// TestRelayExitStalled: a client whose window has no room for an answer cannot keep Caddy from exiting.
func TestRelayExitStalled(t *testing.T) {
	for _, way := range relayWays {
		t.Run(way.name, func(t *testing.T) {
			b := backendtest.Start(t, backendtest.Options{})
			global := way.global + "\tservers {\n\t\t" + withRelay + "\n\t}\n"
			cmd, addr, _ := startCaddy(t, global, "grpc_proxy "+b.Addr()+" {\n\texit_timeout 700ms\n}")
			probe := client(t, addr)
			eventually(t, "Caddy serves", func() bool {
				_, err := probe.EmptyCall(t.Context(), &testgrpc.Empty{})
				return err == nil
			})
			c := wiretest.Dial(t, addr, nil, wiretest.Options{
				HoldWindows: true, Settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}},
			})
			id := c.Open(wiretest.Request(addr, "/grpc.testing.TestService/UnaryCall"), false)
			c.WriteData(id, []byte{0, 0, 0, 0, 3, 0x10, 0xe8, 0x07}, true) // 1,000 bytes are asked for
			c.ExpectOn(id, http2.FrameHeaders)
			start := time.Now()
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			t.Logf("the process left after %v", leaves(t, cmd, start))
		})
	}
}
