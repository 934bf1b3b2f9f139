package selection

import (
	"math/bits"
	"math/rand/v2"
	"slices"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// namespace is where the modules of this package are registered.
const namespace = "http.grpc_proxy.selection_policies."

// randUint64 is the source of all chance here: math/rand/v2's own, which takes no lock. Tests replace it.
var randUint64 = rand.Uint64

// randN returns a number in [0, n). Of 2^64 values some numbers get one more than others, which nobody can measure.
func randN(n int) int {
	hi, _ := bits.Mul64(randUint64(), uint64(n))
	return int(hi)
}

// candidates are the endpoints of a snapshot, or of a part of one, as pickers see them: side by side for the sake of the
// processor's caches. Pickers work with places in it; only what they return is an endpoint's index.
type candidates struct {
	states []*upstream.State
	// indexes are the endpoints' by place; nil where each is its place.
	indexes []int32
}

func newCandidates(s *upstream.Snapshot) candidates {
	c := candidates{states: make([]*upstream.State, len(s.Endpoints))}
	same := true
	for i := range s.Endpoints {
		c.states[i] = s.Endpoints[i].State
		same = same && s.Endpoints[i].Index == i
	}
	if !same {
		c.indexes = make([]int32, len(s.Endpoints))
		for i := range s.Endpoints {
			c.indexes[i] = int32(s.Endpoints[i].Index)
		}
	}
	return c
}

func (c *candidates) len() int { return len(c.states) }

// index is the index of the endpoint at the place.
func (c *candidates) index(place int) int {
	if c.indexes == nil {
		return place
	}
	return int(c.indexes[place])
}

// open tells whether the endpoint at the place may be picked now.
func (c *candidates) open(place int, tried []int) bool {
	return c.states[place].Usable() && (len(tried) == 0 || !slices.Contains(tried, c.index(place)))
}

// result is what a picker returns for the place that it chose.
func (c *candidates) result(place int, ok bool) (index int, _ bool) {
	if !ok {
		return 0, false
	}
	return c.index(place), true
}

// maxDraws is how often draw tries its luck. If half of the endpoints are open, one draw in 65,536 goes on to scan.
const maxDraws = 16

// draw returns one of the open endpoints, each with the same chance: it throws draws away that hit a closed one (going on
// to the next open one instead would give that one its neighbour's share), and when too many were thrown away, it looks
// at all.
func (c *candidates) draw(tried []int) (int, bool) {
	if c.len() == 0 {
		return 0, false
	}
	for range maxDraws {
		if i := randN(c.len()); c.open(i, tried) {
			return i, true
		}
	}
	return c.scan(tried)
}

// scan returns one of the open endpoints, each with the same chance, in one pass.
func (c *candidates) scan(tried []int) (index int, ok bool) {
	seed := randUint64()
	var highest uint64
	for i := range c.states {
		if !c.open(i, tried) {
			continue
		}
		if r := rank(seed, i); !ok || r > highest {
			index, highest, ok = i, r, true
		}
	}
	return index, ok
}

// rank is endpoint i's lot in the drawing of lots among any number of endpoints that seed begins: a number of its own,
// so that one random number does for a whole pass. It is the i-th output of the SplitMix64 generator (Steele, Lea and
// Flood, "Fast splittable pseudorandom number generators", 2014).
func rank(seed uint64, i int) uint64 {
	z := seed + uint64(i)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
