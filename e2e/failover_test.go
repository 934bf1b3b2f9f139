package e2e

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestRefusingUpstream: nobody listens at one of three addresses; no call fails.
func TestRefusingUpstream(t *testing.T) {
	for _, policy := range []string{"round_robin", "least_request", "random", "first"} {
		t.Run(policy, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			a, b := backendtest.Start(t, backendtest.Options{}), backendtest.Start(t, backendtest.Options{})
			p := proxytest.Start(t, proxytest.Options{
				Site: "grpc_proxy " + proxytest.FreeAddress(t) + " " + a.Addr() + " " + b.Addr() + " {\n\tlb_policy " + policy + "\n}",
			})
			c := client(t, p.H2C)
			if policy == "round_robin" { // as long as only one is connected to, that gets all
				eventually(t, "both get calls", func() bool {
					spread(t, c, 1, 1)
					return a.Calls().Total() > 0 && b.Calls().Total() > 0
				})
			}
			got := spread(t, c, 500, 8, a, b)
			if got[0]+got[1] != 500 {
				t.Errorf("%d calls arrived, want 500", got[0]+got[1])
			}
			if policy == "round_robin" && max(got[0]-got[1], got[1]-got[0]) > 10 {
				t.Error("the shares differ")
			}
		})
	}
}

// restart runs a new backend where another one was.
func restart(t *testing.T, old *backendtest.Backend) *backendtest.Backend {
	t.Helper()
	return backendtest.Start(t, backendtest.Options{Name: old.Name(), Addr: old.Addr(), Delay: time.Millisecond})
}

// TestKilledUpstream: one of two upstreams dies under load. Calls that it had may fail, no others; when it is back it
// gets traffic again.
func TestKilledUpstream(t *testing.T) {
	wiretest.CheckLeaks(t)
	const concurrent = 8
	a := backendtest.Start(t, backendtest.Options{Name: "a", Delay: 5 * time.Millisecond})
	b := backendtest.Start(t, backendtest.Options{Name: "b", Delay: 5 * time.Millisecond})
	p := balanced(t, "round_robin", a, b)
	l := startCallers(t, concurrent, client(t, p.H2C))
	served(t, a, 50)
	had := a.Active()
	a.Stop()
	stopped := time.Now()
	l.more(t, 200)
	lost := len(a.Cancelled())
	a = restart(t, a)
	served(t, a, 50)
	failures := l.stop()
	t.Logf("%d of %d calls failed; the upstream had %d just before, and saw %d of its calls cut", len(failures), l.calls.Load(), had, lost)
	if len(failures) > concurrent {
		t.Errorf("%d calls failed, with %d callers", len(failures), concurrent)
	}
	for _, f := range failures {
		if status.Code(f.err) != codes.Unavailable {
			t.Errorf("a call failed with %v, want UNAVAILABLE", f.err)
		}
		if f.start.After(stopped) {
			t.Errorf("a call that began %v after the upstream's death failed: %v", f.start.Sub(stopped), f.err)
		}
	}
}

// TestGracefulRestart: upstreams that restart with GOAWAY, one after the other, cost no call.
func TestGracefulRestart(t *testing.T) {
	for _, tc := range []struct {
		name string
		n    int
	}{{"one_of_two", 2}, {"rolling_three", 3}, {"only_one", 1}} {
		t.Run(tc.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			var backends []*backendtest.Backend
			for i := range tc.n {
				backends = append(backends, backendtest.Start(t, backendtest.Options{Name: string(rune('a' + i)), Delay: time.Millisecond}))
			}
			policy := "round_robin"
			if tc.n == 1 {
				policy += "\n\tlb_try_duration 5s\n\tlb_try_interval 10ms" // nobody is there meanwhile
			}
			p := balanced(t, policy, backends...)
			l := startCallers(t, 8, client(t, p.H2C))
			for i, b := range backends {
				if tc.name == "one_of_two" && i > 0 {
					break
				}
				served(t, b, 50)
				b.GracefulStop(within(t, timeout))
				if tc.n > 1 {
					l.more(t, 200)
				}
				backends[i] = restart(t, b)
				served(t, backends[i], 50)
			}
			failures := l.stop()
			t.Logf("%d of %d calls failed", len(failures), l.calls.Load())
			for _, f := range failures {
				t.Errorf("a call failed: %v", f.err)
			}
		})
	}
}
