package selection

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(LeastConn)) }

// LeastConn picks the endpoint with the fewest calls in flight of all, per weight where the upstreams have weights, and
// any of them if there are several. It is `reverse_proxy`'s name (which counts requests by it too) for `least_request`
// with `full_scan`. It looks at every endpoint for every call, and proxies that see the same idle endpoint all send their
// next call there; `least_request` does neither.
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
func (*LeastConn) Build(s *upstream.Snapshot) Picker { return newFullScan(newBusyness(s, nil)) }

var (
	_ Policy                = (*LeastConn)(nil)
	_ caddyfile.Unmarshaler = (*LeastConn)(nil)
)
