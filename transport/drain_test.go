package transport

import (
	"strings"
	"sync/atomic"
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
	e := endpoint(t, l.Addr(), Config{MaxConns: 1, IdleTimeout: 100 * time.Millisecond, QueueTimeout: timeout})
	last := &holdEnd{h2.NewBlocking(), make(chan struct{}), make(chan struct{})}
	s, err := e.OpenWait(t.Context(), request(), true, last)
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
	wantOpened(t, result) // perhaps on a third connection: the second may have been idle for too long, too
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

// TestUpstreamThatDoesNotRead: calls that would only fill memory go elsewhere, or wait until it reads on.
func TestUpstreamThatDoesNotRead(t *testing.T) {
	const most = 3000
	large := append(request(), h2.Field{Name: "x", Value: strings.Repeat("\xff", 32<<10), Sensitive: true})
	call := func(e *Endpoint) (*h2.Conn, *Error) {
		s, err := e.OpenWait(t.Context(), large, true, h2.NewBlocking())
		if err != nil {
			return nil, err
		}
		s.Conn().Flush()
		return s.Conn(), nil
	}
	t.Run("elsewhere", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		l, accepted := listen(t)
		e := endpoint(t, l.Addr(), Config{MaxConns: 2, QueueTimeout: timeout})
		s, _ := open(t, e)
		c := <-accepted
		c.ExpectHeaders()
		c.Pause()
		for i := range most {
			conn, err := call(e)
			if err != nil {
				t.Fatalf("call %d: %v", i, err)
			}
			if conn != s.Conn() {
				(<-accepted).ExpectHeaders()
				return
			}
		}
		t.Error("all calls went to the connection that does not read")
	})
	t.Run("later", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		l, accepted := listen(t)
		e := endpoint(t, l.Addr(), Config{MaxConns: 1, QueueTimeout: timeout})
		open(t, e)
		c := <-accepted
		c.ExpectHeaders()
		c.Pause()
		var enough atomic.Bool
		result := make(chan *Error, 1)
		go func() {
			var err *Error
			for i := 0; i < most && err == nil && !enough.Load(); i++ {
				_, err = call(e)
			}
			result <- err
		}()
		waiting(t, e, 1)
		enough.Store(true)
		c.Resume()
		wantOpened(t, result)
	})
}
