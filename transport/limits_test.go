package transport

import (
	"net/netip"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Of each limit the largest in force holds.
func TestLargestLimitHolds(t *testing.T) {
	e := endpoint(t, "127.0.0.1:1", Config{MaxConns: 7, QueueSize: 7, QueueTimeout: time.Hour})
	steps := []struct {
		what string
		is   limits
	}{
		{"before anybody uses it", limits{7, 7, time.Hour}},
		{"with one user", limits{3, 20, time.Second}},
		{"with a second one", limits{DefaultMaxConns, DefaultQueueSize, DefaultQueueTimeout}},
		{"with one that is in between", limits{DefaultMaxConns, DefaultQueueSize, time.Minute}},
		{"when the second one is gone", limits{5, 20, time.Minute}},
		{"when all are gone", limits{5, -1, time.Minute}},
	}
	check := func(i int) {
		t.Helper()
		if is := *e.limits.Load(); is != steps[i].is {
			t.Errorf("%s: %+v, want %+v", steps[i].what, is, steps[i].is)
		}
	}
	check(0)
	other, first := e.Use(Config{MaxConns: 3, QueueSize: 20, QueueTimeout: time.Second}, "old")
	check(1)
	if other != 0 {
		t.Errorf("the first user is told of another max_conns, %d", other)
	}
	other, second := e.Use(Config{}, "old")
	check(2)
	if other != 3 {
		t.Errorf("the other max_conns is %d, not 3", other)
	}
	other, third := e.Use(Config{MaxConns: 5, QueueSize: -1, QueueTimeout: time.Minute}, "new")
	check(3)
	if other != 0 {
		t.Errorf("told of max_conns %d of another configuration", other)
	}
	second()
	second()
	check(4)
	first()
	third()
	check(5)
	if own := e.Own(netip.MustParseAddr("192.0.2.1")); *own.limits.Load() != steps[5].is {
		t.Errorf("a client's part has %+v", *own.limits.Load())
	}
}

// Calls that wait get another connection as soon as one more is allowed, and when fewer are allowed again the newest ones go, once
// their streams have ended.
func TestMaxConnsRisesAndFalls(t *testing.T) {
	wiretest.CheckLeaks(t)
	one := wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}}
	l, accepted := listen(t, one)
	small := Config{MaxConns: 1, QueueTimeout: time.Minute}
	e := endpoint(t, l.Addr(), small)
	_, stop := e.Use(small, nil)
	defer stop()
	_, first := open(t, e)
	a := <-accepted
	queued := make(chan *h2.Blocking, 1)
	go func() {
		_, b := open(t, e)
		queued <- b
	}()
	eventually(t, "a call waits", func() bool { return e.waiting.Load() == 1 })
	_, stopLarge := e.Use(Config{MaxConns: 2}, nil)
	b := <-accepted
	second := <-queued
	stopLarge()
	if n := e.Conns(); n != 1 {
		t.Errorf("%d connections take calls, one is allowed", n)
	}
	answer(b, b.ExpectHeaders().Stream)
	wantEnd(t, second)
	b.ExpectClosed()
	answer(a, a.ExpectHeaders().Stream)
	wantEnd(t, first)
	_, third := open(t, e)
	answer(a, a.ExpectHeaders().Stream)
	wantEnd(t, third)
	if n := l.Accepted(); n != 2 {
		t.Errorf("%d connections were made", n)
	}
}

// A connection that was being made when fewer became allowed is not used.
func TestMaxConnsFallsDuringDial(t *testing.T) {
	wiretest.CheckLeaks(t)
	one := wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}, NoSettings: true}
	l := wiretest.Listen(t, one)
	conns := make(chan *wiretest.Conn, 2)
	speak := make(chan struct{}, 2)
	l.Serve(func(c *wiretest.Conn) {
		<-speak
		conns <- c
		c.WriteSettings(one.Settings...)
		<-t.Context().Done()
	})
	speak <- struct{}{}
	small := Config{MaxConns: 1, QueueTimeout: time.Minute}
	e := endpoint(t, l.Addr(), small)
	_, stop := e.Use(small, nil)
	defer stop()
	_, first := open(t, e)
	a := <-conns
	_, stopLarge := e.Use(Config{MaxConns: 2}, nil)
	queued := make(chan *h2.Blocking, 1)
	go func() {
		_, b := open(t, e)
		queued <- b
	}()
	eventually(t, "the second connection is being made", func() bool { return l.Accepted() == 2 })
	stopLarge()
	speak <- struct{}{}
	b := <-conns
	b.ExpectClosed()
	if n := e.Conns(); n != 1 {
		t.Errorf("%d connections take calls, one is allowed", n)
	}
	answer(a, a.ExpectHeaders().Stream)
	wantEnd(t, first)
	second := <-queued
	answer(a, a.ExpectHeaders().Stream)
	wantEnd(t, second)
}

// An endpoint logs as the configuration says that is in force, clients' parts as well.
func TestLogsWhereItIsUsed(t *testing.T) {
	e := endpoint(t, "127.0.0.1:1", Config{})
	core, logs := observer.New(zap.WarnLevel)
	other, others := observer.New(zap.WarnLevel)
	own := e.Own(netip.MustParseAddr("192.0.2.1"))
	_, stop := e.Use(Config{Logger: zap.New(core)}, nil)
	defer stop()
	_, stopOther := e.Use(Config{Logger: zap.New(other)}, nil)
	own.logger.Load().Warn("to the last")
	stopOther()
	own.logger.Load().Warn("to the one that is left")
	if logs.Len() != 1 || others.Len() != 1 {
		t.Errorf("%d and %d lines", logs.Len(), others.Len())
	}
}

// Preconnect keeps as many connections as the one who asks for most.
func TestKeepsAsManyAsAreWanted(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{})
	defer e.Preconnect(1)()
	<-accepted
	stop := e.Preconnect(3)
	b := <-accepted
	<-accepted
	eventually(t, "three connections", func() bool { return e.Conns() == 3 })
	stop()
	stop()
	b.Close()
	eventually(t, "the one that has ended is out of use", func() bool { return e.Conns() == 2 })
	if e.Dialing() || l.Accepted() != 3 {
		t.Error("a connection is made that nobody wants any more")
	}
}

// Watchers of a State may ask the endpoint: they are told when nobody holds its lock.
func TestWatchersMayAsk(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{})
	var s upstream.State
	defer e.Attach(&s)()
	told := make(chan upstream.Change, 10)
	defer s.Watch(func(c upstream.Change) {
		_, _ = e.Dialing(), e.LastError()
		if c != upstream.Stirred {
			told <- c
		}
	})()
	expect := func(want upstream.Change) {
		t.Helper()
		select {
		case got := <-told:
			if got != want {
				t.Errorf("told %v, want %v", got, want)
			}
		case <-time.After(timeout):
			t.Fatalf("not told of %v", want)
		}
	}
	_, b := open(t, e)
	c := <-accepted
	answer(c, c.ExpectHeaders().Stream)
	wantEnd(t, b)
	if s.Connected().IsZero() {
		t.Error("not connected")
	}
	l.Close() // which leaves the connection
	c.Close()
	expect(upstream.Disconnected)
	expect(upstream.BecameUnusable)
	if s.Status().Reason != upstream.Backoff {
		t.Errorf("it is %+v", s.Status())
	}
}
