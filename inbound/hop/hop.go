// Package hop carries streams of a client's connection that package h2 reads on to the HTTP server in the same process, frame by
// frame, over a connection of its own. The server serves them as if the client had come to it.
package hop

import (
	"cmp"
	"net"
	"slices"
	"sync"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// maxConns is how many connections to the server a client's may have. Go's server takes 250 streams on each.
const maxConns = 16

// connWindow is the window of a connection to the server. Answers that a client does not read stay charged to it, and must not stop the
// client's others: so it is as good as none, and what is held is bounded by the windows of streams, and by the Budget.
const connWindow = 1 << 30

// Hop is the way of one client connection's streams to the server.
type Hop struct {
	// Dial connects to the server that is to have the client's next stream. It must not block.
	Dial func() (net.Conn, error)
	// Config is of the connections to it, but for their windows, which are as good as none: those of their streams count.
	Config h2.Config

	mu     sync.Mutex // LOCKS: guards what follows → h2's Conn.mu
	conns  []*h2.Conn // the oldest first
	closed bool
}

// Accept takes a stream on. It is what h2.Server wants, and runs on the reading goroutine of the client's connection. The stream is
// refused (REFUSED_STREAM: the client may send it again) where there is no server for it.
func (h *Hop) Accept(s *h2.Stream, fields []h2.Field, end bool) h2.Receiver {
	x := &stream{down: s}
	x.request.mu.Lock() // until it is known where it goes
	defer x.request.mu.Unlock()
	up, err := h.open(fields, end, (*server)(x))
	if err != nil {
		if err.Kind == h2.KindHeaderListSize {
			_ = s.WriteHeaders([]h2.Field{{Name: ":status", Value: "431"}}, true)
		}
		return nil
	}
	x.request.from, x.request.to = s, up
	x.request.last = end
	s.Conn().FlushAfter(up.Conn())
	return (*client)(x)
}

// open opens a stream on the oldest connection that suits it, else on a new one, else on any.
//
// Go's server grants all uploads of a connection one window together, by default of 1 MiB. Where uploads that nobody reads leave little
// of it, requests with a body go elsewhere: they would share what is left, and then wait.
func (h *Hop) open(fields []h2.Field, end bool, r h2.Receiver) (*h2.Stream, *h2.Error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.conns = slices.DeleteFunc(h.conns, (*h2.Conn).Draining)
	for _, c := range h.conns {
		if !end && c.Short() {
			continue
		}
		if s, err := c.OpenStream(fields, end, r); err == nil || err.Kind == h2.KindHeaderListSize {
			return s, err
		}
	}
	switch {
	case h.closed:
		return nil, &h2.Error{Kind: h2.KindLocal, Unprocessed: true}
	case len(h.conns) < maxConns:
		return h.dialLocked(fields, end, r)
	}
	return h.crowdLocked(fields, end, r)
}

// dialLocked opens a stream on a new connection.
func (h *Hop) dialLocked(fields []h2.Field, end bool, r h2.Receiver) (*h2.Stream, *h2.Error) {
	nc, err := h.Dial()
	if err != nil {
		return nil, &h2.Error{Kind: h2.KindConnLost, Unprocessed: true, Err: err}
	}
	cfg := h.Config
	cfg.InitialConnWindow, cfg.MaxConnWindow = connWindow, connWindow
	c := h2.Client(nc, cfg)
	h.conns = append(h.conns, c)
	return c.OpenStream(fields, end, r)
}

// crowdLocked opens a stream on the connection with the fewest that takes one.
func (h *Hop) crowdLocked(fields []h2.Field, end bool, r h2.Receiver) (s *h2.Stream, err *h2.Error) {
	fewest := slices.SortedFunc(slices.Values(h.conns), func(a, b *h2.Conn) int { return cmp.Compare(a.Streams(), b.Streams()) })
	for _, c := range fewest {
		if s, err = c.OpenStream(fields, end, r); err == nil || err.Kind == h2.KindHeaderListSize {
			break
		}
	}
	return s, err
}

// Renew has the streams that come from now on go over new connections: the server is another one.
func (h *Hop) Renew() {
	h.mu.Lock()
	conns := h.conns
	h.conns = nil
	h.mu.Unlock()
	for _, c := range conns {
		c.Shutdown()
	}
}

// Close ends the connections to the server, when the client's is over.
func (h *Hop) Close() {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.Renew()
}

// stream is a client's stream and the one that carries it on.
type stream struct {
	down *h2.Stream // the client's
	// request and answer are the ways of what the two sides send.
	request, answer flow
}

// flow is what comes on one stream and goes on the other one. Both of their connections call it.
type flow struct {
	mu       sync.Mutex // LOCKS: guards what follows → h2's Conn.mu
	from, to *h2.Stream
	rest     []byte // what to has not taken yet
	last     bool   // END_STREAM has come
	trailers []h2.Field
	over     bool // all of it has gone on, or it is not wanted any more
	stop     bool // no more of what comes the other way is wanted, when all has gone on
}

// data takes DATA. It runs on the reading goroutine of from's connection.
func (f *flow) data(p []byte, end bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last = f.last || end
	switch {
	case f.over:
		f.from.Consumed(len(p))
		return
	case len(f.rest) > 0:
		f.rest = append(f.rest, p...)
		return
	}
	if n := f.writeLocked(p); n < len(p) {
		f.rest = append(f.rest, p[n:]...)
	}
	f.from.Conn().FlushAfter(f.to.Conn())
}

// writeLocked writes what it can, with the end if that has come and nothing is left before it.
func (f *flow) writeLocked(p []byte) (n int) {
	n, err := f.to.TryWrite(p, f.last && f.trailers == nil)
	switch {
	case err != nil: // the other side is told why
		n = len(p)
		f.over = true
	case n == len(p) && f.trailers != nil:
		_ = f.to.WriteHeaders(f.trailers, true)
		f.over = true
	case n == len(p):
		f.over = f.last
	}
	if f.over && f.stop {
		f.to.Reset(h2.NoError)
	}
	f.from.Consumed(n)
	return n
}

// end takes trailers. It runs on the reading goroutine of from's connection.
func (f *flow) end(trailers []h2.Field) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last = true
	switch {
	case f.over:
		return
	case len(f.rest) > 0:
		f.trailers = slices.Clone(trailers)
		return
	}
	f.over = true
	_ = f.to.WriteHeaders(trailers, true)
	f.from.Conn().FlushAfter(f.to.Conn())
}

// ready goes on when to takes more. What it writes needs no flush.
func (f *flow) ready() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over || len(f.rest) == 0 {
		return
	}
	if n := f.writeLocked(f.rest); n == len(f.rest) {
		f.rest = nil
	} else {
		f.rest = f.rest[n:] // not moved: a client may take it byte by byte
	}
}

// drop forgets what has not gone on. Who sends it may have to send more before it reads an answer, so it gets the credit back.
func (f *flow) drop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.rest) > 0 {
		f.from.Consumed(len(f.rest))
	}
	f.over, f.rest = true, nil
}

// client receives what the client sends.
type client stream

// RecvHead implements h2.Receiver. It is not called in the server role.
func (c *client) RecvHead(*h2.Stream, []h2.Field, bool) {}

// RecvData implements h2.Receiver.
func (c *client) RecvData(_ *h2.Stream, p []byte, end bool) { c.request.data(p, end) }

// RecvTrailers implements h2.Receiver.
func (c *client) RecvTrailers(_ *h2.Stream, fields []h2.Field) { c.request.end(fields) }

// RecvWriteReady implements h2.WriteReadier.
func (c *client) RecvWriteReady(*h2.Stream) { c.answer.ready() }

// RecvReset implements h2.Receiver. It may come from any goroutine.
func (c *client) RecvReset(s *h2.Stream, err *h2.Error) {
	code := h2.Cancel
	if err.Kind == h2.KindReset || err.Kind == h2.KindProtocol {
		code = err.Code
	}
	c.request.mu.Lock()
	up := c.request.to
	c.request.mu.Unlock()
	c.request.drop()
	c.answer.drop()
	up.Reset(code)
	up.Conn().Flush()
	s.Done()
}

// server receives what the server sends.
type server stream

// from notes the stream that the server's answer comes on. It is known before Accept has it.
func (v *server) from(s *h2.Stream) *flow {
	f := &v.answer
	f.mu.Lock()
	f.from, f.to = s, v.down
	f.mu.Unlock()
	return f
}

// RecvHead implements h2.Receiver.
func (v *server) RecvHead(s *h2.Stream, fields []h2.Field, end bool) {
	f := v.from(s)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return
	}
	f.last, f.over = end, end
	_ = v.down.WriteHeaders(fields, end)
	s.Conn().FlushAfter(v.down.Conn())
}

// RecvData implements h2.Receiver.
func (v *server) RecvData(s *h2.Stream, p []byte, end bool) { v.from(s).data(p, end) }

// RecvTrailers implements h2.Receiver.
func (v *server) RecvTrailers(s *h2.Stream, fields []h2.Field) { v.from(s).end(fields) }

// RecvWriteReady implements h2.WriteReadier.
func (v *server) RecvWriteReady(*h2.Stream) { v.request.ready() }

// RecvReset implements h2.Receiver. It may come from any goroutine.
func (v *server) RecvReset(s *h2.Stream, err *h2.Error) {
	v.request.drop()
	if err.Kind == h2.KindMemory {
		v.answer.drop() // what has come of it is too much
	}
	v.from(s).reset(codeOf(err))
	v.down.Conn().Flush()
	v.down.Done()
}

// codeOf is what the client is told of the end of the server's stream.
func codeOf(err *h2.Error) h2.ErrCode {
	switch {
	case err.Kind == h2.KindReset:
		return err.Code
	case err.Unprocessed:
		return h2.RefusedStream
	case err.Kind == h2.KindMemory:
		return h2.EnhanceYourCalm
	}
	return h2.InternalError
}

// reset resets to. If all of the answer has come, from tells only that the rest of the request is not wanted (RFC 9113 section 8.1), and
// that behind the answer.
func (f *flow) reset(code h2.ErrCode) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last && !f.over {
		f.stop = true
		return
	}
	f.over, f.rest = true, nil
	f.to.Reset(code)
}

var (
	_ h2.Receiver     = (*client)(nil)
	_ h2.WriteReadier = (*client)(nil)
	_ h2.Receiver     = (*server)(nil)
	_ h2.WriteReadier = (*server)(nil)
)
