package e2e

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// pingPong sends one message and waits for its answer.
func pingPong(s testgrpc.TestService_FullDuplexCallClient, size int) error {
	if err := s.Send(&testgrpc.StreamingOutputCallRequest{
		ResponseParameters: []*testgrpc.ResponseParameters{{Size: int32(size)}},
		Payload:            &testgrpc.Payload{Body: make([]byte, size)},
	}); err != nil {
		return err
	}
	_, err := s.Recv()
	return err
}

// TestReloadStorm: 100 reloads under 50 live streams and unary load: no call fails, no stream notices, nothing leaks,
// and the upstreams see no new connection.
func TestReloadStorm(t *testing.T) {
	wiretest.CheckLeaks(t)
	reloads := 100
	if testing.Short() {
		reloads = 10
	}
	a, b := backendtest.Start(t, backendtest.Options{Name: "a"}), backendtest.Start(t, backendtest.Options{Name: "b"})
	site := fmt.Sprintf("grpc_proxy %s %s", a.Addr(), b.Addr())
	p := proxytest.Start(t, proxytest.Options{Site: site})
	// A dial that the kernel had queued at a listener which Caddy then closes is reset. Clients dial again; so does this one.
	c := client(t, p.H2C, grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	streams := make([]testgrpc.TestService_FullDuplexCallClient, 50)
	for i := range streams {
		s, err := c.FullDuplexCall(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := pingPong(s, 100); err != nil {
			t.Fatal(err)
		}
		streams[i] = s
	}

	stop := make(chan struct{})
	var calls, failed atomic.Int64
	var perWorker [4]atomic.Int64
	var wg sync.WaitGroup
	for w := range perWorker {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := c.EmptyCall(ctx, &testgrpc.Empty{}); err != nil {
					failed.Add(1)
					t.Errorf("a unary call failed: %v", err)
				}
				calls.Add(1)
				perWorker[w].Add(1)
			}
		})
	}
	for i := range reloads {
		// Each configuration differs from the one before, or Caddy would not load it.
		if err := p.Load(site + fmt.Sprintf(" {\n\theader_up X-Generation %d\n}", i)); err != nil {
			t.Fatalf("reload %d: %v", i, err)
		}
		if err := pingPong(streams[i%len(streams)], 1000); err != nil {
			t.Fatalf("stream %d after reload %d: %v", i%len(streams), i, err)
		}
		// A reload sends GOAWAY to clients. A call that races with it was not processed, and the client sends it again,
		// once (gRFC A6): the same call must not meet two reloads.
		var before [len(perWorker)]int64
		for w := range perWorker {
			before[w] = perWorker[w].Load()
		}
		for w := range perWorker {
			eventually(t, "a worker's next call", func() bool { return perWorker[w].Load() >= before[w]+2 })
		}
	}
	close(stop)
	wg.Wait()
	for i, s := range streams {
		if err := pingPong(s, 1000); err != nil {
			t.Errorf("stream %d after all reloads: %v", i, err)
		}
		if err := s.CloseSend(); err != nil {
			t.Error(err)
		}
		if _, err := s.Recv(); err == nil || err.Error() != "EOF" {
			t.Errorf("stream %d ended with %v, want EOF", i, err)
		}
	}
	t.Logf("%d reloads, %d unary calls, %d failed; connections to the upstreams: %d and %d",
		reloads, calls.Load(), failed.Load(), a.Accepted(), b.Accepted())
	if a.Accepted() != 1 || b.Accepted() != 1 {
		t.Error("reloads dialled anew")
	}
}

// TestFailedReload: a configuration that cannot be loaded harms nothing.
func TestFailedReload(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr()})
	c := client(t, p.H2C, grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	s, err := c.FullDuplexCall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := pingPong(s, 10); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		err := p.Load(fmt.Sprintf("grpc_proxy %s 127.0.0.1:1 {\n\ttls_trust_pool file /does/not/exist.pem\n}", b.Addr()))
		if err == nil || !strings.Contains(err.Error(), "exist.pem") {
			t.Fatalf("error %v, want one that names the missing file", err)
		}
	}
	if err := pingPong(s, 10); err != nil {
		t.Fatalf("the stream suffered: %v", err)
	}
	if _, err := c.EmptyCall(within(t, timeout), &testgrpc.Empty{}); err != nil {
		t.Fatal(err)
	}
	if n := b.Accepted(); n != 1 {
		t.Fatalf("%d connections to the upstream, want 1", n)
	}
}

// TestStreamCloseDelay: after a reload, streams of the old configuration end with UNAVAILABLE when the delay is over.
func TestStreamCloseDelay(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	site := "grpc_proxy " + b.Addr() + " {\n\tstream_close_delay %s\n}"
	p := proxytest.Start(t, proxytest.Options{Site: fmt.Sprintf(site, "300ms")})
	c := client(t, p.H2C, grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	s, err := c.FullDuplexCall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := pingPong(s, 10); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := p.Load(fmt.Sprintf(site, "301ms")); err != nil {
		t.Fatal(err)
	}
	if err := pingPong(s, 10); err != nil {
		t.Fatalf("ended before the delay: %v", err)
	}
	_, err = s.Recv()
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "stream_close_delay") {
		t.Fatalf("ended with %v, want UNAVAILABLE that names stream_close_delay", err)
	}
	if d := time.Since(start); d < 300*time.Millisecond {
		t.Fatalf("ended after %v, before the delay", d)
	}
	select {
	case <-b.Cancelled():
	case <-time.After(timeout):
		t.Fatal("the upstream was not told")
	}
}
