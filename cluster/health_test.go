package cluster

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func weights(v *View) []uint32 {
	var out []uint32
	for i := range v.Snapshot.Endpoints {
		out = append(out, v.Snapshot.Endpoints[i].Weight)
	}
	return out
}

// An endpoint that becomes usable gets more from second to second, until it has its share.
func TestWarmth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const window = 10 * time.Second
		list := endpoints(1, 2)
		list[0].Weight = 3
		f := start(t, Config{
			Static: list,
			Warmth: func(s *upstream.State) float64 {
				since := s.UsableSince()
				if since.IsZero() {
					return 1
				}
				return min(1, max(0.1, float64(time.Since(since))/float64(window)))
			},
		})
		if got := weights(f.View()); got[0] != 300 || got[1] != 100 {
			t.Fatalf("weights %v, want 300 and 100", got)
		}
		cold := f.View().Snapshot.Endpoints[1].State
		cold.Set(upstream.Unhealthy)
		settle()
		cold.Clear(upstream.Unhealthy)
		settle()
		last := weights(f.View())[1]
		if last != 10 {
			t.Errorf("the weight begins with %d, want 10", last)
		}
		for range 9 {
			time.Sleep(time.Second)
			synctest.Wait()
			got := weights(f.View())
			if got[0] != 300 || got[1] < last || got[1] > 100 {
				t.Fatalf("weights %v after %d", got, last)
			}
			last = got[1]
		}
		if last < 80 {
			t.Errorf("after nine of ten seconds the weight is %d", last)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := weights(f.View()); got[1] != 100 {
			t.Errorf("in the end the weight is %d, want 100", got[1])
		}
		done := f.View().Snapshot.Generation
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := f.View().Snapshot.Generation - done; n != 0 {
			t.Errorf("%d new views when all is warm", n)
		}
	})
}

// Weights that are so large that there is no room to multiply them stay in proportion, exactly: the others' do not change with
// the heaviest by a rounding.
func TestWarmthOfLargeWeights(t *testing.T) {
	for _, tt := range [][2][]uint32{
		{{655, 1}, {65_500, 100}}, {{656, 7}, {6560, 70}}, {{6553, 3}, {65_530, 30}}, {{6554, 3}, {6554, 3}}, {{upstream.MaxWeight, 1}, {upstream.MaxWeight, 1}},
	} {
		synctest.Test(t, func(t *testing.T) {
			list := endpoints(1, 2)
			list[0].Weight, list[1].Weight = tt[0][0], tt[0][1]
			f := start(t, Config{Static: list, Warmth: func(*upstream.State) float64 { return 1 }})
			if got := weights(f.View()); !slices.Equal(got, tt[1]) {
				t.Errorf("weights %v become %v, want %v", tt[0], got, tt[1])
			}
		})
	}
}

func TestPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1, 2, 3, 4), Panics: func(usable, all int) bool { return 2*usable < all }})
		state := func(i int) *upstream.State { return f.View().Snapshot.Endpoints[i].State }
		for i := range 2 {
			state(i).SetUsable(false)
		}
		state(2).SetLimit(1)
		state(2).Begin() // full is not unhealthy
		settle()
		if f.View().Panic {
			t.Error("panic with half of the endpoints healthy")
		}
		state(3).SetUsable(false)
		settle()
		if !f.View().Panic || f.warnings("panic_threshold") != 1 {
			t.Errorf("panic %v, %d warnings, with one of four healthy", f.View().Panic, f.warnings("panic_threshold"))
		}
		state(0).Drain("by hand")
		state(1).Drain("by hand")
		settle()
		if f.View().Panic {
			t.Error("those that drain count")
		}
		state(2).End()
	})
}

// A call that finds no endpoint need not wait for the next view to learn of a panic.
func TestPanicAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1, 2), Panics: func(usable, all int) bool { return 2*usable < all }})
		settle()
		before := f.View()
		state := func(i int) *upstream.State { return before.Snapshot.Endpoints[i].State }
		<-f.await(Verdict)
		if f.View() != before {
			t.Error("another view though nothing is the matter")
		}
		state(0).SetUsable(false)
		<-f.await(Verdict)
		if f.View() != before {
			t.Error("panic with half of the endpoints healthy")
		}
		state(1).SetUsable(false)
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				<-f.await(Verdict)
				if !f.View().Panic {
					t.Error("no panic with no healthy endpoint")
				}
			})
		}
		wg.Wait()
		if n := f.warnings("panic_threshold"); n != 1 || f.View().Snapshot != before.Snapshot {
			t.Errorf("%d warnings, a new picker %v", n, f.View().Snapshot != before.Snapshot)
		}
		panicking := f.View()
		<-f.await(Verdict)
		if f.View() != panicking {
			t.Error("another view in a panic")
		}
		settle()
		if !f.View().Panic || f.warnings("panic_threshold") != 1 {
			t.Errorf("the next view: panic %v, %d warnings", f.View().Panic, f.warnings("panic_threshold"))
		}
		state(0).SetUsable(true)
		settle()
		if f.View().Panic {
			t.Error("the panic goes on")
		}
		f.Close()
		state(0).SetUsable(false)
		<-f.await(Verdict)
		if f.View().Panic {
			t.Error("a panic that nobody would end")
		}
		for i := range 2 {
			state(i).SetUsable(true)
		}
	})
}

// Endpoints that have not answered yet are no reason to panic: calls wait for them.
func TestNoPanicAtTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{
			Static: endpoints(1, 2, 3), Hold: true, Panics: func(usable, all int) bool { return 2*usable < all },
			Companions: []Companion{func(e *upstream.Endpoint, _ *transport.Endpoint) func() {
				e.State.Set(upstream.Connecting)
				return func() {}
			}},
		})
		settle()
		if f.reconsider(); f.View().Panic {
			t.Error("panic before the first answer")
		}
		for i := range 2 {
			f.View().Endpoints[i].State.Change(upstream.Unhealthy, upstream.Connecting, "")
		}
		if f.reconsider(); !f.View().Panic {
			t.Error("no panic when most are known to be unhealthy")
		}
	})
}

// BenchmarkReconsider: what a look at 10,000 endpoints costs for whether there is a panic, when there is none.
func BenchmarkReconsider(b *testing.B) {
	list := make([]upstream.Endpoint, 10_000)
	for i := range list {
		list[i] = upstream.Endpoint{Network: "tcp", Address: fmt.Sprintf("127.0.0.1:%d", i+1)}
	}
	c, err := New(Config{
		Static: list, Policy: new(selection.RoundRobin), Logger: zap.NewNop(), Panics: func(usable, all int) bool { return 2*usable < all },
		Transport: func(*upstream.Endpoint) transport.Config { return transport.Config{} },
	})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	for b.Loop() {
		if c.reconsider(); c.View().Panic {
			b.Fatal("panic")
		}
	}
}

// Where one level of priority carries all calls, the health of the others is no reason to panic.
func TestNoPanicWhileALevelCarries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		list := endpoints(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
		for i := range list[4:] {
			list[4+i].Priority = 1
		}
		f := start(t, Config{
			Static: list, Policy: selection.WithPriorities(new(selection.RoundRobin)),
			Panics: func(usable, all int) bool { return 2*usable < all },
		})
		state := func(i int) *upstream.State { return f.View().Snapshot.Endpoints[i].State }
		for i := range 6 {
			state(4 + i).SetUsable(false)
		}
		state(0).SetUsable(false)
		settle()
		if f.reconsider(); f.View().Panic {
			t.Error("panic with three of four endpoints of the first level")
		}
		state(1).SetUsable(false)
		settle()
		if !f.View().Panic {
			t.Error("no panic with two of ten endpoints, all of the first level")
		}
	})
}

// Calls are held until the companions were started.
func TestHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		name := own(t)
		c, err := New(Config{
			Static: endpoints(1), Policy: new(watchful), Hold: true, Logger: start(t, Config{Static: endpoints(2)}).cfg.Logger,
			Transport: func(*upstream.Endpoint) transport.Config { return transport.Config{Identity: name} },
			Companions: []Companion{func(e *upstream.Endpoint, _ *transport.Endpoint) func() {
				e.State.Set(upstream.Connecting)
				return func() {}
			}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if !c.View().Starting {
			t.Fatal("calls are not held")
		}
		c.Start()
		if c.View().Starting || !c.View().Endpoints[0].State.Has(upstream.Connecting) {
			t.Error("calls go before the companion has begun")
		}
		c.Close()

		c, err = New(c.cfg)
		if err != nil {
			t.Fatal(err)
		}
		held := (&fixture{Cluster: c}).await(Verdict)
		c.Close() // never started: nobody is held for ever
		<-held
	})
}

// An endpoint that is new warms up from when it is looked after, though no health check tells that it has become usable: one
// that a source finds later, and one that a new configuration brings.
func TestWarmthOfNewEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const window = 10 * time.Second
		s := newScript()
		config := Config{
			Static:  endpoints(1),
			Sources: []Source{{Source: s, Name: "script", Key: own(t)}},
			Warmth: func(s *upstream.State) float64 {
				since := s.UsableSince()
				if since.IsZero() {
					return 1
				}
				return min(1, max(0.1, float64(time.Since(since))/float64(window)))
			},
			Companions: []Companion{func(e *upstream.Endpoint, _ *transport.Endpoint) func() {
				e.State.Found(time.Now())
				return func() {}
			}},
		}
		f := start(t, config)
		sink := <-s.sinks
		want := func(want ...uint32) {
			t.Helper()
			synctest.Wait()
			if got := weights(f.View()); !slices.Equal(got, want) {
				t.Errorf("weights %v, want %v", got, want)
			}
		}
		time.Sleep(20 * time.Second)
		want(100)
		sink.Update(endpoints(2))
		settle()
		want(100, 10)
		time.Sleep(5 * time.Second)
		if got := weights(f.View())[1]; got < 40 || got > 60 {
			t.Errorf("half way the weight is %d", got)
		}
		time.Sleep(10 * time.Second)
		want(100, 100)

		config.Static = endpoints(1, 3)
		next := start(t, config)
		<-s.sinks
		f = next
		want(100, 10, 100)
		time.Sleep(20 * time.Second)
		want(100, 100, 100)
	})
}
