package selection_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/selection/selectiontest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func weighing(weights ...uint32) *upstream.Snapshot {
	s := selectiontest.Snapshot(len(weights))
	for i, w := range weights {
		s.Endpoints[i].Weight = w
	}
	return s
}

// homes are the addresses that a ring sends the keys to.
func homes(keys int, weights ...uint32) []string {
	s := weighing(weights...)
	return assign(mustLoad(hashPolicies["ring_hash"]).Build(s), s, keyedCalls(keys))
}

// moved counts the keys that moved to or from the endpoints that have changed, and those that moved between others.
func moved(old, now []string, changed func(address string) bool) (must, others int) {
	for k := range old {
		switch {
		case old[k] == now[k]:
		case changed(old[k]) || changed(now[k]):
			must++
		default:
			others++
		}
	}
	return must, others
}

// last tells whether an address is the last one's of n endpoints.
func last(n int) func(address string) bool {
	s := selectiontest.Snapshot(n)
	return func(a string) bool { return a == s.Endpoints[n-1].Address }
}

func repeat(n int, weight uint32) []uint32 { return slices.Repeat([]uint32{weight}, n) }

// An endpoint that comes, goes or warms up moves no keys between others, whatever the weights are.
func TestRingHashMovesNoOthers(t *testing.T) {
	const keys = 10_000
	tests := []struct {
		name     string
		old, now []uint32
	}{
		{"1 to 2", repeat(1, 1), repeat(2, 1)},
		{"2 to 3", repeat(2, 1), repeat(3, 1)},
		{"4 to 5", repeat(4, 1), repeat(5, 1)},
		{"127 to 128", repeat(127, 1), repeat(128, 1)},
		{"128 to 129", repeat(128, 1), repeat(129, 1)},
		{"200 to 201", repeat(200, 1), repeat(201, 1)},
		{"1000 to 1001", repeat(1000, 1), repeat(1001, 1)},
		{"10,000 to 10,001", repeat(10_000, 1), repeat(10_001, 1)},
		{"weight 100, 2 to 3", repeat(2, 100), repeat(3, 100)},
		{"weight 100, 20 to 21", repeat(20, 100), repeat(21, 100)},
		{"the greatest weight, 2 to 3", repeat(2, upstream.MaxWeight), repeat(3, upstream.MaxWeight)},
		{"two kinds, one more light one", []uint32{10, 10, 10, 10, 1, 1, 1, 1}, []uint32{10, 10, 10, 10, 1, 1, 1, 1, 1}},
		{"the light ones become half", []uint32{2, 2, 1, 1}, []uint32{2, 2, 1, 1, 1}},
		{"3 and 1, another 1", []uint32{3, 1}, []uint32{3, 1, 1}},
		{"10 and 1, another 1", []uint32{10, 1}, []uint32{10, 1, 1}},
		{"a heavy one comes", repeat(3, 1), []uint32{1, 1, 1, 9}},
		{"a light one comes", repeat(3, 10), []uint32{10, 10, 10, 1}},
		{"a very heavy one comes", repeat(64, 1), append(repeat(64, 1), 1000)},
		{"one warms up", []uint32{100, 100, 100, 1}, []uint32{100, 100, 100, 50}},
		{"one of two warms up", []uint32{100, 1}, []uint32{100, 100}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			must, others := moved(homes(keys, tt.old...), homes(keys, tt.now...), last(len(tt.now)))
			if must == 0 || others > 0 {
				t.Errorf("%d keys moved to the one that changed, %d others", must, others)
			}
		})
	}
}

// Slow start: while most endpoints warm up, those that do not keep their keys from each other.
func TestRingHashWarmsUp(t *testing.T) {
	const keys = 10_000
	s := weighing(100, 100, 100, 100, 100)
	warming := func(a string) bool { return a != s.Endpoints[0].Address && a != s.Endpoints[1].Address }
	old := homes(keys, 100, 100, 100, 100, 100)
	for w := uint32(1); w <= 100; w += 9 {
		now := homes(keys, 100, 100, w, w, w)
		must, others := moved(old, now, warming)
		if must == 0 || others > 0 {
			t.Errorf("weight %d: %d keys moved between endpoints that warm up and others, %d between others", w, must, others)
		}
		old = now
	}
}

// What TestRingHashMovesNoOthers has for some sets holds for any: weights of all sizes, one that comes and one whose weight
// changes.
func TestRingHashMovesNoOthersOfAny(t *testing.T) {
	const keys, rounds = 2000, 25
	random := rand.New(rand.NewPCG(1, 2))
	weight := func() uint32 { return uint32(math.Exp(random.Float64() * math.Log(upstream.MaxWeight))) }
	for range rounds {
		n := 1 + int(math.Exp(random.Float64()*math.Log(600)))
		weights := repeat(n, 0)
		few := []uint32{weight(), weight(), weight()}
		for i := range weights {
			if weights[i] = weight(); n%2 == 0 { // of a few kinds
				weights[i] = few[random.IntN(len(few))]
			}
		}
		all := homes(keys, weights...)
		less := homes(keys, weights[:n-1]...)
		weights[n-1] = weight()
		other := homes(keys, weights...)
		for what, now := range map[string][]string{"one goes": less, "one changes its weight": other} {
			if _, others := moved(all, now, last(n)); others > 0 {
				t.Errorf("%d endpoints, %s: %d keys moved between others; weights %v", n, what, others, weights[:min(n, 10)])
			}
		}
	}
}

// Keys of an endpoint that cannot be used, or was tried, go where they will be when it has gone: they move once.
func TestRingHashMovesKeysOnce(t *testing.T) {
	const keys = 10_000
	for _, weights := range [][]uint32{repeat(3, 1), repeat(20, 1), repeat(200, 1), repeat(5, 100), {7, 1, 3, 3, 1000}, repeat(1000, 1)} {
		t.Run(fmt.Sprint(len(weights), " of weight ", weights[0]), func(t *testing.T) {
			s := weighing(weights...)
			policy, calls := mustLoad(hashPolicies["ring_hash"]), keyedCalls(keys)
			without := without(s, 1)
			gone := assign(policy.Build(without), without, calls)
			p := policy.Build(s)
			tried := assign(p, s, calls, 1)
			s.Endpoints[1].State.SetUsable(false)
			closed := assign(p, s, calls)
			for k := range calls {
				if gone[k] != closed[k] || gone[k] != tried[k] {
					t.Fatalf("key %d: closed %s, tried %s, gone %s", k, closed[k], tried[k], gone[k])
				}
			}
		})
	}
}

// Where there are too many endpoints for the ring's room, that doubles, which moves half of the keys, once.
func TestRingHashRoomDoubles(t *testing.T) {
	const keys, n = 10_000, 16_384
	below, at, above := homes(keys, repeat(n-1, 1)...), homes(keys, repeat(n, 1)...), homes(keys, repeat(n+1, 1)...)
	if must, others := moved(below, at, last(n)); others < keys*4/10 || others > keys*6/10 {
		t.Errorf("%d to %d: %d keys moved, not half of them", n-1, n, must+others)
	}
	if _, others := moved(at, above, last(n+1)); others > 0 {
		t.Errorf("%d to %d: %d keys moved", n, n+1, others)
	}
}

// With more endpoints than a ring has points by its configuration, still each has its share.
func TestRingHasRoomForAll(t *testing.T) {
	const n = 6000
	for _, low := range []string{"", `,"min_ring_size":1`} {
		p := mustLoad(`{"policy":"ring_hash","keys":[{"source":"header","name":"k"}],"max_ring_size":4096` + low + `}`).Build(selectiontest.Snapshot(n))
		seen := make(map[int]bool)
		for range 400_000 {
			i, _ := pick(p, selection.PickInfo{})
			seen[i] = true
		}
		// gRPC's arcs differ in length exponentially, so some are too short to be hit; of 4,096 points a third of the
		// endpoints would have none.
		if len(seen) < n*97/100 {
			t.Errorf("%s: only %d of %d endpoints were picked", low, len(seen), n)
		}
	}
}

// One that weighs next to nothing has a place on the ring all the same.
func TestRingHashLightest(t *testing.T) {
	weights := append(repeat(20, upstream.MaxWeight), 1)
	s := weighing(weights...)
	p := mustLoad(hashPolicies["ring_hash"]).Build(s)
	for range 10_000_000 {
		if i, _ := pick(p, selection.PickInfo{}); i == 20 {
			return
		}
	}
	t.Error("it is never picked")
}

// The shares of endpoints with equal weights are as even as docs/selection.md says.
func TestRingHashEven(t *testing.T) {
	const keysPerEndpoint = 5000
	for n, percent := range map[int]float64{10: 6, 100: 6} {
		counts := count(homes(n*keysPerEndpoint, repeat(n, 1)...))
		variance := 0.0
		for _, c := range counts {
			variance += math.Pow(float64(c)/keysPerEndpoint-1, 2) / float64(n)
		}
		if deviation := 100 * math.Sqrt(variance); deviation > percent {
			t.Errorf("%d endpoints: the standard deviation of the shares is %.1f %%", n, deviation)
		}
	}
}
