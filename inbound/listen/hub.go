package listen

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/direct"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/hop"
)

// hub is an address: the listeners on it, of which a reload has two for a moment, and the connections that package h2 reads. These belong
// to no listener: a stream goes to the oldest one that is open. So the configuration that runs serves until it is closed, and one that
// fails to start never serves anything. Listeners on other terms than those a connection was accepted on do not count.
type hub struct {
	key     string
	pending pending

	mu        sync.Mutex // LOCKS: guards what follows → h2's Conn.mu
	listeners []*Listener
	conns     map[*conn]struct{}
}

// hubs are all of them.
var hubs = struct {
	mu    sync.Mutex // LOCKS: guards all → hub.mu
	byKey map[string]*hub
}{byKey: make(map[string]*hub)}

// join adds a listener to the hub of its address.
func join(l *Listener) *hub {
	addr := l.inner.Addr()
	key := addr.Network() + "/" + addr.String()
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	h := hubs.byKey[key]
	if h == nil {
		h = &hub{key: key, pending: pending{most: maxPending}, conns: make(map[*conn]struct{})}
		hubs.byKey[key] = h
	}
	h.mu.Lock()
	h.listeners = append(h.listeners, l)
	h.mu.Unlock()
	return h
}

// leave takes a listener out. Connections for which none is left are shut down; after the last one, those that come are closed.
func (h *hub) leave(l *Listener) {
	hubs.mu.Lock()
	h.mu.Lock()
	h.listeners = slices.DeleteFunc(h.listeners, func(x *Listener) bool { return x == l })
	last := len(h.listeners) == 0
	if last && hubs.byKey[h.key] == h {
		delete(hubs.byKey, h.key)
	}
	var left []*conn
	for c := range h.conns {
		if h.servingLocked(c.terms) == nil {
			left = append(left, c)
		}
	}
	h.mu.Unlock()
	hubs.mu.Unlock()
	for _, c := range left {
		c.c.Shutdown()
	}
	if last {
		h.pending.end()
	}
}

// serving is the listener whose configuration serves connections of these terms, nil if there is none.
func (h *hub) serving(terms string) *Listener {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.servingLocked(terms)
}

func (h *hub) servingLocked(terms string) *Listener {
	for _, l := range h.listeners {
		if l.cfg.Terms == terms {
			return l
		}
	}
	return nil
}

// all are the connections of now.
func (h *hub) all() []*conn {
	h.mu.Lock()
	defer h.mu.Unlock()
	conns := make([]*conn, 0, len(h.conns))
	for c := range h.conns {
		conns = append(conns, c)
	}
	return conns
}

// shutdown ends the connections in order, as their streams end.
func (h *hub) shutdown() {
	for _, c := range h.all() {
		c.c.Shutdown()
	}
}

// conn is a client's connection.
type conn struct {
	hub   *hub
	terms string // that it was accepted on
	nc    net.Conn
	c     *h2.Conn
	hop   hop.Hop

	ended bool        // guarded by hub.mu
	aging *time.Timer // likewise; nil if it does not

	// The reading goroutine's.

	at      *Listener // whose configuration these are of
	route   func(fields []h2.Field) *direct.Handler
	handler *direct.Handler // that had the last call
	client  *direct.Client  // what it knows of the client
}

// maxAnswer bounds an answer's head and trailers, for which the server has no limit.
const maxAnswer = 64 << 20

// serve has package h2 read a connection. prefix is what was read of it.
func (l *Listener) serve(nc net.Conn, prefix []byte, limits Limits) {
	cfg := limits.Connection
	cfg.PeerPrefix = prefix
	x := &conn{hub: l.hub, terms: l.cfg.Terms, nc: nc}
	x.hop.Dial = x.dial
	x.hop.Config = h2.Config{InitialWindow: 256 << 10, MaxHeaderListSize: maxAnswer}
	cfg.OnClose = x.over
	h := l.hub
	h.mu.Lock() // its first stream finds it there
	x.c = h2.Server(nc, cfg, x.accept)
	h.conns[x] = struct{}{}
	if limits.Age > 0 {
		x.aging = time.AfterFunc(jittered(limits.Age), func() { x.retire(limits.AgeGrace) })
	}
	gone := h.servingLocked(x.terms) == nil
	h.mu.Unlock()
	if gone {
		x.c.Shutdown()
	}
}

// jittered is about d, so that connections that were made together are not all made anew together. gRFC A9: "a random jitter of +/-10%".
func jittered(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()-0.5)/5*float64(d)) //nolint:gosec // spreading load
}

// retire ends the connection in order, and what is left of it after the grace, if there is one.
func (x *conn) retire(grace time.Duration) {
	x.c.Shutdown()
	x.hub.mu.Lock()
	defer x.hub.mu.Unlock()
	if grace > 0 && !x.ended {
		x.aging = time.AfterFunc(grace, func() { x.c.Close(h2.NoError, "max_connection_age_grace is over") })
	}
}

// over runs when the connection is over.
func (x *conn) over(*h2.Conn, *h2.Error) {
	x.hop.Close()
	x.hub.mu.Lock()
	if x.ended = true; x.aging != nil {
		x.aging.Stop()
	}
	delete(x.hub.conns, x)
	x.hub.mu.Unlock()
}

// accept takes a stream: a handler has its call, or the server.
func (x *conn) accept(s *h2.Stream, fields []h2.Field, end bool) h2.Receiver {
	l := x.hub.serving(x.terms)
	if l == nil { // the connection is being shut down
		return nil // RFC 9113 section 8.7: it can be sent again, on another connection
	}
	if l != x.at {
		x.hop.Renew()
		x.at, x.route = l, nil
		if l.cfg.Route != nil {
			x.route = l.cfg.Route(x.nc)
		}
	}
	if x.route != nil {
		if to := x.route(fields); to != nil {
			if to != x.handler {
				x.handler, x.client = to, to.Client(x.nc)
			}
			return x.client.Accept(s, fields, end)
		}
	}
	return x.hop.Accept(s, fields, end)
}

// dial connects to the server that serves now, as the client would.
func (x *conn) dial() (net.Conn, error) {
	near, far := hop.Pipe(x.nc.LocalAddr(), x.nc.RemoteAddr())
	if tc, ok := x.nc.(*tls.Conn); ok {
		far = &secured{Conn: far, state: tc.ConnectionState()}
	}
	for l := x.hub.serving(x.terms); l != nil; l = x.hub.serving(x.terms) {
		if l.take(far) {
			return near, nil
		}
	}
	return nil, net.ErrClosed
}

// secured is a connection to the server of a client that has come with TLS. Caddy reads that from the connection.
type secured struct {
	net.Conn
	state tls.ConnectionState
}

// ConnectionState is the state of the client's connection.
func (s *secured) ConnectionState() tls.ConnectionState { return s.state }

// prefixed is a connection of which something was read.
type prefixed struct {
	net.Conn
	prefix []byte
	err    error // of the read that came after it
}

// Read implements net.Conn.
func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.prefix) > 0 {
		n := copy(b, p.prefix)
		p.prefix = p.prefix[n:]
		return n, nil
	}
	if err := p.err; err != nil {
		p.err = nil
		return 0, err
	}
	return p.Conn.Read(b)
}

// ReadFrom implements io.ReaderFrom, so that files still go from disk to network without a copy.
func (p *prefixed) ReadFrom(r io.Reader) (int64, error) {
	if to, ok := p.Conn.(io.ReaderFrom); ok {
		return to.ReadFrom(r)
	}
	return io.Copy(struct{ io.Writer }{p.Conn}, r)
}

// CloseWrite closes the connection's own half.
func (p *prefixed) CloseWrite() error {
	if c, ok := p.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Drain ends the connections on the listener's address in order. It waits until their streams have ended, as long as some are busy, which is
// the caller's to know, or something still goes to clients; and then for parting until all have closed. Neither lasts longer than ctx. Then
// it ends what is left.
func (l *Listener) Drain(ctx context.Context, parting time.Duration, busy func() bool) {
	l.hub.shutdown()
	l.hub.waitForStreams(ctx, parting, busy)
	ctx, cancel := context.WithTimeout(ctx, parting)
	defer cancel()
	for conns := l.hub.all(); len(conns) > 0; conns = l.hub.all() { // a handshake may just have ended
		for _, x := range conns {
			select {
			case <-x.c.Done():
				continue
			case <-ctx.Done():
			}
			x.c.Close(h2.NoError, "the server is shutting down")
			<-x.c.Done()
		}
	}
}

// waitForStreams gives up when nothing has moved for stall.
func (h *hub) waitForStreams(ctx context.Context, stall time.Duration, busy func() bool) {
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	moved, before := time.Now(), uint64(0)
	for ctx.Err() == nil {
		streams, sent := h.traffic()
		if streams == 0 {
			return
		}
		if busy() || sent != before {
			moved, before = time.Now(), sent
		}
		if time.Since(moved) >= stall {
			return
		}
		select {
		case <-look.C:
		case <-ctx.Done():
		}
	}
}

// traffic is how many streams there are, and how much all connections have sent.
func (h *hub) traffic() (streams int, sent uint64) {
	for _, x := range h.all() {
		st := x.c.Stats()
		streams += st.Streams
		sent += st.BytesOut
	}
	return streams, sent
}

// Leave takes the listener out of its place before it is closed: the next stream of a connection goes to the one that has come.
func (l *Listener) Leave() { l.hub.leave(l) }
