package selection

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(Random)) }

// Random picks any endpoint, each with the same chance, or with a chance as large as its weight says where the upstreams
// have weights.
type Random struct{}

// CaddyModule returns the Caddy module information.
func (*Random) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "random", New: func() caddy.Module { return new(Random) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy random
func (*Random) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return parseAlone(d) }

// Build implements [Policy].
func (*Random) Build(s *upstream.Snapshot) Picker { return &random{newWeighted(s)} }

type random struct{ candidates }

// Pick implements [Picker].
func (p *random) Pick(in PickInfo) (Pick, bool) { return p.result(p.draw(&in)) }

var (
	_ Policy                = (*Random)(nil)
	_ caddyfile.Unmarshaler = (*Random)(nil)
)
