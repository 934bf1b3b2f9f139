package transport

import (
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// holdEnd keeps its connection's reader busy with the end of a stream.
type holdEnd struct {
	*h2.Blocking
	reached, release chan struct{}
}

func (r *holdEnd) RecvHead(s *h2.Stream, fields []h2.Field, end bool) {
	close(r.reached)
	<-r.release
	r.Blocking.RecvHead(s, fields, end)
}

// TestIdleCloseWithCallWaiting: a call comes when the only connection allowed has just shut down for idleness, and has not
// told the endpoint yet.
func TestIdleCloseWithCallWaiting(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{MaxConns: 1, IdleTimeout: 10 * time.Millisecond, QueueTimeout: timeout})
	last := &holdEnd{h2.NewBlocking(), make(chan struct{}), make(chan struct{})}
	s, err := e.Open(patient, request(), true, last)
	if err != nil {
		t.Fatal(err)
	}
	s.Conn().Flush()
	c := <-accepted
	answer(c, c.ExpectHeaders().Stream)
	<-last.reached
	eventually(t, "idle", s.Conn().Draining)

	result := openLater(e)
	waiting(t, e, 1)
	close(last.release)
	wantOpened(t, result)
	(<-accepted).ExpectHeaders()
}

// TestConnectionWithoutIdentifiers: a connection that can open no stream any more makes room for another one while its last
// streams go on (RFC 9113 section 5.1.1).
func TestConnectionWithoutIdentifiers(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{MaxConns: 1, QueueTimeout: timeout})
	_, long := open(t, e)
	c := <-accepted
	id := c.ExpectHeaders().Stream
	old := (*e.conns.Load())[0]
	old.Shutdown() // stands in for a thousand million streams
	e.nearlyFull(old)
	next := <-accepted // dialled in time, without a call
	_, b := open(t, e)
	answer(next, next.ExpectHeaders().Stream)
	wantEnd(t, b)
	answer(c, id)
	wantEnd(t, long)
	_ = c.ExpectClosed()
}
