package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// balanced runs a proxy in front of the backends.
func balanced(t *testing.T, policy string, backends ...*backendtest.Backend) *proxytest.Proxy {
	t.Helper()
	var addrs []string
	for _, b := range backends {
		addrs = append(addrs, b.Addr())
	}
	return proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + strings.Join(addrs, " ") + " {\n\tlb_policy " + policy + "\n}"})
}

// TestRoundRobin: the calls of one client connection land on three upstreams in equal shares.
func TestRoundRobin(t *testing.T) {
	wiretest.CheckLeaks(t)
	a, b, c := backendtest.Start(t, backendtest.Options{}), backendtest.Start(t, backendtest.Options{}), backendtest.Start(t, backendtest.Options{})
	p := balanced(t, "round_robin", a, b, c)
	for _, concurrent := range []int{1, 16} {
		for i, n := range spread(t, client(t, p.H2C), 3000, concurrent, a, b, c) {
			if n < 980 || n > 1020 {
				t.Errorf("%d callers: upstream %d got %d of 3000 calls, want 1000 ± 2 %%", concurrent, i, n)
			}
		}
	}
}

// TestLeastRequestSlow: a slow upstream gets fewer calls.
func TestLeastRequestSlow(t *testing.T) {
	wiretest.CheckLeaks(t)
	const quick, slow = time.Millisecond, 20 * time.Millisecond
	a := backendtest.Start(t, backendtest.Options{Delay: slow})
	b, c := backendtest.Start(t, backendtest.Options{Delay: quick}), backendtest.Start(t, backendtest.Options{Delay: quick})
	p := balanced(t, "least_request", a, b, c)
	got := spread(t, client(t, p.H2C), 3000, 16, a, b, c)
	if got[0] > 600 {
		t.Errorf("the slow upstream got %d of 3000 calls; blind shares would be 1000", got[0])
	}
	if got[1] < got[0] || got[2] < got[0] {
		t.Error("a quick upstream got less than the slow one")
	}
}

// TestLeastRequestLongStream: a stream counts as in flight from its beginning to its end.
func TestLeastRequestLongStream(t *testing.T) {
	wiretest.CheckLeaks(t)
	a, b := backendtest.Start(t, backendtest.Options{Name: "a"}), backendtest.Start(t, backendtest.Options{Name: "b"})
	p := balanced(t, "least_request", a, b)
	c := client(t, p.H2C)
	s, err := c.FullDuplexCall(within(t, 20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if err := pingPong(s, 10); err != nil {
		t.Fatal(err)
	}
	busy, idle := a, b
	if b.Active() > 0 {
		busy, idle = b, a
	}
	got := spread(t, c, 400, 1, busy, idle)
	if got[0] != 0 {
		t.Errorf("with a stream open the busy upstream got %d of 400 calls, though the other was idle", got[0])
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); ended(err) != nil {
		t.Fatal(err)
	}
	got = spread(t, c, 400, 1, busy, idle)
	if got[0] < 140 || got[0] > 260 {
		t.Errorf("after the stream's end it got %d of 400 calls, want about 200", got[0])
	}
}
