package e2e

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/discovery"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(told)) }

// told is a source of endpoints that a test speaks for, made as anybody would make one.
type told struct {
	Name string `json:"name,omitempty"`
}

func (*told) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.grpc_proxy.discovery.told", New: func() caddy.Module { return new(told) }}
}

func (s *told) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.Args(&s.Name) {
		return d.ArgErr()
	}
	return nil
}

func (s *told) Watch(ctx context.Context, sink discovery.Sink) {
	l := listOf(s.Name)
	for {
		l.mu.Lock()
		list, changed := l.endpoints, l.changed
		l.mu.Unlock()
		if list != nil {
			sink.Update(list)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// list is what the source of a name is told.
type list struct {
	mu        sync.Mutex
	endpoints []upstream.Endpoint
	changed   chan struct{}
}

var (
	lists     sync.Map
	listCount atomic.Int64
)

// newList makes a list of a name that no other test, and no other run of this one, has.
func newList(t *testing.T) (*list, string) {
	name := fmt.Sprintf("%s-%d", t.Name(), listCount.Add(1))
	return listOf(name), name
}

func listOf(name string) *list {
	l, _ := lists.LoadOrStore(name, &list{changed: make(chan struct{})})
	return l.(*list)
}

func (l *list) set(endpoints []upstream.Endpoint) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.endpoints = endpoints
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *list) backends(backends ...*backendtest.Backend) {
	out := make([]upstream.Endpoint, len(backends))
	for i, b := range backends {
		out[i] = upstream.Endpoint{Network: "tcp", Address: b.Addr(), Weight: 1, Origin: "told"}
	}
	l.set(out)
}

func start(t *testing.T, n int) []*backendtest.Backend {
	t.Helper()
	out := make([]*backendtest.Backend, n)
	for i := range out {
		out[i] = backendtest.Start(t, backendtest.Options{Name: fmt.Sprintf("b%d", i)})
	}
	return out
}

// even makes calls, besides those that others may make, and makes sure that the shares are within 5 % of the ideal.
func even(t *testing.T, c testgrpc.TestServiceClient, backends []*backendtest.Backend) {
	t.Helper()
	shares := spread(t, c, 300*len(backends), 8, backends...)
	var sum int64
	for _, n := range shares {
		sum += n
	}
	ideal := float64(sum) / float64(len(backends))
	for i, n := range shares {
		if d := float64(n) - ideal; d > 0.05*ideal+1 || d < -0.05*ideal-1 {
			t.Errorf("%s got %d calls, want %.0f ± 5 %%", backends[i].Name(), n, ideal)
		}
	}
}

// TestScale: 3 → 30 → 3 endpoints under load. No call fails, and the shares are even soon.
func TestScale(t *testing.T) {
	wiretest.CheckLeaks(t)
	few, more := start(t, 3), start(t, 27)
	all := append(append([]*backendtest.Backend{}, few...), more...)
	l, name := newList(t)
	l.backends(few...)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic told " + name + "\n\tlb_policy round_robin\n}"})
	c := client(t, p.H2C)
	load := startCallers(t, 8, client(t, p.H2C))
	load.more(t, 500)

	l.backends(all...)
	begin := time.Now()
	for _, b := range more {
		served(t, b, 1)
	}
	t.Logf("all have calls after %v", time.Since(begin).Round(time.Millisecond))
	even(t, c, all)
	l.backends(few...)
	// They leave the list, and only then do they go: as in any orderly deployment.
	for _, b := range more {
		eventually(t, b.Name()+" has no calls", func() bool {
			n := b.Calls().Total()
			load.more(t, 60)
			return b.Calls().Total() == n && b.Active() == 0
		})
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		b.GracefulStop(ctx)
		cancel()
	}
	load.more(t, 500)
	for _, f := range load.stop() {
		t.Errorf("a call failed: %v", f.err)
	}
	t.Logf("%d calls", load.calls.Load())
	even(t, c, few)
}

// TestScaleShares: endpoints that come get their share at once.
func TestScaleShares(t *testing.T) {
	wiretest.CheckLeaks(t)
	all := start(t, 12)
	l, name := newList(t)
	l.backends(all[:3]...)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic told " + name + "\n\tlb_policy round_robin\n}"})
	c := client(t, p.H2C)
	even(t, c, all[:3])
	for _, n := range []int{12, 2} {
		l.backends(all[:n]...)
		eventually(t, "the new list is in force", func() bool {
			for _, b := range all[:n] {
				before := b.Calls().Total()
				for range 2 * len(all) {
					if _, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty)); err != nil {
						t.Fatal(err)
					}
				}
				if b.Calls().Total() == before {
					return false
				}
			}
			got := spread(t, c, 24, 1, all[n:]...)
			for _, k := range got {
				if k > 0 {
					return false
				}
			}
			return true
		})
		even(t, c, all[:n])
	}
}

// TestFirstList: the calls that come before anything is known wait for it, and fail only when dial_timeout is over.
func TestFirstList(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, name := newList(t)
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic told " + name + "\n\tdial_timeout 500ms\n}"})
	c := client(t, p.H2C)
	_, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty))
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("without any list: %v", err)
	}
	t.Log(err)
	done := make(chan error, 1)
	go func() {
		_, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty))
		done <- err
	}()
	l.backends(b)
	if err := <-done; err != nil {
		t.Fatalf("a call that waited for the list: %v", err)
	}
}

// TestRemovalDrains: a stream on an endpoint that leaves the list goes on, until drain_timeout.
func TestRemovalDrains(t *testing.T) {
	wiretest.CheckLeaks(t)
	two := start(t, 2)
	l, name := newList(t)
	l.backends(two[0])
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic told " + name + "\n\tdrain_timeout 2s\n}"})
	c := client(t, p.H2C)
	s, err := c.FullDuplexCall(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	ping := func() error {
		if err := s.Send(&testgrpc.StreamingOutputCallRequest{ResponseParameters: []*testgrpc.ResponseParameters{{Size: 1}}}); err != nil {
			return err
		}
		_, err := s.Recv()
		return err
	}
	if err := ping(); err != nil {
		t.Fatal(err)
	}
	l.backends(two[1])
	eventually(t, "new calls go to the other one", func() bool {
		before := two[1].Calls().Total()
		if _, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty)); err != nil {
			t.Fatal(err)
		}
		return two[1].Calls().Total() > before
	})
	if err := ping(); err != nil {
		t.Fatalf("a stream on the endpoint that left: %v", err)
	}
	_, err = s.Recv() // until drain_timeout
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("after drain_timeout: %v", err)
	}
	t.Log(err)
}

// TestGone: endpoints that have vanished from the list and from the network at once cost no call that has not begun.
func TestGone(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, dead := listen(t)
	_ = l.Close()
	b := backendtest.Start(t, backendtest.Options{})
	ls, name := newList(t)
	ls.set([]upstream.Endpoint{{Network: "tcp", Address: dead}, {Network: "tcp", Address: b.Addr()}})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic told " + name + "\n}"})
	spread(t, client(t, p.H2C), 50, 4, b)
	if _, _, err := net.SplitHostPort(b.Addr()); err != nil {
		t.Fatal(err)
	}
	ls.backends(b)
	spread(t, client(t, p.H2C), 50, 4, b)
}
