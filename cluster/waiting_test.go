package cluster

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// await has a call wait. The channel is closed when it is woken.
func (f *fixture) await(wish Wish) <-chan struct{} {
	told := make(chan struct{})
	f.Wait(&Waiter{Due: time.Now().Add(time.Minute), Wish: wish, Wake: func() { close(told) }}, f.Changes())
	return told
}

func (f *fixture) waitersNow() int {
	f.waiting.mu.Lock()
	defer f.waiting.mu.Unlock()
	return f.waiting.waiters
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Calls that wait for a verdict are told of a good one, and of the last bad one; the bad ones before are nothing to them.
func TestVerdicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1, 2, 3)})
		ends := f.View().Endpoints
		for _, e := range ends {
			e.State.Set(upstream.Connecting)
		}
		told := func() func() bool {
			ch := f.await(Verdict)
			return func() bool {
				time.Sleep(2 * lookEvery)
				synctest.Wait()
				return isClosed(ch)
			}
		}
		got := told()
		ends[0].State.Change(upstream.Unhealthy, upstream.Connecting, "")
		if got() {
			t.Error("told of a bad verdict while two are due")
		}
		ends[1].State.Clear(upstream.Connecting)
		if !got() {
			t.Error("not told of a good verdict")
		}
		got = told()
		ends[1].State.Set(upstream.Unhealthy)
		if got() {
			t.Error("told that an endpoint has become unhealthy while a verdict is due")
		}
		ends[2].State.Change(upstream.Unhealthy, upstream.Connecting, "")
		if !got() {
			t.Error("not told that no verdict is due any more")
		}
		got = told()
		ends[2].State.SetNotServing("a")
		ends[2].State.Clear(upstream.Unhealthy)
		if !got() {
			t.Error("not told that an endpoint is back")
		}
		ends[2].State.Set(upstream.Connecting)
		got = told()
		ends[2].State.SetNotServing()
		if got() {
			t.Error("told of the services of one whose verdict is due")
		}
		ends[2].State.Change(upstream.Unhealthy, upstream.Connecting, "")
		if !got() {
			t.Error("not told of the last verdict")
		}
	})
}

// A new view is news.
func TestListsAreVerdicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t)})
		sink := <-src.sinks
		sink.Update(endpoints(1))
		synctest.Wait()
		f.View().Endpoints[0].State.Set(upstream.Connecting)
		ch := f.await(Verdict)
		sink.Update(endpoints(1, 2))
		settle()
		if !isClosed(ch) {
			t.Error("not told of an endpoint that is usable")
		}
	})
}

// However many verdicts come at once, the endpoints are looked at a few times only, the first time at once.
func TestVerdictsInABurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ports := make([]int, 1000)
		for i := range ports {
			ports[i] = i + 1
		}
		f := start(t, Config{Static: endpoints(ports...)})
		for _, e := range f.View().Endpoints {
			e.State.Set(upstream.Connecting)
		}
		first := f.await(Verdict)
		time.Sleep(time.Second)
		if isClosed(first) {
			t.Fatal("told of nothing")
		}
		begin, woken := time.Now(), 0
		for _, e := range f.View().Endpoints {
			ch := f.await(Verdict)
			e.State.Clear(upstream.Connecting)
			synctest.Wait()
			if isClosed(ch) {
				if woken++; woken == 1 && time.Since(begin) > 0 {
					t.Errorf("told of the first verdict after %v", time.Since(begin))
				}
			}
			time.Sleep(100 * time.Microsecond)
		}
		if most := int(time.Since(begin)/lookEvery) + 1; woken == 0 || woken > most {
			t.Errorf("woken %d times in %v, want at most %d", woken, time.Since(begin), most)
		}
	})
}

// Calls may outlive the cluster, which hears nothing of its endpoints then. They look for themselves, and when they are gone
// nobody does.
func TestWaitingAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1)})
		f.View().Endpoints[0].State.Set(upstream.Unhealthy)
		before := f.await(Verdict)
		f.Close()
		<-before
		for range 3 {
			begin := time.Now()
			<-f.await(Verdict)
			if d := time.Since(begin); d == 0 || d > lookAfterClose {
				t.Errorf("told after %v", d)
			}
		}
		f.View().Endpoints[0].State.Clear(upstream.Unhealthy)
	})
}

// What cannot serve calls is nothing to hope for: endpoints that fail a health check and cannot be reached besides, those that
// have left the list, and in a panic those that cannot be reached.
func TestNothingToHopeFor(t *testing.T) {
	backoff := func(e Endpoint) { e.State.Set(upstream.Backoff) }
	for _, tt := range []struct {
		name   string
		panics bool
		set    func(f *fixture)
		told   [wishes]bool
	}{
		{"one that is not healthy either is being dialled", false, func(f *fixture) {
			ends := f.View().Endpoints
			ends[0].State.Set(upstream.Unhealthy)
			ends[1].State.Set(upstream.Unhealthy | upstream.Backoff) // and no dial has failed: it may be under way
		}, [wishes]bool{Verdict: true}},
		{"one that was drained by hand has shown nothing yet", false, func(f *fixture) {
			ends := f.View().Endpoints
			ends[0].State.Set(upstream.Unhealthy)
			ends[1].State.Set(upstream.Draining | upstream.Connecting)
		}, [wishes]bool{Verdict: true}},
		{"one that is at its limit", false, func(f *fixture) {
			ends := f.View().Endpoints
			ends[0].State.Set(upstream.Unhealthy)
			ends[1].State.SetLimit(1)
			ends[1].State.Begin()
		}, [wishes]bool{Verdict: true}},
		{"none is reached, in a panic", true, func(f *fixture) {
			for _, e := range f.View().Endpoints {
				backoff(e)
			}
		}, [wishes]bool{}},
		{"one is reached, in a panic", true, func(f *fixture) {
			backoff(f.View().Endpoints[0])
			f.View().Endpoints[1].State.Set(upstream.Unhealthy)
		}, [wishes]bool{true, true, true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := Config{Static: endpoints(1, 2)}
				if tt.panics {
					cfg.Panics = func(usable, all int) bool { return usable < all }
				}
				f := start(t, cfg)
				tt.set(f)
				settle()
				if f.View().Panic != tt.panics {
					t.Fatalf("panic: %v", f.View().Panic)
				}
				f.waiting.mu.Lock()
				f.waiting.asked = time.Now() // nobody is dialled
				f.waiting.mu.Unlock()
				var told [wishes]<-chan struct{}
				for wish := range told {
					told[wish] = f.await(Wish(wish))
				}
				f.stir()
				time.Sleep(askEvery / 2)
				synctest.Wait()
				for wish := range told {
					if isClosed(told[wish]) != tt.told[wish] {
						t.Errorf("wish %d: woken %v", wish, isClosed(told[wish]))
					}
				}
				f.View().Endpoints[1].State.SetLimit(0)
			})
		})
	}
}

// An endpoint that has left the list may still have calls, but nobody is sent there.
func TestNoHopeOfThoseThatDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t)})
		sink := <-src.sinks
		sink.Update(endpoints(1, 2))
		settle()
		f.View().Endpoints[1].State.Set(upstream.Unhealthy)
		sink.Update(endpoints(2))
		settle()
		f.expect(t, "2", "1")
		if told := f.await(Usable); isClosed(told) {
			t.Error("woken at once")
		} else if <-f.await(Verdict); isClosed(told) {
			t.Error("woken though the only upstream is unhealthy")
		}
		f.Close()
		time.Sleep(2 * memoryTime) // the next run of the test must not find anything
	})
}

// Calls that come before the configuration is in force are held, and not woken for endpoints of which nothing is known.
func TestHeldCallsAreLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		like := start(t, Config{Static: endpoints(2)})
		cfg := like.cfg
		cfg.Static, cfg.Hold = endpoints(1), true
		c, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		held := (&fixture{Cluster: c}).await(Verdict)
		time.Sleep(time.Second)
		synctest.Wait()
		if isClosed(held) {
			t.Error("woken before the start")
		}
		c.Start()
		<-held
	})
}

// A server may take calls before the configuration is in force for those who start it.
func TestWaitingBeforeTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told atomic.Int32
		cfg := start(t, Config{Static: endpoints(2)}).cfg
		cfg.Static, cfg.Changed = endpoints(1), func() { told.Add(1) }
		c, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		f := &fixture{Cluster: c}
		s := f.View().Endpoints[0].State
		s.Set(upstream.Connecting)
		<-time.After(time.Second)
		before := told.Load()
		verdict, usable := f.await(Verdict), f.await(Usable)
		time.Sleep(2 * lookEvery)
		synctest.Wait()
		s.Change(upstream.Unhealthy, upstream.Connecting, "")
		time.Sleep(2 * lookEvery)
		synctest.Wait()
		if !isClosed(verdict) {
			t.Error("not told of the verdict")
		}
		s.Clear(upstream.Unhealthy)
		time.Sleep(2 * lookEvery)
		synctest.Wait()
		if !isClosed(usable) {
			t.Error("not told of an endpoint that is usable")
		}
		if n := told.Load() - before; n != 0 {
			t.Errorf("others are told %d times of a configuration that is not in force", n)
		}
	})
}

// An endpoint that is at its limit, or on trial, is usable again when a call there is over.
func TestWaitingForACallToEnd(t *testing.T) {
	for name, tt := range map[string]struct{ begin, end func(*upstream.State) }{
		"at its limit": {
			func(s *upstream.State) { s.SetLimit(1); s.Begin() },
			func(s *upstream.State) { s.End() },
		},
		"at a limit that is raised": {
			func(s *upstream.State) { s.SetLimit(1); s.Begin() },
			func(s *upstream.State) { s.SetLimit(2); s.End() },
		},
		"on trial": {
			func(s *upstream.State) { s.Set(upstream.Probation); s.TryBegin() },
			func(s *upstream.State) { trial, _ := s.Trial(); s.EndTrial(trial); s.End() },
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t, Config{Static: endpoints(1)})
				s := f.View().Endpoints[0].State
				tt.begin(s)
				told := f.await(Usable)
				time.Sleep(askEvery / 4)
				synctest.Wait()
				if isClosed(told) {
					t.Fatal("woken in vain")
				}
				tt.end(s)
				time.Sleep(2 * lookEvery)
				synctest.Wait()
				if !isClosed(told) {
					t.Error("not woken")
				}
				s.SetLimit(0)
				s.Clear(upstream.Probation)
			})
		})
	}
}

// A call may leave at any time: before a look, when it is chosen already, when it was woken, and when it has never waited.
func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1)})
		settle()
		var ws [4]*Waiter
		wakes := make([]int, len(ws))
		for i := range ws {
			ws[i] = &Waiter{Due: time.Now().Add(time.Duration(1+i) * time.Second), Wish: Usable, Wake: func() { wakes[i]++ }}
		}
		wake := ws[0].Wake
		ws[0].Wake = func() { // the others are chosen
			wake()
			f.Leave(ws[1])
			f.Leave(ws[2])
			f.Wait(ws[2], f.Changes())
		}
		f.Leave(ws[0])
		for _, w := range ws {
			f.Wait(w, f.Changes())
		}
		f.Leave(ws[3])
		f.Leave(ws[3])
		f.View().Endpoints[0].State.SetNotServing("a")
		time.Sleep(3 * askEvery)
		synctest.Wait()
		f.View().Endpoints[0].State.SetNotServing()
		time.Sleep(3 * askEvery)
		synctest.Wait()
		for _, w := range ws {
			f.Leave(w)
		}
		if want := []int{1, 1, 2, 0}; !slices.Equal(wakes, want) {
			t.Errorf("woken %v times, want %v", wakes, want)
		}
		if n := f.waitersNow(); n != 0 {
			t.Errorf("%d wait", n)
		}
	})
}

// Whatever changes at whatever moment, nobody sleeps while something is usable.
func TestNothingIsMissed(t *testing.T) {
	for _, closes := range []bool{false, true} {
		t.Run(fmt.Sprint("closes ", closes), func(t *testing.T) {
			rounds := 60
			if closes {
				rounds = 10
			}
			for range rounds {
				f := start(t, Config{Static: endpoints(1, 2, 3)})
				ends := f.View().Endpoints
				usable := func() bool {
					return slices.ContainsFunc(ends, func(e Endpoint) bool { return e.State.Usable() })
				}
				for _, e := range ends {
					e.State.Set(upstream.Connecting)
				}
				var calls, changers sync.WaitGroup
				for i := range 16 {
					calls.Go(func() {
						told := make(chan struct{}, 10)
						w := &Waiter{Due: time.Now().Add(time.Duration(rand.N(100)) * time.Second), Wake: func() { told <- struct{}{} }}
						for {
							since := f.Changes()
							if usable() {
								return
							}
							w.Wish = Wish((i + rand.N(2)) % wishes)
							f.Wait(w, since)
							if rand.N(3) == 0 { // as by a timer
								f.Leave(w)
								continue
							}
							select {
							case <-told:
							case <-time.After(time.Minute):
								t.Error("a change was missed")
								return
							}
							f.Leave(w) // it was woken late, perhaps
						}
					})
				}
				for _, e := range ends {
					changers.Go(func() {
						for range 20 {
							e.State.Change(upstream.Unhealthy, upstream.Connecting, "")
							e.State.Change(upstream.Connecting, upstream.Unhealthy, "")
						}
					})
				}
				if closes {
					changers.Go(f.Close)
				}
				changers.Wait()
				ends[rand.N(len(ends))].State.Clear(upstream.Connecting)
				calls.Wait()
				for _, e := range ends {
					e.State.Clear(upstream.Connecting)
				}
				if n := f.waitersNow(); n != 0 {
					t.Errorf("%d wait", n)
				}
				f.Close()
			}
		})
	}
}
