package grpcproxy

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
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
	h.cluster.Start()
	return newExchange(h, httptest.NewRecorder(), httptest.NewRequest("POST", "/a/b", nil))
}

// Verdicts that come while the call looks for an endpoint, and while it begins to wait, let it go on, however many come.
func TestVerdictsComeAtOnce(t *testing.T) {
	x := waiting(t, 7100, 32)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 200 {
			for _, e := range x.cur.Live() {
				e.State.Set(upstream.Connecting)
			}
			go func() {
				for _, e := range x.cur.Live() {
					e.State.Clear(upstream.Connecting)
				}
			}()
			for {
				news := x.h.cluster.News()
				if _, ok := x.cur.Picker.Pick(x.pickInfo()); ok || !x.awaitNews(news) {
					break
				}
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("the call waits for a verdict that it was told of")
	}
}

// counting is round robin that counts how often it is asked.
type counting struct {
	selection.RoundRobin
	asked atomic.Int64
	all   chan struct{} // closed when it was asked so often
	often int64
}

type countingPicker struct {
	selection.Picker
	*counting
}

func (c *counting) Build(s *upstream.Snapshot) selection.Picker {
	return countingPicker{c.RoundRobin.Build(s), c}
}

func (p countingPicker) Pick(in selection.PickInfo) (selection.Pick, bool) {
	if p.asked.Add(1) == p.often {
		close(p.all)
	}
	return p.Picker.Pick(in)
}

// Calls that wait for first verdicts look for an endpoint when there is reason to, not again and again.
func TestWaitingCostsNothing(t *testing.T) {
	const upstreams, calls = 20, 100
	x := waiting(t, 7150, upstreams)
	policy := &counting{all: make(chan struct{}), often: 2 * calls}
	c, err := cluster.New(cluster.Config{
		Static: x.cur.Snapshot.Endpoints, Policy: policy, Logger: zap.NewNop(),
		Transport: func(*upstream.Endpoint) transport.Config { return transport.Config{Identity: t.Name()} },
		Cut:       func(*transport.Endpoint) int { return 0 },
	})
	if err != nil {
		t.Fatal(err)
	}
	x.h.cluster.Close()
	x.h.cluster = c
	c.Start()
	ends := c.View().Live()
	for _, e := range ends {
		e.State.Set(upstream.Connecting)
	}
	var wg sync.WaitGroup
	for range calls {
		y := newExchange(x.h, httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/a/b", nil))
		wg.Go(func() {
			if f := y.begin(); f == nil || f.code != grpcwire.Unavailable {
				t.Errorf("the call has found an upstream, though none was usable: %v", f)
			}
		})
	}
	<-policy.all // all calls wait, or are about to
	for begin := time.Now(); time.Since(begin) < 300*time.Millisecond; {
		for _, e := range ends[1:] {
			e.State.Change(upstream.Unhealthy, upstream.Connecting, "")
			e.State.Change(upstream.Connecting, upstream.Unhealthy, "")
		}
	}
	for _, e := range ends {
		e.State.Change(upstream.Unhealthy, upstream.Connecting, "")
	}
	wg.Wait()
	// Twice before a call waits, once when it is told that there is nothing left to wait for.
	if n := policy.asked.Load(); n > 3*calls {
		t.Errorf("%d calls have looked for an upstream %d times", calls, n)
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
		Transport: &Transport{DialTimeout: caddy.Duration(time.Hour)},
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
	if end.Dialing() {
		t.Error("it is dialled without a call")
	}
	if _, ok := x.connecting(); !ok || !end.Dialing() {
		t.Error("it is not dialled for the call, or the call does not wait for it")
	}
	for _, r := range []upstream.Reason{upstream.Unhealthy, upstream.Connecting, upstream.Ejected, upstream.Failing, upstream.Draining} {
		s.Set(r)
		if _, ok := x.connecting(); ok {
			t.Errorf("the call waits for an endpoint that is %s", s.Status().Condition)
		}
		s.Clear(r)
	}
	s.SetNotServing("a")
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

// What a client is told when nothing is usable, by how many upstreams there are.
func TestExhaustedText(t *testing.T) {
	for n, want := range map[int]string{
		1: "the only upstream is not usable: draining",
		3: "none of the 3 upstreams is usable: 3 draining",
	} {
		x := waiting(t, 7200, n)
		for _, e := range x.cur.Live() {
			e.State.Drain("")
			t.Cleanup(func() { e.State.Undrain() })
		}
		if f := x.exhausted(); f.message != want {
			t.Errorf("with %d upstreams: %q, want %q", n, f.message, want)
		}
	}
}
