package selection

import (
	"fmt"
	"sync/atomic"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// bound keeps the load of each endpoint close to the average: "Consistent Hashing with Bounded Loads" (Mirrokni, Thorup
// and Zadimoghaddam, 2016), Envoy's hash_balance_factor. With the call that is to be placed there are m calls; an
// endpoint with the share w of all weights has room for ceil(factor × m × w).
//
// The sums over all endpoints are kept up by looking at a few of them for each call, in turn: in small sets they are
// exact, in large ones each part of them is as old as n/observed calls.
type bound struct {
	factor  int64 // in percent
	weights []int64
	// seen is what the sums have of each endpoint: its calls, or -1 for one that is not usable.
	seen   []atomic.Int64
	next   atomic.Uint64
	active atomic.Int64
	weight atomic.Int64
}

// observed is how many endpoints are looked at for one call.
const observed = 8

// minBalanceFactor: below 100 percent of the average, not even an even load would fit.
const minBalanceFactor = 100

func checkBalanceFactor(percent int) error {
	if percent != 0 && percent < minBalanceFactor {
		return fmt.Errorf("balance_factor: %d is below 100 percent, with which an even load would not fit; usual are 120 to 200", percent)
	}
	return nil
}

// newBound returns nil for a factor of 0.
func newBound(percent int, s *upstream.Snapshot) *bound {
	if percent == 0 {
		return nil
	}
	b := &bound{factor: int64(percent), weights: make([]int64, len(s.Endpoints)), seen: make([]atomic.Int64, len(s.Endpoints))}
	for i := range s.Endpoints {
		b.weights[i] = int64(s.Endpoints[i].EffectiveWeight())
		b.seen[i].Store(-1)
		b.look(i, s.Endpoints[i].State)
	}
	return b
}

// look brings the sums up to date with one endpoint.
func (b *bound) look(place int, s *upstream.State) {
	now := int64(-1)
	if s.UsableExcept(upstream.NoRoom) {
		now = max(s.Active(), 0)
	}
	if b.seen[place].Load() == now {
		return
	}
	before := b.seen[place].Swap(now)
	if d := max(now, 0) - max(before, 0); d != 0 {
		b.active.Add(d)
	}
	switch {
	case before < 0 && now >= 0:
		b.weight.Add(b.weights[place])
	case before >= 0 && now < 0:
		b.weight.Add(-b.weights[place])
	}
}

// sums are the active calls and the weights of all endpoints at one moment.
type sums struct{ active, weight int64 }

func (b *bound) sums(c *candidates) sums {
	n := c.len()
	first := 0
	if n > observed {
		first = int(b.next.Add(observed) % uint64(n))
	}
	for i := range min(n, observed) {
		place := first + i
		if place >= n {
			place -= n
		}
		b.look(place, c.states[place])
	}
	return sums{b.active.Load(), b.weight.Load()}
}

// room tells whether an endpoint with so many calls can have one more: active < ceil(x) is active < x for whole numbers.
func (b *bound) room(all sums, place int, active int64) bool {
	return active <= 0 || active*100*all.weight < (all.active+1)*b.factor*b.weights[place]
}

// less tells whether the endpoint at p has less to do for its weight than the one at q.
func (b *bound) less(states []*upstream.State, p, q int) bool {
	return states[p].Active()*b.weights[q] < states[q].Active()*b.weights[p]
}
