package proxy

import (
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// flightAt is a flight that is about to choose among the addresses.
func flightAt(t *testing.T, addrs ...string) *Flight {
	t.Helper()
	var endpoints []upstream.Endpoint
	for _, a := range addrs {
		endpoints = append(endpoints, upstream.Endpoint{Network: "tcp", Address: a, Origin: "static"})
	}
	c, err := cluster.New(cluster.Config{
		Static: endpoints, Policy: new(selection.RoundRobin), Logger: zap.NewNop(), Health: t.Name(),
		Transport: func(*upstream.Endpoint) transport.Config {
			return transport.Config{Identity: t.Name(), DialTimeout: time.Hour}
		},
		Cut: func(*transport.Endpoint) int { return 0 },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	c.Start()
	f := &Flight{p: New(Config{Cluster: c})}
	f.choice.view = c.View()
	f.Call.Service = "a"
	return f
}

// A call waits for an endpoint that is being dialled again only if that is all there is against it.
func TestWaitsForGoodEndpoints(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // It is connected to, and never answers.
	f := flightAt(t, l.Addr().String())
	end := f.choice.view.Endpoints[0]
	s := end.State
	s.Set(upstream.Backoff)
	if end.Dialing() {
		t.Error("it is dialled without a call")
	}
	if !f.mayCome() || !end.Dialing() {
		t.Error("it is not dialled for the call, or the call does not wait for it")
	}
	for _, r := range []upstream.Reason{upstream.Unhealthy, upstream.Ejected, upstream.Failing, upstream.Draining} {
		s.Set(r)
		if !f.settledAndHopeless() {
			t.Errorf("the call waits for an endpoint that is %s", s.Status().Condition)
		}
		s.Clear(r)
	}
	s.SetNotServing("a")
	if !f.settledAndHopeless() {
		t.Error("the call waits for an endpoint that does not serve its service")
	}
	f.Call.Service = "b"
	if f.settledAndHopeless() {
		t.Error("the call does not wait for an endpoint that serves its service")
	}
}

// settledAndHopeless tells whether nothing may come, when the cluster has looked at all that has changed.
func (f *Flight) settledAndHopeless() bool {
	done := make(chan struct{}, 1)
	for !f.p.cfg.Cluster.Settled() {
		w := &cluster.Waiter{Due: time.Now().Add(time.Hour), Wake: func() { done <- struct{}{} }}
		f.p.cfg.Cluster.Wait(w, 0)
		select {
		case <-done:
		case <-time.After(20 * time.Millisecond): // it has looked, and found something to wait for
			f.p.cfg.Cluster.Leave(w)
		}
	}
	return !f.mayCome()
}

// In a panic an endpoint on probation takes as many calls as others do.
func TestProbationInPanic(t *testing.T) {
	f := flightAt(t, "127.0.0.1:7140")
	s := f.choice.view.Endpoints[0].State
	s.Set(upstream.Probation)
	pick := selection.Pick{}
	if a := f.attempt(pick); a == nil || a.trial == 0 {
		t.Fatal("the first call is not the trial")
	}
	if a := f.attempt(pick); a != nil {
		t.Fatal("a second call was taken")
	}
	view := *f.choice.view
	view.Panic = true
	f.choice.view = &view
	if a := f.attempt(pick); a == nil || a.trial != 0 {
		t.Errorf("in a panic: %+v", a)
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
		var addrs []string
		for i := range n {
			addrs = append(addrs, fmt.Sprintf("127.0.0.1:%d", 7200+i))
		}
		f := flightAt(t, addrs...)
		for _, e := range f.choice.view.Live() {
			e.State.Drain("")
			t.Cleanup(func() { e.State.Undrain() })
		}
		if why := f.exhausted(); why.Message != want {
			t.Errorf("with %d upstreams: %q, want %q", n, why.Message, want)
		}
	}
}

// counting is round robin that counts how often it is asked.
type counting struct {
	selection.RoundRobin
	asked atomic.Int64
}

type countingPicker struct {
	selection.Picker
	*counting
}

func (c *counting) Build(s *upstream.Snapshot) selection.Picker {
	return countingPicker{c.RoundRobin.Build(s), c}
}

func (p countingPicker) Pick(in selection.PickInfo) (selection.Pick, bool) {
	p.asked.Add(1)
	return p.Picker.Pick(in)
}

// Calls that wait for first verdicts look for an endpoint when there is reason to, not again and again.
func TestWaitingCostsNothing(t *testing.T) {
	const calls = 100
	policy := new(counting)
	p := proxyOf(t, dead(t, 20), policy, Config{ConnectTimeout: time.Hour})
	ends := p.cfg.Cluster.View().Live()
	for _, e := range ends {
		e.State.Set(upstream.Connecting)
	}
	flights := make([]*Flight, calls)
	done := make([]<-chan struct{}, calls)
	for i := range flights {
		flights[i] = new(Flight)
		done[i] = serve(p, flights[i])
	}
	for range 1000 { // they look when they come; afterwards each change is none for them
		for _, e := range ends[1:] {
			e.State.Change(upstream.Unhealthy, upstream.Connecting, "")
			e.State.Change(upstream.Connecting, upstream.Unhealthy, "")
		}
	}
	for _, e := range ends {
		e.State.Change(upstream.Unhealthy, upstream.Connecting, "")
	}
	for i, f := range flights {
		<-done[i]
		if code := f.Call.Result.Code; code != grpcwire.Unavailable {
			t.Errorf("the call has found an upstream, though none was usable: %v", code)
		}
	}
	// Once before a call waits, once when it is told that there is nothing left to wait for.
	if n := policy.asked.Load(); n > 3*calls {
		t.Errorf("%d calls have looked for an upstream %d times", calls, n)
	}
}
