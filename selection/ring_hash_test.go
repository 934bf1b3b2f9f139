package selection_test

import (
	"math"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/selection/selectiontest"
)

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

// The shares of endpoints with equal weights are as even as docs/selection.md says.
func TestRingHashEven(t *testing.T) {
	const keysPerEndpoint = 5000
	for n, percent := range map[int]float64{10: 11, 100: 32} {
		s := selectiontest.Snapshot(n)
		counts := count(assign(mustLoad(hashPolicies["ring_hash"]).Build(s), s, keyedCalls(n*keysPerEndpoint)))
		variance := 0.0
		for _, c := range counts {
			variance += math.Pow(float64(c)/keysPerEndpoint-1, 2) / float64(n)
		}
		if deviation := 100 * math.Sqrt(variance); deviation > percent {
			t.Errorf("%d endpoints: the standard deviation of the shares is %.1f %%", n, deviation)
		}
	}
}
