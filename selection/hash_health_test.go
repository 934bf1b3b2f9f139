package selection

import (
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// In a panic, what makes endpoints unusable does not count; and health may be per service.
func TestHashPanicAndServices(t *testing.T) {
	for _, child := range []Policy{new(RingHash), new(Maglev), new(Rendezvous), &RingHash{BalanceFactor: 125}} {
		s := parted(4, func(e *upstream.Endpoint) { e.State.SetUsable(false) })
		p := child.Build(s)
		if i, ok := pick(p, PickInfo{}); ok {
			t.Errorf("%T: picked %d", child, i)
		}
		seen := make(map[int]bool)
		for range 400 {
			i, ok := pick(p, PickInfo{Disregard: upstream.Unhealthy, Tried: []int{2}})
			if !ok || i == 2 {
				t.Fatalf("%T: in a panic, picked %d, %v", child, i, ok)
			}
			seen[i] = true
		}
		if len(seen) != 3 {
			t.Errorf("%T: in a panic, picked %v", child, seen)
		}
		for _, e := range s.Endpoints {
			e.State.SetUsable(true)
			if e.Index != 1 {
				e.State.SetNotServing("pkg.S")
			}
		}
		for range 50 {
			if i, ok := pick(p, PickInfo{Call: &call.Call{Service: "pkg.S"}}); !ok || i != 1 {
				t.Fatalf("%T: picked %d, %v; only 1 serves the service", child, i, ok)
			}
		}
	}
}
