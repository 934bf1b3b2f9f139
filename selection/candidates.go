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
// processor's caches. Pickers work with places in it; only what they return has an endpoint's index.
type candidates struct {
	states []*upstream.State
	// indexes are the endpoints' by place; nil where each is its place.
	indexes []int32
	// shares are the endpoints' by weight; nil where all weigh the same, and in policies that do not weigh.
	shares *shares
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

// newWeighted is newCandidates for policies that honour weights.
func newWeighted(s *upstream.Snapshot) candidates {
	c := newCandidates(s)
	weigh := func(i int) uint32 { return s.Endpoints[i].EffectiveWeight() }
	for i := range s.Endpoints {
		if weigh(i) != weigh(0) {
			c.shares = newShares(len(s.Endpoints), weigh)
			break
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

// open tells whether the endpoint at the place may be picked now: the shortest way first, for what is true of nearly all picks.
func (c *candidates) open(place int, in *PickInfo) bool {
	return in.plain() && c.states[place].UsableForAll() || c.openFor(place, in)
}

func (c *candidates) openFor(place int, in *PickInfo) bool {
	return in.usable(c.states[place]) && (len(in.Tried) == 0 || !slices.Contains(in.Tried, c.index(place)))
}

// result is what a picker returns that does not mind which endpoint it is.
func (c *candidates) result(place int, ok bool) (Pick, bool) {
	if !ok {
		return Pick{}, false
	}
	return Pick{Index: c.index(place), AnyWillDo: true}, true
}

// maxDraws is how often draw tries its luck. If half of the endpoints are open, one draw in 65,536 goes on to scan.
const maxDraws = 16

// draw returns one of the open endpoints, with chances as their weights say: it throws draws away that hit a closed one
// (going on to the next open one instead would give that one its neighbour's share), and when too many were thrown away,
// it looks at all.
func (c *candidates) draw(in *PickInfo) (place int, ok bool) {
	if c.len() == 0 {
		return 0, false
	}
	for range maxDraws {
		if i := c.any(); c.open(i, in) {
			return i, true
		}
	}
	return c.scan(in)
}

// drawTwo returns two open endpoints as draw does, not the same one twice unless no other is open: with few endpoints, two
// draws would often be no choice.
func (c *candidates) drawTwo(in *PickInfo) (first, second int, ok bool) {
	if first, ok = c.draw(in); !ok {
		return 0, 0, false
	}
	d := drawn{first}
	if second, ok = c.drawOther(&d, 1, in); !ok {
		second = first
	}
	return first, second, true
}

// drawn are places that were drawn, in ascending order.
type drawn [maxChoices]int

// add adds a place to the first n.
func (d *drawn) add(n, place int) {
	for ; n > 0 && d[n-1] > place; n-- {
		d[n] = d[n-1]
	}
	d[n] = place
}

// drawOther is draw without the first n places of d.
func (c *candidates) drawOther(d *drawn, n int, in *PickInfo) (place int, ok bool) {
	if c.len() <= n {
		return 0, false
	}
	for range maxDraws {
		if i := c.anyOther(d[:n]); c.open(i, in) {
			return i, true
		}
	}
	var l lots
	for i := range c.states {
		if !slices.Contains(d[:n], i) && c.open(i, in) && l.wins(c.shares.weight(i)) {
			place, ok = i, true
		}
	}
	return place, ok
}

// anyOther is any without some places, in ascending order. What is drawn is a number of the line without their pieces, so it
// is never one of them, and nothing has to be thrown away however heavy they are.
func (c *candidates) anyOther(without []int) int {
	if c.shares == nil {
		i := randN(c.len() - len(without))
		for _, w := range without {
			if i >= w {
				i++
			}
		}
		return i
	}
	s := c.shares
	rest := s.total
	for _, w := range without {
		rest -= s.weight(w)
	}
	x := uint32(randN(int(rest)))
	for _, w := range without {
		if x >= s.ends[w]-s.weight(w) {
			x += s.weight(w)
		}
	}
	return s.owner(x)
}

// any returns any endpoint, open or not.
func (c *candidates) any() int {
	if c.shares == nil {
		return randN(c.len())
	}
	return c.shares.draw()
}

// scan returns one of the open endpoints, with chances as their weights say, in one pass.
func (c *candidates) scan(in *PickInfo) (place int, ok bool) {
	var l lots
	for i := range c.states {
		if c.open(i, in) && l.wins(c.shares.weight(i)) {
			place, ok = i, true
		}
	}
	return place, ok
}

// lots is a drawing of lots among endpoints that come one by one, of which nobody knows yet how many there will be: each
// takes the place of the winner so far with the chance of its weight among all so far (reservoir sampling). The chance that
// nobody does so before the weights add up to x is total/x, so one random number tells when it happens next, and a pass
// over n endpoints takes about log n of them (Li, "Reservoir-sampling algorithms of time complexity O(n(1+log(N/n)))",
// 1994). The zero value is a new drawing.
type lots struct{ total, next float64 }

// wins tells whether the endpoint wins over those before it. The first one does.
func (l *lots) wins(weight uint32) bool {
	l.total += float64(weight)
	if l.total <= l.next {
		return false
	}
	l.next = l.total / randFloat()
	return true
}

// randFloat returns a number in [0, 1).
func randFloat() float64 { return float64(randUint64()>>11) * 0x1p-53 }
