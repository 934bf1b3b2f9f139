package cluster

import (
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// narrow are connections that take so many calls, without a line.
func narrow(t *testing.T, streams uint32) func(*upstream.Endpoint) transport.Config {
	name := own(t)
	return func(*upstream.Endpoint) transport.Config {
		return transport.Config{Identity: name, MaxConns: 1, MaxStreamsPerConn: streams, QueueSize: -1, DialTimeout: time.Hour}
	}
}

// The earliest deadlines are woken first, as many as there is room for. If none of these wants it, the others have it soon.
func TestEarliestDeadlinesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1), Transport: narrow(t, 3)})
		s := f.View().Endpoints[0].State
		s.Set(upstream.Unhealthy)
		settle()
		var (
			mu    sync.Mutex
			woken []int
		)
		since := f.Changes()
		const calls = 30
		for _, i := range rand.Perm(calls) {
			f.Wait(&Waiter{
				Due: time.Now().Add(time.Duration(i) * time.Second), Wish: Wish(1 + i%2), // Usable or Room
				Wake: func() {
					mu.Lock()
					defer mu.Unlock()
					woken = append(woken, i)
				},
			}, since)
		}
		time.Sleep(time.Second / 2)
		s.Clear(upstream.Unhealthy)
		for look, before, most := 1, 0, 3; before < calls; look++ {
			synctest.Wait()
			mu.Lock()
			n := len(woken)
			mu.Unlock()
			if n-before > most || look == 1 && n != most || look > 10 {
				t.Fatalf("look %d has woken %d calls, after %d", look, n-before, before)
			}
			before, most = n, max(most, 2*(n-before))
			time.Sleep(lookEvery)
		}
		mu.Lock()
		defer mu.Unlock()
		if !slices.IsSorted(woken) {
			t.Errorf("woken in the order %v", woken)
		}
	})
}

// parked is a call that has a place at an endpoint.
type parked struct{}

func (parked) Head() ([]h2.Field, bool, h2.Receiver) { return nil, false, nil }
func (parked) Opened(*h2.Stream)                     {}
func (parked) Refused(*transport.Error)              {}

// No more calls are woken than can be served, and others when those are done.
func TestNoMoreAreWokenThanCanBeServed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // says nothing to anybody
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f := start(t, Config{Static: []upstream.Endpoint{{Network: "tcp", Address: l.Addr().String()}}, Transport: narrow(t, 3)})
	end := f.View().Endpoints[0]
	end.State.Set(upstream.Unhealthy)
	const calls = 20
	tickets := make(chan *transport.Ticket, calls)
	since := f.Changes()
	for range calls {
		f.Wait(&Waiter{Due: time.Now().Add(time.Minute), Wish: Usable, Wake: func() {
			ticket := &transport.Ticket{Opener: parked{}, Queue: true}
			if s, err := end.Open(ticket); s != nil || err != nil {
				t.Errorf("a call that was woken gets %v, %v", s, err)
			}
			tickets <- ticket
		}}, since)
	}
	end.State.Clear(upstream.Unhealthy)
	full := func(want int) {
		t.Helper()
		for begin := time.Now(); ; time.Sleep(time.Millisecond) {
			f.waiting.mu.Lock()
			full := f.waiting.lacked && calls-f.waiting.waiters >= want
			f.waiting.mu.Unlock()
			switch {
			case full && len(tickets) == want:
				return
			case len(tickets) > want || time.Since(begin) > 20*time.Second:
				t.Fatalf("%d calls are woken, want %d", len(tickets), want)
			}
		}
	}
	full(3)
	var left []*transport.Ticket
	for range 2 {
		ticket := <-tickets
		end.Leave(ticket)
		left = append(left, ticket)
	}
	full(3)
	for _, ticket := range left {
		end.Leave(ticket) // that has no place any more
	}
	full(3)
	if n := f.waitersNow(); n != calls-5 {
		t.Errorf("%d calls wait, want %d", n, calls-5)
	}
	f.Close()
}

// However many come, and whoever does not want what there is: everybody is woken again and again.
func TestNobodyIsKeptWaiting(t *testing.T) {
	for _, tt := range []struct {
		name                 string
		stubborn, newcomers  int           // that wait again when they are woken, and that come with each change
		due, stubborns, news time.Duration // of the call, and of these
	}{
		{"newcomers that are due before", 0, 2, time.Hour, 0, time.Minute},
		{"others that are woken in vain", 20, 0, time.Hour, time.Minute, 0},
		{"both", 20, 2, time.Minute, time.Minute, time.Hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t, Config{Static: endpoints(1), Transport: narrow(t, 1)})
				settle()
				var all []*Waiter
				stay := func(due time.Duration) *atomic.Int32 {
					wakes, w := new(atomic.Int32), &Waiter{Due: time.Now().Add(due), Wish: Room}
					w.Wake = func() {
						wakes.Add(1)
						f.Wait(w, f.Changes())
					}
					all = append(all, w)
					f.Wait(w, f.Changes())
					return wakes
				}
				for range tt.stubborn {
					stay(tt.stubborns)
				}
				wakes := stay(tt.due)
				time.Sleep(100 * lookEvery) // all are woken once, in vain
				var last atomic.Int32
				for i := range 200 {
					for range tt.newcomers {
						w := &Waiter{Due: time.Now().Add(tt.news), Wish: Room, Wake: func() { last.Store(int32(i)) }}
						all = append(all, w)
						f.Wait(w, f.Changes())
					}
					f.View().Endpoints[0].State.SetNotServing(fmt.Sprint(i))
					time.Sleep(lookEvery)
					synctest.Wait()
				}
				if n := wakes.Load(); n < 3 {
					t.Errorf("woken %d times by 200 changes", n)
				}
				if tt.newcomers > 0 && last.Load() < 30 {
					t.Errorf("of the newcomers those of change %d were the last to be woken", last.Load())
				}
				for _, w := range all {
					f.Leave(w)
				}
				f.View().Endpoints[0].State.SetNotServing()
			})
		})
	}
}

// Calls that were woken in vain are woken again when there is a place, though nobody tells of those.
func TestPlacesAreLookedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1)})
		wakes, w := new(atomic.Int32), &Waiter{Due: time.Now().Add(time.Hour), Wish: Usable}
		w.Wake = func() {
			wakes.Add(1)
			f.Wait(w, f.Changes())
		}
		w.Wake()
		time.Sleep(2 * askEvery)
		synctest.Wait()
		if n := wakes.Load(); n > 3 {
			t.Errorf("woken %d times with nothing new", n)
		}
		before := wakes.Load()
		f.waiting.mu.Lock()
		f.waiting.lacked = true // as when the line is full
		f.waiting.mu.Unlock()
		time.Sleep(2 * askEvery)
		synctest.Wait()
		if wakes.Load() == before {
			t.Error("not woken for a place that is new")
		}
		f.Leave(w)
		f.Close()
		before = wakes.Load()
		f.Wait(w, f.Changes())
		time.Sleep(10 * lookAfterClose)
		synctest.Wait()
		if n := wakes.Load() - before; n < 9 || n > 11 {
			t.Errorf("after the end woken %d times in %v", n, 10*lookAfterClose)
		}
		f.Leave(w)
	})
}

// One look begins when the one before is over, and those that it has woken have had their turn.
func TestOneLookAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1)})
		settle()
		var busy atomic.Bool
		for i := range 20 {
			f.Wait(&Waiter{Due: time.Now(), Wish: Usable, Wake: func() {
				if busy.Swap(true) {
					t.Error("two are woken at a time")
				}
				time.Sleep(10 * lookEvery)
				busy.Store(false)
			}}, f.Changes())
			f.View().Endpoints[0].State.SetNotServing(fmt.Sprint(i))
			time.Sleep(lookEvery)
		}
		time.Sleep(time.Minute)
		if n := f.waitersNow(); n != 0 {
			t.Errorf("%d were not woken", n)
		}
		f.View().Endpoints[0].State.SetNotServing()
	})
}
