//go:build unix

package e2e

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const anyPort = "127.0.0.1:0"

// process is a backend in a process of its own, which signals can kill and freeze.
type process struct {
	addr string
	cmd  *exec.Cmd
	in   io.Closer
}

// startProcess runs a backend at the address; with port 0, at a free one.
func startProcess(t *testing.T, addr string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(os.Args[0])}
	p.cmd.Env = append(os.Environ(), backendEnv+"="+addr, "GORACE=atexit_sleep_ms=0")
	p.cmd.Stderr = os.Stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in = in
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.end)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the backend has not started: %v", err)
	}
	p.addr = strings.TrimSpace(line)
	return p
}

func (p *process) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// end ends the process and waits for that, whatever state it is in.
func (p *process) end() {
	_ = p.in.Close()
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// bounded is a client whose calls take no longer than d.
func bounded(t *testing.T, addr string, d time.Duration) testgrpc.TestServiceClient {
	t.Helper()
	return client(t, addr, grpc.WithUnaryInterceptor(
		func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			ctx, cancel := context.WithTimeout(ctx, d)
			defer cancel()
			return invoke(ctx, method, req, reply, cc, opts...)
		}))
}

// reached waits until a call is answered by the backend.
func reached(t *testing.T, c testgrpc.TestServiceClient, p *process) {
	t.Helper()
	eventually(t, "calls reach "+p.addr, func() bool { name, _ := asked(t, c); return name == p.addr })
}

// TestKilledProcess: one of two upstreams is killed (SIGKILL) under load. At most the calls that were in flight fail; those
// that begin later all succeed, and when it is back it gets calls again.
func TestKilledProcess(t *testing.T) {
	wiretest.CheckLeaks(t)
	const concurrent = 8
	a, b := startProcess(t, anyPort), startProcess(t, anyPort)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + a.addr + " " + b.addr + " {\n\tlb_policy round_robin\n}"})
	c := client(t, p.H2C)
	l := startCallers(t, concurrent, c)
	l.more(t, 200)
	state := stateOf(t, a.addr)
	a.signal(t, syscall.SIGKILL)
	eventually(t, "it is known to be down", func() bool { return state.Has(upstream.Backoff) })
	known := time.Now()
	a.end()
	l.more(t, 500)
	a = startProcess(t, a.addr)
	reached(t, c, a)
	l.more(t, 100)
	failures := l.stop()
	t.Logf("%d of %d calls failed", len(failures), l.calls.Load())
	if len(failures) > concurrent {
		t.Errorf("%d calls failed, with %d callers", len(failures), concurrent)
	}
	for _, f := range failures {
		if status.Code(f.err) != codes.Unavailable {
			t.Errorf("a call failed with %v, want UNAVAILABLE", f.err)
		}
		if f.start.After(known) {
			t.Errorf("a call that began %v after the upstream's death was known failed: %v", f.start.Sub(known), f.err)
		}
	}
}

// TestFrozenProcess: one of two upstreams is stopped (SIGSTOP) under load: its connections stay, and nothing comes. The check
// takes it out; only calls that it had by then are lost, each at its own deadline. It comes back when it goes on.
func TestFrozenProcess(t *testing.T) {
	wiretest.CheckLeaks(t)
	const (
		concurrent = 8
		deadline   = 3 * time.Second // of a call: longer than it takes until the upstream is out, also on a slow machine
	)
	a, b := startProcess(t, anyPort), startProcess(t, anyPort)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + a.addr + " " + b.addr +
		" {\n\tlb_policy round_robin\n\thealth_check grpc\n\thealth_interval 300ms\n\thealth_timeout 300ms\n\thealth_fails 1\n}"})
	c := bounded(t, p.H2C, deadline)
	reached(t, c, a)
	reached(t, c, b)
	state := stateOf(t, a.addr)
	l := startCallers(t, concurrent, c)
	l.more(t, 200)
	// A call that sends more than the upstream's windows hold: not even the check's request fits in then.
	ctx, cancel := context.WithCancel(t.Context())
	uploaded := make(chan struct{})
	defer func() { cancel(); <-uploaded }()
	uploads := make([]testgrpc.TestService_StreamingInputCallClient, 2) // one of the two goes to a
	for i := range uploads {
		var err error
		if uploads[i], err = client(t, p.H2C).StreamingInputCall(ctx); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "an upload at the one that will be frozen", func() bool { return state.Active() > 0 })
	frozen := time.Now()
	a.signal(t, syscall.SIGSTOP)
	go func() {
		defer close(uploaded)
		var wg sync.WaitGroup
		for _, u := range uploads {
			wg.Go(func() {
				for range 64 {
					if u.Send(&testgrpc.StreamingInputCallRequest{Payload: &testgrpc.Payload{Body: make([]byte, 64<<10)}}) != nil {
						return
					}
				}
			})
		}
		wg.Wait()
	}()
	eventually(t, "the frozen one is out", func() bool { return !state.Usable() })
	out := time.Now()
	t.Logf("out after %v (interval 300ms, timeout 300ms)", out.Sub(frozen).Round(time.Millisecond))
	cancel() // the uploads
	// All callers that the frozen one holds are free after their deadline.
	eventually(t, "the frozen one has no calls any more", func() bool { return state.Active() == 0 })
	l.more(t, 500)
	a.signal(t, syscall.SIGCONT)
	eventually(t, "it is healthy again", state.Usable)
	reached(t, c, a)
	failures := l.stop()
	t.Logf("%d of %d calls failed", len(failures), l.calls.Load())
	if len(failures) > concurrent {
		t.Errorf("%d calls failed, with %d callers", len(failures), concurrent)
	}
	for _, f := range failures {
		if status.Code(f.err) != codes.DeadlineExceeded {
			t.Errorf("a call failed with %v, want DEADLINE_EXCEEDED", f.err)
		}
		if f.start.After(out) {
			t.Errorf("a call that began %v after the upstream was out failed: %v", f.start.Sub(out), f.err)
		}
	}
}
