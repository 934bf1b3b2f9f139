package selection

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(WeightedRoundRobin)) }

// WeightedRoundRobin picks the endpoints in turn, each as often as its weight in a list says: the first number is that of
// the first upstream in the configuration, and so on. Its turns are spread among those of the others (`reverse_proxy`
// gives them one after the other).
//
// It is for upstreams that are written down in the configuration. Where they come from a source, so may their weights,
// which `round_robin` honours; here, a source's weights are not looked at.
type WeightedRoundRobin struct {
	// The weights, from 0 to 65535, at least one of them above 0. An upstream with weight 0 gets no calls, even if no
	// other one is left. Upstreams beyond the end of the list have weight 1; weights beyond the last upstream are not
	// used. Required.
	Weights []int `json:"weights,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*WeightedRoundRobin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "weighted_round_robin", New: func() caddy.Module { return new(WeightedRoundRobin) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy weighted_round_robin <weights...>
func (p *WeightedRoundRobin) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // The policy's name.
	name := d.Val()
	for d.NextArg() {
		w, err := strconv.Atoi(d.Val())
		if err != nil {
			return d.Errf("%s: weight %q is not a whole number", name, d.Val())
		}
		p.Weights = append(p.Weights, w)
	}
	if err := p.Validate(); err != nil {
		return d.Errf("%s: %v", name, err)
	}
	return parseEnd(d, name)
}

// Validate implements caddy.Validator.
func (p *WeightedRoundRobin) Validate() error {
	if len(p.Weights) == 0 {
		return errors.New("weights: none is given; write one for each upstream, in their order")
	}
	most := 0
	for i, w := range p.Weights {
		if w < 0 || w > upstream.MaxWeight {
			return fmt.Errorf("weights: number %d is %d, which is not from 0 to %d", i+1, w, upstream.MaxWeight)
		}
		most = max(most, w)
	}
	if most == 0 {
		return errors.New("weights: all are 0, so that no upstream would get calls; one must be larger")
	}
	return nil
}

// Build implements [Policy].
func (p *WeightedRoundRobin) Build(s *upstream.Snapshot) Picker {
	part := &upstream.Snapshot{Generation: s.Generation, Endpoints: make([]upstream.Endpoint, 0, len(s.Endpoints))}
	for i := range s.Endpoints {
		e := s.Endpoints[i]
		e.Weight = 1
		if e.Index < len(p.Weights) {
			e.Weight = uint32(p.Weights[e.Index])
		}
		if e.Weight > 0 {
			part.Endpoints = append(part.Endpoints, e)
		}
	}
	return newRoundRobin(newWeighted(part))
}

var (
	_ Policy                = (*WeightedRoundRobin)(nil)
	_ caddy.Validator       = (*WeightedRoundRobin)(nil)
	_ caddyfile.Unmarshaler = (*WeightedRoundRobin)(nil)
)
