// Package listen wraps the listeners of an HTTP server: connections that speak HTTP/2 are read by package h2, all others are given to the
// server as they are.
package listen

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/direct"
)

// Config is how the connections of a listener are served.
type Config struct {
	// Plaintext: connections without TLS that begin with HTTP/2's preface are taken.
	Plaintext bool
	// Route returns what tells, of the streams of one connection, who takes their calls: a handler, or, if it is nil, the server. nil: the
	// server takes all. It runs on the connection's reading goroutine.
	Route func(nc net.Conn) func(fields []h2.Field) *direct.Handler
	// Limits are the server's. They are asked for with each connection.
	Limits func() Limits
	// Terms are what clients have agreed to by connecting: how they have shown who they are, and what they were told of limits. A connection
	// is served by listeners on the same terms only: it is shut down when the last one is closed.
	Terms string
	// Logger gets what goes wrong. Default: none.
	Logger *zap.Logger
}

// Limits are what a server allows its clients.
type Limits struct {
	// Handshake bounds the TLS handshake, Preface what comes before HTTP/2's SETTINGS; 0: no bound.
	Handshake, Preface time.Duration
	// Age is after how long a connection is shut down, ± 10 %, and AgeGrace how long its streams may go on then (gRFC A9); 0: no bound.
	Age, AgeGrace time.Duration
	// Connection is how HTTP/2 is spoken.
	Connection h2.Config
}

// Listener is a wrapped listener. Its Accept returns the connections that are the server's.
type Listener struct {
	inner net.Listener
	cfg   Config
	hub   *hub

	mu     sync.Mutex // LOCKS: guards what follows
	cond   sync.Cond
	ready  []net.Conn // for the server
	err    error      // why none comes any more
	closed bool
}

// Wrap wraps a listener, and begins to accept its connections.
func Wrap(inner net.Listener, cfg Config) *Listener {
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	l := &Listener{inner: inner, cfg: cfg}
	l.cond.L = &l.mu
	l.hub = join(l)
	go l.accept()
	return l
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.ready) == 0 && l.err == nil {
		l.cond.Wait()
	}
	if len(l.ready) == 0 {
		return nil, l.err
	}
	nc := l.ready[0]
	l.ready[0] = nil
	l.ready = l.ready[1:]
	return nc, nil
}

// Close implements net.Listener. Connections that are read by package h2 stay: their next streams go to the listener that has come in
// this one's place, and if there is none, they are shut down.
func (l *Listener) Close() error {
	l.Leave() // first, so that who finds it there can give to it
	l.mu.Lock()
	left := l.ready
	l.ready, l.closed = nil, true
	if l.err == nil {
		l.err = net.ErrClosed
	}
	l.cond.Broadcast()
	l.mu.Unlock()
	err := l.inner.Close()
	for _, nc := range left {
		l.give(nc)
	}
	return err
}

// give gives a connection to the server, or, if that is gone meanwhile, to the one that has come in its place on the same terms.
func (l *Listener) give(nc net.Conn) {
	for to := l; to != nil; to = l.hub.serving(l.cfg.Terms) {
		if to.take(nc) {
			return
		}
	}
	_ = nc.Close()
}

func (l *Listener) take(nc net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.ready = append(l.ready, nc)
	l.cond.Signal()
	return true
}

// accept takes connections in until there will be none any more. Whatever may wait for a client runs apart from it.
func (l *Listener) accept() {
	var pause time.Duration
	for {
		nc, err := l.inner.Accept()
		if err == nil {
			pause = 0
			go l.handle(nc)
			continue
		}
		if t, ok := errors.AsType[interface {
			error
			Temporary() bool
		}](err); ok && t.Temporary() { // as net/http does: no files left, for example
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			l.cfg.Logger.Error("accepting connections", zap.Error(err), zap.Duration("again_in", pause))
			time.Sleep(pause)
			continue
		}
		l.mu.Lock()
		if l.err == nil {
			l.err = err
		}
		l.cond.Broadcast()
		l.mu.Unlock()
		return
	}
}

// handle finds out what a new connection speaks.
func (l *Listener) handle(nc net.Conn) {
	limits := l.cfg.Limits()
	switch tc := nc.(type) {
	case *tls.Conn:
		l.handshake(tc, limits)
	case interface{ ConnectionState() tls.ConnectionState }: // TLS in another wrapper's hands
		l.give(nc)
	default:
		if l.cfg.Plaintext {
			l.peek(nc, limits)
		} else {
			l.give(nc)
		}
	}
}

// handshake shakes hands. A failure is left to the server, which gets the same error from the connection, and knows what to answer.
func (l *Listener) handshake(tc *tls.Conn, limits Limits) {
	done := l.hub.pending.add(tc.NetConn())
	ctx := context.Background()
	if d := limits.Handshake; d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	err := tc.HandshakeContext(ctx)
	done()
	if err != nil || tc.ConnectionState().NegotiatedProtocol != "h2" {
		l.give(tc)
		return
	}
	l.serve(tc, nil, limits)
}

// peek reads as far as the connection says what only HTTP/2 says.
func (l *Listener) peek(nc net.Conn, limits Limits) {
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	done := l.hub.pending.add(nc)
	if d := limits.Preface; d > 0 {
		_ = nc.SetReadDeadline(time.Now().Add(d))
	}
	var (
		buf [len(preface)]byte
		n   int
		err error
	)
	for n < len(preface) && err == nil && string(buf[:n]) == preface[:n] {
		var k int
		k, err = nc.Read(buf[n:])
		n += k
	}
	done()
	_ = nc.SetReadDeadline(time.Time{})
	switch {
	case string(buf[:n]) == preface:
		l.serve(nc, buf[:], limits)
	case err != nil && n == 0, errors.Is(err, os.ErrDeadlineExceeded):
		_ = nc.Close() // as net/http does, without a word
	default:
		l.give(&prefixed{Conn: nc, prefix: buf[:n], err: err})
	}
}

// pending are connections that have not said yet what they speak. The number of those is bounded: where more come, the oldest one is
// closed. Whoever stalls many of them so keeps nobody else out, since a good client is through in a moment.
type pending struct {
	mu   sync.Mutex // LOCKS: guards what follows
	most int
	list list.List // the oldest first
	over bool      // none is waited for any more
}

// maxPending is how many there may be on an address.
const maxPending = 4096

func (p *pending) add(nc net.Conn) (done func()) {
	p.mu.Lock()
	e := p.list.PushBack(nc)
	var end net.Conn
	switch {
	case p.over:
		end = nc
	case p.list.Len() > p.most:
		end, _ = p.list.Remove(p.list.Front()).(net.Conn)
	}
	p.mu.Unlock()
	if end != nil {
		_ = end.Close()
	}
	return func() {
		p.mu.Lock()
		p.list.Remove(e)
		p.mu.Unlock()
	}
}

// end closes all of them, and those that come.
func (p *pending) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
	for e := p.list.Front(); e != nil; e = e.Next() {
		_ = e.Value.(net.Conn).Close()
	}
}
