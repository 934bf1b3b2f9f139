package transport

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// failures is how many there were in a row.
func failures(e *Endpoint) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.backoff.failures
}

// TestConnectionsOfNoUse: an upstream that ends each connection soon is connected to with growing pauses, whoever asks for a
// connection and however it ends them. The pauses are 100 ms, 200 ms, 400 ms, each at least 80 % of that.
func TestConnectionsOfNoUse(t *testing.T) {
	const pauses = (100 + 200 + 400) * time.Millisecond * 8 / 10
	for _, tc := range []struct {
		name  string
		cfg   Config
		opts  wiretest.Options
		serve func(c *wiretest.Conn)
		ask   func(e *Endpoint) (stop func())
	}{
		{
			name: "closed, connections are kept", cfg: Config{MinConns: 1},
			serve: func(c *wiretest.Conn) { c.Close() },
			ask:   func(e *Endpoint) func() { return e.Preconnect(1) },
		},
		{
			name: "closed, a call waits", cfg: Config{MaxConns: 1, QueueTimeout: time.Minute},
			opts:  wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 0}}},
			serve: func(c *wiretest.Conn) { c.Close() },
			ask:   calling,
		},
		{
			name:  "each stream is answered with GOAWAY",
			serve: func(c *wiretest.Conn) { c.ExpectHeaders(); c.WriteGoAway(0, http2.ErrCodeNo, "") },
			ask:   calling,
		},
		{
			name:  "each stream is answered with the end",
			serve: func(c *wiretest.Conn) { c.ExpectHeaders(); c.Abort() },
			ask:   calling,
		},
		{
			name:  "each stream is reset with the connection",
			serve: func(c *wiretest.Conn) { c.WriteReset(c.ExpectHeaders().Stream, http2.ErrCodeInternal); c.Close() },
			ask:   calling,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			l := wiretest.Listen(t, tc.opts)
			l.Serve(tc.serve)
			e := endpoint(t, l.Addr(), tc.cfg)
			start := time.Now()
			defer tc.ask(e)()
			eventually(t, "four connections", func() bool { return l.Accepted() >= 4 })
			if took := time.Since(start); took < pauses {
				t.Errorf("four connections within %v", took)
			}
		})
	}
}

// calling makes one call after the other.
func calling(e *Endpoint) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := ctx.Done()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			b := h2.NewBlocking()
			s, err := e.OpenWait(ctx, request(), true, b)
			if err != nil {
				time.Sleep(time.Millisecond)
				continue
			}
			s.Conn().Flush()
			select {
			case <-s.Conn().Leaving():
			case <-done:
			}
		}
	}()
	return func() { cancel(); <-ended }
}

// TestConnectionOfUse: the series of pauses ends when a connection has completed a stream, or has lived long.
func TestConnectionOfUse(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{})
	for i := range 3 {
		_, b := open(t, e)
		c := <-accepted
		c.ExpectHeaders()
		c.Abort()
		if _, err := b.WaitHead(t.Context()); err == nil {
			t.Fatal("answered")
		}
		eventually(t, "a failure", func() bool { return failures(e) == i+1 })
	}
	_, b := open(t, e)
	c := <-accepted
	answer(c, c.ExpectHeaders().Stream)
	wantEnd(t, b)
	c.Abort()
	c = <-accepted // at once, without a call
	eventually(t, "a new series", func() bool { return failures(e) == 0 && e.Conns() == 1 })

	c.Abort()
	eventually(t, "the next series", func() bool { return failures(e) == 1 })
	open(t, e)
	c = <-accepted
	e.mu.Lock()
	(*e.conns.Load())[0].made = time.Now().Add(-proofTime)
	e.mu.Unlock()
	c.Abort()
	<-accepted
	eventually(t, "no failure: it has lived long", func() bool { return failures(e) == 0 })
}

// TestGoneAwayAndAnswered: a connection whose last streams are answered after its GOAWAY was of use, too.
func TestGoneAwayAndAnswered(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{})
	_, b := open(t, e)
	c := <-accepted
	id := c.ExpectHeaders().Stream
	c.WriteGoAway(id, http2.ErrCodeNo, "")
	eventually(t, "a failure", func() bool { return failures(e) == 1 })
	answer(c, id)
	wantEnd(t, b)
	_ = c.ExpectClosed()
	eventually(t, "no failure", func() bool { return failures(e) == 0 })
}

// TestHalfOpen: an endpoint that accepts connections and never speaks stays in backoff while it is dialled again and again, and
// is usable when its SETTINGS have come.
func TestHalfOpen(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t, wiretest.Options{NoSettings: true})
	var speak atomic.Bool
	l.Serve(func(c *wiretest.Conn) {
		if speak.Load() {
			c.WriteSettings()
		}
		<-t.Context().Done()
	})
	e := endpoint(t, l.Addr(), Config{DialTimeout: 50 * time.Millisecond})
	_, err := e.OpenWait(t.Context(), request(), true, h2.NewBlocking())
	wantKind(t, err, KindDial)
	eventually(t, "it is dialled again without a call", func() bool {
		if !e.link.Has(upstream.Backoff) {
			t.Fatal("taken for usable before it has spoken")
		}
		return l.Accepted() >= 3
	})
	speak.Store(true)
	eventually(t, "usable", func() bool { return usable(e) })
	if e.Conns() != 1 {
		t.Error("usable without a connection")
	}
}

// TestAsk: calls that find nothing usable have an endpoint dialled, at most once a second, and no less often either.
func TestAsk(t *testing.T) {
	wiretest.CheckLeaks(t)
	nl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nl.Close()
	e := endpoint(t, nl.Addr().String(), Config{})
	for range 9 { // the wait is of about ten seconds then
		n := failures(e)
		e.Retry()
		eventually(t, "another failure", func() bool { return failures(e) > n && !e.Dialing() })
	}
	if e.Ask() {
		t.Error("dialled twice within a second, or a call is to wait for the next time")
	}
	e.mu.Lock()
	if most := e.dialled.Add(askEvery); e.backoff.until.After(most) {
		t.Errorf("the next dial comes %v after the last, though a call has asked for it", e.backoff.until.Sub(e.dialled))
	}
	e.backoff.resetLocked() // as if the wait had never been cut short
	e.delayLocked(e.dialError(KindDial, net.ErrClosed))
	e.backoff.until = time.Now().Add(time.Hour)
	e.dialled = time.Now().Add(-askEvery)
	e.mu.Unlock()

	again, err := net.Listen("tcp", nl.Addr().String())
	if err != nil {
		t.Skipf("the port was taken by somebody else: %v", err)
	}
	l := wiretest.ListenOn(t, again, wiretest.Options{NoSettings: true})
	for range 2 {
		if !e.Ask() {
			t.Error("there is nothing to wait for")
		}
	}
	opened := openLater(e)
	c := l.Accept()
	c.WriteSettings()
	wantOpened(t, opened)
	if n := l.Accepted(); n != 1 {
		t.Errorf("%d connections for one question", n)
	}
}

// TestEarly: RFC 9113 section 3.4: a call may be sent before the server's SETTINGS. That is done for one call, after a while,
// if it has no better endpoint; it helps servers that speak with their first answer.
func TestEarly(t *testing.T) {
	t.Parallel()
	l := wiretest.Listen(t, wiretest.Options{NoSettings: true})
	e := endpoint(t, l.Addr(), Config{MaxStreamsPerConn: 1, MaxConns: 1}) // the first stream fills the connection
	results := make(chan *Error, 3)
	var answers [3]*h2.Blocking
	for i := range answers {
		answers[i] = h2.NewBlocking()
		told := try(e, &Ticket{Early: i == 2}, answers[i])
		go func() {
			o := <-told
			if o.stream != nil {
				o.stream.Conn().Flush()
			}
			results <- o.err
		}()
		waiting(t, e, int32(i+1))
	}
	c := l.Accept()
	id := c.ExpectHeaders().Stream
	if err := <-results; err != nil {
		t.Fatal(err)
	}
	if n := e.waiting.Load(); n != 2 || e.Conns() != 0 {
		t.Errorf("%d calls wait for %d connections", n, e.Conns())
	}
	c.WriteSettings()
	answer(c, id)
	wantEnd(t, answers[2])
	for range 2 {
		next := c.ExpectHeaders().Stream
		if err := <-results; err != nil {
			t.Fatal(err)
		}
		answer(c, next)
	}
}

// TestSentEarlyInVain: a call that was sent early counts as sent when the dial fails.
func TestSentEarlyInVain(t *testing.T) {
	t.Parallel()
	l := wiretest.Listen(t, wiretest.Options{NoSettings: true})
	e := endpoint(t, l.Addr(), Config{DialTimeout: 700 * time.Millisecond})
	b := h2.NewBlocking()
	o := <-try(e, &Ticket{Early: true}, b)
	if o.err != nil {
		t.Fatal(o.err)
	}
	s := o.stream
	s.Conn().Flush()
	l.Accept().ExpectHeaders()
	_, herr := b.WaitHead(t.Context())
	if herr == nil {
		t.Fatal("answered")
	}
	if he := s.Err(); he == nil || he.Unprocessed {
		t.Errorf("%v; the call has left", he)
	}
}

// TestLeave: a parked call can be taken back, and keeps nobody from being served.
func TestLeave(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t, wiretest.Options{NoSettings: true})
	e := endpoint(t, l.Addr(), Config{})
	for range 2 {
		ticket := &Ticket{Queue: true}
		told := try(e, ticket, h2.NewBlocking())
		if !e.Leave(ticket) {
			t.Error("it was told something")
		}
		if e.Leave(ticket) || len(told) > 0 {
			t.Error("it is still there")
		}
	}
	if n := e.waiting.Load(); n != 0 {
		t.Errorf("%d calls wait", n)
	}
	stays := openLater(e)
	c := l.Accept()
	c.WriteSettings()
	wantOpened(t, stays)
	if n := l.Accepted(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// TestLeaveWhileGranted: a call that leaves just when it is its turn is told so, once, and its stream is not lost.
func TestLeaveWhileGranted(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t, maxStreams(1))
	e := endpoint(t, l.Addr(), Config{MaxConns: 1, QueueTimeout: time.Minute})
	open(t, e)
	c := <-accepted
	ticket := &Ticket{Queue: true}
	slow := &slowCall{call: call{h2.NewBlocking(), make(chan opened, 1)}, asked: make(chan struct{}), answer: make(chan struct{})}
	ticket.Opener = slow
	if s, err := e.Open(ticket); s != nil || err != nil {
		t.Fatal(s, err)
	}
	answer(c, c.ExpectHeaders().Stream)
	<-slow.asked
	if e.Leave(ticket) {
		t.Error("taken back, although it is being served")
	}
	close(slow.answer)
	o := <-slow.told
	if o.err != nil {
		t.Fatal(o.err)
	}
	o.stream.Reset(h2.Cancel)
	next := openLater(e)
	wantOpened(t, next)
}

// slowCall takes its time to make its head, when it is asked for the second time.
type slowCall struct {
	call
	times         int
	asked, answer chan struct{}
}

func (c *slowCall) Head() ([]h2.Field, bool, h2.Receiver) {
	if c.times++; c.times == 2 {
		close(c.asked)
		<-c.answer
	}
	return c.call.Head()
}

// TestWaitsOnce: a call without a deadline waits for a stream as long as such a call may wait, and not as long at each endpoint.
func TestWaitsOnce(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t, maxStreams(1))
	e := endpoint(t, l.Addr(), Config{MaxConns: 1, QueueTimeout: time.Minute})
	open(t, e)
	<-accepted
	o := <-try(e, &Ticket{Since: time.Now().Add(-time.Minute), Queue: true}, h2.NewBlocking())
	wantKind(t, o.err, KindQueueTimeout)
}

// TestVerdictBeforeTheWait: a dial that was begun for a call and has failed before the call waits for it is what the call gets,
// and no call's that comes later.
func TestVerdictBeforeTheWait(t *testing.T) {
	wiretest.CheckLeaks(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	e := endpoint(t, free.Addr().String(), Config{})
	came := time.Now()
	if !e.Connect() {
		t.Fatal("not dialled")
	}
	eventually(t, "the dial has failed", func() bool { return failures(e) > 0 && !e.Dialing() })
	e.mu.Lock()
	e.backoff.until = time.Now().Add(time.Minute) // however long the machine takes
	e.mu.Unlock()
	wantKind(t, (<-try(e, &Ticket{Since: came}, h2.NewBlocking())).err, KindDial)
	wantKind(t, (<-try(e, &Ticket{Since: time.Now()}, h2.NewBlocking())).err, KindBackoff)
}
