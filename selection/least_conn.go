package selection

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(LeastConn)) }

// LeastConn picks the endpoint with the fewest calls in flight of all, any of them if there are several. (The name is
// `reverse_proxy`'s, which counts requests by it too.) It looks at every endpoint for every call, and proxies that see
// the same idle endpoint all send their next call there; `least_request` does neither.
type LeastConn struct{}

// CaddyModule returns the Caddy module information.
func (*LeastConn) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "least_conn", New: func() caddy.Module { return new(LeastConn) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy least_conn
func (*LeastConn) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return parseAlone(d) }

// Build implements [Policy].
func (*LeastConn) Build(s *upstream.Snapshot) Picker { return &leastConn{newCandidates(s)} }

type leastConn struct{ candidates }

// Pick implements [Picker]. Among endpoints with as few calls, lots are drawn.
func (p *leastConn) Pick(in PickInfo) (int, bool) {
	seed := randUint64()
	var (
		best    int
		ok      bool
		fewest  int64
		highest uint64
	)
	for i, s := range p.states {
		n := s.Active()
		if ok && n > fewest || !p.open(i, in.Tried) {
			continue
		}
		if r := rank(seed, i); !ok || n < fewest || r > highest {
			best, fewest, highest, ok = i, n, r, true
		}
	}
	return p.result(best, ok)
}

var (
	_ Policy                = (*LeastConn)(nil)
	_ caddyfile.Unmarshaler = (*LeastConn)(nil)
)
