package selection

import (
	"fmt"
	"math"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// level is a part of a snapshot's endpoints and its share of the calls.
type level struct {
	endpoints []upstream.Endpoint
	share     float64 // of 1
}

// buildLevels makes a picker that gives each level its share of the calls. The shares add up to 1. Where the levels are not those
// of the endpoints' priorities, it is not all the same which endpoint of a priority a call goes to.
func (n *nested) buildLevels(s *upstream.Snapshot, list []level, priorities bool) Picker {
	switch len(list) {
	case 0:
		return n.child.Build(part(s, nil))
	case 1:
		return n.child.Build(part(s, list[0].endpoints))
	}
	p := &levels{nested: n, priorities: priorities}
	sum := 0.0
	for _, l := range list {
		sum += l.share
		p.upTo = append(p.upTo, uint64(math.Round(min(sum, 1)*whole)))
		p.pickers = append(p.pickers, n.child.Build(part(s, l.endpoints)))
	}
	p.upTo[len(list)-1] = whole
	return p
}

// whole is all calls, in which shares are counted.
const whole = 1_000_000

// levels chooses a level first and lets its picker choose an endpoint.
type levels struct {
	pickers
	nested     *nested  // knows the key
	upTo       []uint64 // the sums of the shares
	priorities bool
}

// Pick implements [Picker].
func (p *levels) Pick(in PickInfo) (Pick, bool) {
	pick, ok := p.pick(&in)
	pick.AnyWillDo = pick.AnyWillDo && p.priorities
	return pick, ok
}

// pick asks one level, and if that has nothing open, the others in order.
func (p *levels) pick(in *PickInfo) (Pick, bool) {
	first := p.choose(in.Call)
	if pick, ok := p.pickers[first].Pick(*in); ok {
		return pick, true
	}
	for i, q := range p.pickers {
		if i == first {
			continue
		}
		if pick, ok := q.Pick(*in); ok {
			return pick, true
		}
	}
	return Pick{}, false
}

// choose draws a level by its share. Calls with the same key come to the same one.
func (p *levels) choose(c *call.Call) int {
	if p.upTo[0] == whole {
		return 0
	}
	var at uint64
	if h, ok := p.nested.KeyHash(c); ok {
		// Mixed, so that the keys of a level are not those of one stretch of a ring.
		at = mix(h) % whole
	} else {
		at = uint64(randN(whole))
	}
	i := 0
	for at >= p.upTo[i] {
		i++
	}
	return i
}

const defaultOverprovisioning = 1.4

func checkOverprovisioning(factor float64) error {
	if factor != 0 && !(factor >= 1 && factor <= 100) {
		return fmt.Errorf("overprovisioning_factor: %v is not between 1 and 100; 1.4 means that 72 percent of the endpoints can carry the load of all", factor)
	}
	return nil
}

// notSticky refuses a policy that binds clients to endpoints, at any depth, below one that chooses among parts of them
// first: that choice would break the bond.
func (n *nested) notSticky(outer string) error {
	if binds(n.child) {
		return fmt.Errorf("policy: a sticky policy cannot be within %s, which would choose among endpoints before it; write %s as the fallback of the sticky policy", outer, outer)
	}
	return nil
}

// binds tells whether the policy, or one within it, binds clients to endpoints.
func binds(p Policy) bool {
	b, ok := p.(Binding)
	return ok && b.BindsClients()
}

// usable counts the endpoints that calls can go to, apart from what comes and goes with single calls.
func usable(endpoints []upstream.Endpoint) (n int) {
	for i := range endpoints {
		if endpoints[i].State.UsableExcept(upstream.Momentary) {
			n++
		}
	}
	return n
}
