package transport

import (
	"context"
	"sync/atomic"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Guests are streams that are not calls': health checks, and streams of health and load reports, which do not end. They use the
// connections of calls, since what they find out is to hold for these, but take nothing from calls: neither a stream that
// calls could have nor one of the connections that they may have.

// guestLimit is how many streams a connection must allow for guests to be welcome: RFC 9113 section 6.5.2 recommends that servers
// allow no fewer. Where they do, each stream is somebody's.
const guestLimit = 100

// besideConns bounds the connections that guests make for themselves. Servers may allow one stream on each.
const besideConns = 64

// guests tells those that are there when calls need the room.
type guests struct{ crowded atomic.Pointer[chan struct{}] }

// come returns what is closed when calls need the room.
func (g *guests) come() <-chan struct{} {
	for {
		if ch := g.crowded.Load(); ch != nil {
			return *ch
		}
		g.crowded.CompareAndSwap(nil, new(make(chan struct{})))
	}
}

// leave sends those that are there away.
func (g *guests) leave() {
	if g.crowded.Load() == nil { // as nearly always
		return
	}
	if ch := g.crowded.Swap(nil); ch != nil {
		close(*ch)
	}
}

// spares tells whether a connection has room for so many guests more, with a quarter left for calls. Guests leave when calls
// leave only an eighth (nearlyFull), so that they do not come and go with each call.
func spares(c *h2.Conn, more int) bool {
	free := c.Available()
	limit := free + c.Streams()
	return limit >= guestLimit && free-more > limit/4
}

// OpenGuest opens a stream that is no call's: on a connection that can spare it, or on one beside those of calls. Without any
// connection it waits for one, as OpenWait does. When crowded is closed calls need the room, and the stream should be reset and
// opened anew; it is nil if there is none to be given back. beside is Beside, asked for once and kept. The rest is as in OpenWait.
func (e *Endpoint) OpenGuest(ctx context.Context, beside func() *Endpoint, fields []h2.Field, recv h2.Receiver) (s *h2.Stream, crowded <-chan struct{}, err *Error) {
	crowded = e.guests.come() // before there is a stream, or it may miss it
	if e.Conns() == 0 {
		s, err = e.OpenWait(ctx, fields, false, recv)
		switch {
		case err != nil && err.Kind != KindQueueFull:
			return nil, nil, err
		case err == nil && spares(s.Conn(), 0):
			return s, crowded, nil
		case err == nil:
			s.Reset(h2.Cancel)
			s.Conn().Flush()
		}
	} else {
		for _, conn := range *e.conns.Load() {
			if !spares(conn.Conn, 1) {
				continue
			}
			s, herr := conn.OpenStream(fields, false, recv)
			if herr == nil {
				return s, crowded, nil
			}
			if herr.Kind == h2.KindHeaderListSize {
				return nil, nil, FromStream(herr, e.Address())
			}
		}
	}
	own := beside()
	if own.Conns() == 0 {
		own.Retry() // guests have a pace of their own
	}
	s, err = own.OpenWait(ctx, fields, false, recv)
	return s, nil, err
}

// Beside makes an endpoint of the same address for guests, outside the pool, which no State shows. The caller calls
// Destruct when done.
func (e *Endpoint) Beside() *Endpoint { return NewBeside(e.addr, e.cfg) }

// NewBeside is Beside for another address, a port for health checks, say.
func NewBeside(addr upstream.Address, cfg Config) *Endpoint {
	cfg.MinConns, cfg.MaxConns = 0, besideConns
	return NewEndpoint(addr, cfg)
}
