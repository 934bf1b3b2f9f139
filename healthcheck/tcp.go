package healthcheck

import (
	"context"
	"net"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

func init() { caddy.RegisterModule(new(TCP)) }

// TCP takes an upstream as healthy if it accepts a connection, which is closed again at once. It says nothing about what
// listens there.
type TCP struct{}

// CaddyModule returns the Caddy module information.
func (*TCP) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "tcp", New: func() caddy.Module { return new(TCP) }}
}

// UnmarshalCaddyfile reads the check from the Caddyfile:
//
//	health_check tcp
func (*TCP) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return parseAlone(d) }

// Probe implements [Prober].
func (*TCP) Probe(ctx context.Context, t *Target) Verdict {
	c, err := dial(ctx, t)
	if err != nil {
		return noAnswer(ctx, t, err)
	}
	_ = c.Close()
	return Verdict{Answer: Serving}
}

// dial makes a connection as those for calls are made, without TLS.
func dial(ctx context.Context, t *Target) (net.Conn, error) {
	d := net.Dialer{FallbackDelay: t.Transport.FallbackDelay, LocalAddr: t.Transport.LocalAddr, Resolver: t.Transport.Resolver, KeepAlive: -1}
	c, err := d.DialContext(ctx, t.Address.Network, t.Address.Dial)
	if err != nil {
		return nil, connectError{err}
	}
	return c, nil
}

// connectError says what failed without repeating the address.
type connectError struct{ err error }

func (e connectError) Error() string { return "connect failed: " + transport.Cause(e.err) }
func (e connectError) Unwrap() error { return e.err }

var (
	_ Prober                = (*TCP)(nil)
	_ caddyfile.Unmarshaler = (*TCP)(nil)
)
