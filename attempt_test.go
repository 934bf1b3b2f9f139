package grpcproxy

import (
	"fmt"
	"net"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// waiting is a call at a handler whose upstreams are n ports that nobody dials.
func waiting(t *testing.T, port, n int) *exchange {
	t.Helper()
	h := &Handler{
		Upstreams: []*Upstream{{Dial: fmt.Sprintf("127.0.0.1:%d-%d", port, port+n-1)}},
		Transport: &Transport{DialTimeout: caddy.Duration(time.Minute)},
	}
	if err := provision(t, h); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Cleanup() })
	return newExchange(h, httptest.NewRecorder(), httptest.NewRequest("POST", "/a/b", nil))
}

// Verdicts that come while the call begins to wait for them let it go on, however many there are.
func TestVerdictsComeAtOnce(t *testing.T) {
	x := waiting(t, 7100, 32)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 500 {
			for _, e := range x.cur.Live() {
				e.State.Set(upstream.Connecting)
			}
			go func() {
				for _, e := range x.cur.Live() {
					e.State.Clear(upstream.Connecting)
				}
			}()
			for x.awaitVerdict() {
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("the call waits for a verdict that it was told of")
	}
}

// A call waits for an endpoint that is being dialled again only if that is all there is against it.
func TestWaitsForGoodEndpoints(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // It is connected to, and never answers.
	h := &Handler{
		Upstreams: []*Upstream{{Dial: l.Addr().String()}},
		Transport: &Transport{DialTimeout: caddy.Duration(time.Hour), MinConns: 1},
	}
	if err := provision(t, h); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Cleanup() }()
	x := newExchange(h, httptest.NewRecorder(), httptest.NewRequest("POST", "/a/b", nil))
	x.call.Service = "a"
	end := x.cur.Endpoints[0]
	s := end.State
	s.Set(upstream.Backoff)
	if _, ok := x.connecting(); ok {
		t.Error("it is not being dialled")
	}
	end.Preconnect()
	if _, ok := x.connecting(); !ok {
		t.Error("the call does not wait for it")
	}
	for _, r := range []upstream.Reason{upstream.Unhealthy, upstream.Connecting, upstream.Ejected, upstream.Failing, upstream.Draining} {
		s.Set(r)
		if _, ok := x.connecting(); ok {
			t.Errorf("the call waits for an endpoint that is %s", s.Status().Condition)
		}
		s.Clear(r)
	}
	s.SetServices(map[string]upstream.Service{"a": {}, "b": {Usable: true}}, nil)
	if _, ok := x.connecting(); ok {
		t.Error("the call waits for an endpoint that does not serve its service")
	}
	x.call.Service = "b"
	if _, ok := x.connecting(); !ok {
		t.Error("the call does not wait for an endpoint that serves its service")
	}
}

// In a panic an endpoint on probation takes as many calls as others do.
func TestProbationInPanic(t *testing.T) {
	x := waiting(t, 7140, 1)
	begin := func() (*attempt, bool) {
		a := &attempt{x: x, view: x.cur, end: x.cur.Endpoints[0]}
		return a, a.begin()
	}
	s := x.cur.Endpoints[0].State
	s.Set(upstream.Probation)
	if a, ok := begin(); !ok || a.lesson.trial == 0 {
		t.Fatal("the first call is not the trial")
	}
	if _, ok := begin(); ok {
		t.Fatal("a second call was taken")
	}
	view := *x.cur
	view.Panic = true
	x.cur = &view
	if a, ok := begin(); !ok || a.lesson.trial != 0 {
		t.Errorf("in a panic: taken %v, trial %v", ok, a.lesson.trial)
	}
	if n := s.Active(); n != 2 {
		t.Errorf("%d calls are counted, want 2", n)
	}
}
