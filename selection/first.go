package selection

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(First)) }

// First picks the first endpoint, in the order of the configuration, that is usable: the others are there for when it is
// not.
type First struct{}

// CaddyModule returns the Caddy module information.
func (*First) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "first", New: func() caddy.Module { return new(First) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy first
func (*First) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return parseAlone(d) }

// Build implements [Policy].
func (*First) Build(s *upstream.Snapshot) Picker { return &first{newCandidates(s)} }

type first struct{ candidates }

// Pick implements [Picker].
func (p *first) Pick(in PickInfo) (Pick, bool) {
	for i := range p.states {
		if p.open(i, &in) {
			return Pick{Index: p.index(i)}, true
		}
	}
	return Pick{}, false
}

var (
	_ Policy                = (*First)(nil)
	_ caddyfile.Unmarshaler = (*First)(nil)
)
