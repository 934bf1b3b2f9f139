package selection

import "github.com/caddygrpc/caddy-grpc-proxy/upstream"

// Carrier is a Policy that knows how much the endpoints can carry.
type Carrier interface {
	Policy
	// CarriesAll tells whether those of the endpoints that are usable now are known to carry all calls, few as they may be.
	CarriesAll(endpoints []upstream.Endpoint) bool
}

// CarriesAll implements [Carrier].
func (n *nested) CarriesAll(endpoints []upstream.Endpoint) bool {
	c, ok := n.child.(Carrier)
	return ok && c.CarriesAll(endpoints)
}

// CarriesAll implements [Carrier] for endpoints of several levels. Envoy, "Panic threshold": "if
// normalized total availability across all priority levels is 100%, Envoy disregards panic thresholds". With one level there
// is nothing but the threshold to judge by.
func (p *Priority) CarriesAll(endpoints []upstream.Endpoint) bool {
	type level struct{ usable, all int }
	levels := make(map[uint32]*level)
	var at *level
	for i := range endpoints {
		e := &endpoints[i]
		if i == 0 || e.Priority != endpoints[i-1].Priority {
			if at = levels[e.Priority]; at == nil {
				at = new(level)
				levels[e.Priority] = at
			}
		}
		at.all++
		at.usable += usable(endpoints[i : i+1])
	}
	if len(levels) < 2 {
		return false
	}
	total := 0
	for _, l := range levels {
		total += p.health(l.usable, l.all)
	}
	return total >= 100
}

var _ Carrier = (*Priority)(nil)
