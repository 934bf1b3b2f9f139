package selection_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/selection/selectiontest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

var benchSizes = []int{3, 100, 10_000}

func pickLoop(b *testing.B, picker selection.Picker) {
	b.Helper()
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := picker.Pick(selection.PickInfo{}); !ok {
			b.Fatal("nothing picked")
		}
	}
}

func BenchmarkPick(b *testing.B) {
	for _, p := range policies {
		for _, n := range benchSizes {
			b.Run(fmt.Sprintf("%s/%d", p.name, n), func(b *testing.B) {
				pickLoop(b, p.new().Build(selectiontest.Snapshot(n)))
			})
		}
	}
}

// BenchmarkPickParallel: all processors at once.
func BenchmarkPickParallel(b *testing.B) {
	for _, p := range policies {
		b.Run(p.name+"/10000", func(b *testing.B) {
			picker := p.new().Build(selectiontest.Snapshot(10_000))
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, ok := picker.Pick(selection.PickInfo{}); !ok {
						b.Error("nothing picked")
						return
					}
				}
			})
		})
	}
}

// BenchmarkPickWeighted: all weights are different, and one is larger than all others together.
func BenchmarkPickWeighted(b *testing.B) {
	for _, p := range policies {
		b.Run(p.name+"/10000", func(b *testing.B) {
			snap := selectiontest.Snapshot(10_000)
			for i := range snap.Endpoints {
				snap.Endpoints[i].Weight = uint32(1 + i%7)
			}
			snap.Endpoints[1234].Weight = upstream.MaxWeight
			pickLoop(b, p.new().Build(snap))
		})
	}
}

// BenchmarkPickHalf: every other endpoint is closed.
func BenchmarkPickHalf(b *testing.B) {
	for _, p := range policies {
		b.Run(p.name+"/10000", func(b *testing.B) {
			snap := selectiontest.Snapshot(10_000)
			for i := 0; i < len(snap.Endpoints); i += 2 {
				snap.Endpoints[i].State.SetUsable(false)
			}
			pickLoop(b, p.new().Build(snap))
		})
	}
}

// BenchmarkPickBusy: every endpoint has calls in flight.
func BenchmarkPickBusy(b *testing.B) {
	for _, p := range policies {
		b.Run(p.name+"/10000", func(b *testing.B) {
			snap := selectiontest.Snapshot(10_000)
			for i := range snap.Endpoints {
				for range 1 + rand.N(8) {
					snap.Endpoints[i].State.Begin()
				}
			}
			pickLoop(b, p.new().Build(snap))
		})
	}
}

// BenchmarkBuild builds a picker of 10,000 endpoints of which a hundredth is new since the last one, and tells how much
// memory an endpoint takes, in the picker and in what is remembered.
func BenchmarkBuild(b *testing.B) {
	const n = 10_000
	for _, p := range policies {
		b.Run(fmt.Sprintf("%s/%d", p.name, n), func(b *testing.B) {
			policy, snap := p.new(), selectiontest.Snapshot(n)
			for i := range snap.Endpoints {
				snap.Endpoints[i].Weight = uint32(1 + i%7)
			}
			before := heap()
			picker := policy.Build(snap)
			perEndpoint := float64(heap()-before) / n
			next := 0
			b.ReportAllocs()
			for b.Loop() {
				for range n / 100 {
					snap.Endpoints[next%n].State = new(upstream.State)
					next++
				}
				picker = policy.Build(snap)
			}
			b.ReportMetric(perEndpoint, "B/endpoint")
			runtime.KeepAlive(picker)
			runtime.KeepAlive(snap)
		})
	}
}

func heap() int64 {
	var m runtime.MemStats
	for range 2 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkReverseProxy is what the policies of the same names take in Caddy's own reverse_proxy.
func BenchmarkReverseProxy(b *testing.B) {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: b.Context()})
	defer cancel()
	for _, n := range benchSizes {
		pool := make(reverseproxy.UpstreamPool, n)
		weights := make([]int, n)
		for i := range pool {
			pool[i] = &reverseproxy.Upstream{Host: new(reverseproxy.Host), Dial: fmt.Sprintf("127.0.0.1:%d", 10_000+i)}
			weights[i] = 1 + i%7
		}
		r := httptest.NewRequest(http.MethodPost, "/pkg.Service/Method", nil)
		r.Header.Set("X-User", "someone")
		r = r.WithContext(ctx)
		weighted := &reverseproxy.WeightedRoundRobinSelection{Weights: weights}
		if err := weighted.Provision(ctx); err != nil {
			b.Fatal(err)
		}
		for _, p := range []struct {
			name     string
			selector reverseproxy.Selector
		}{
			{"round_robin", new(reverseproxy.RoundRobinSelection)},
			{"weighted_round_robin", weighted},
			{"random", reverseproxy.RandomSelection{}},
			{"random_choose", reverseproxy.RandomChoiceSelection{Choose: 2}},
			{"least_conn", reverseproxy.LeastConnSelection{}},
			{"first", reverseproxy.FirstSelection{}},
			{"header", reverseproxy.HeaderHashSelection{Field: "X-User"}},
			{"uri_hash", reverseproxy.URIHashSelection{}},
		} {
			b.Run(fmt.Sprintf("%s/%d", p.name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if p.selector.Select(pool, r, nil) == nil {
						b.Fatal("nothing selected")
					}
				}
			})
		}
	}
}
