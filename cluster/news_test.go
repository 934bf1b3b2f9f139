package cluster

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Calls that wait for a verdict are told of a good one, and of the last bad one; the bad ones before are nothing to them.
func TestNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1, 2, 3)})
		ends := f.View().Endpoints
		for _, e := range ends {
			e.State.Set(upstream.Connecting)
		}
		told := func() func() bool {
			ch := f.News()
			return func() bool {
				time.Sleep(2 * newsEvery)
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
		got = told()
		ends[2].State.SetNotServing()
		if !got() {
			t.Error("not told of services")
		}
	})
}

// A new view is news.
func TestNewsOfLists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t)})
		sink := <-src.sinks
		sink.Update(endpoints(1))
		synctest.Wait()
		f.View().Endpoints[0].State.Set(upstream.Connecting)
		ch := f.News()
		sink.Update(endpoints(1, 2))
		settle()
		if !isClosed(ch) {
			t.Error("not told of an endpoint that is usable")
		}
	})
}

// However many verdicts come at once, those who wait are woken a few times only, the first time at once.
func TestNewsInABurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ports := make([]int, 1000)
		for i := range ports {
			ports[i] = i + 1
		}
		f := start(t, Config{Static: endpoints(ports...)})
		for _, e := range f.View().Endpoints {
			e.State.Set(upstream.Connecting)
		}
		synctest.Wait()
		time.Sleep(time.Second)
		begin, woken := time.Now(), 0
		for _, e := range f.View().Endpoints {
			ch := f.News()
			e.State.Clear(upstream.Connecting)
			synctest.Wait()
			if isClosed(ch) {
				if woken++; woken == 1 && time.Since(begin) > 0 {
					t.Errorf("told of the first verdict after %v", time.Since(begin))
				}
			}
			time.Sleep(100 * time.Microsecond)
		}
		if most := int(time.Since(begin)/newsEvery) + 1; woken == 0 || woken > most {
			t.Errorf("woken %d times in %v, want at most %d", woken, time.Since(begin), most)
		}
	})
}

// What comes between the call's question for news and its look at the endpoints, and what comes after, is not missed.
func TestNoNewsIsMissed(t *testing.T) {
	f := start(t, Config{Static: endpoints(1, 2)})
	ends := f.View().Endpoints
	const waiting = 8
	for range 200 {
		for _, e := range ends {
			e.State.Set(upstream.Connecting)
		}
		var wg sync.WaitGroup
		for range waiting {
			wg.Go(func() {
				for {
					ch := f.News()
					if ends[0].State.Usable() || ends[1].State.Usable() {
						return
					}
					select {
					case <-ch:
					case <-time.After(time.Minute):
						t.Error("a verdict was missed")
						return
					}
				}
			})
		}
		for _, e := range ends {
			go e.State.Clear(upstream.Connecting)
		}
		wg.Wait()
	}
}

// Calls may outlive the cluster, which hears nothing of its endpoints then. They look for themselves, and when they are gone
// nobody does.
func TestNewsAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1)})
		f.View().Endpoints[0].State.Set(upstream.Connecting)
		before := f.News()
		f.Close()
		<-before
		for range 3 {
			begin := time.Now()
			<-f.News()
			if d := time.Since(begin); d == 0 || d > newsAfterClose {
				t.Errorf("told after %v", d)
			}
		}
		f.View().Endpoints[0].State.Clear(upstream.Connecting)
	})
}
