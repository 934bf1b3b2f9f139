package cluster

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// When the time of the last calls is over, no new ones may come, not even of clients that are bound to the endpoint, since
// nobody would end them.
func TestNoCallsAfterDrainTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t), DrainTimeout: 10 * time.Second})
		sink := <-src.sinks
		sink.Update(endpoints(1, 2))
		synctest.Wait()
		two := f.View().Endpoints[1]
		sink.Update(endpoints(1))
		settle()
		f.expect(t, "1", "2")
		time.Sleep(12 * time.Second)
		synctest.Wait()
		f.expect(t, "1", "")
		sink.Update(endpoints(1, 2))
		settle()
		f.expect(t, "1 2", "")
		if f.View().Endpoints[1] != two {
			t.Error("what was known is forgotten within a minute")
		}
		sink.Update(endpoints(1))
		settle()
		f.expect(t, "1", "2")
	})
}

// A list that changes all the time does not keep endpoints that have left from being looked at.
func TestDrainWhileListsChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t), DrainTimeout: 10 * time.Second})
		sink := <-src.sinks
		sink.Update(endpoints(1, 2, 3))
		synctest.Wait()
		two := f.View().Endpoints[1]
		two.State.Begin()
		for i := range 30 {
			sink.Update(endpoints(1, 3+i%2))
			time.Sleep(sweepEvery / 2)
		}
		synctest.Wait()
		if !slices.Equal(f.cut(), []*transport.Endpoint{two.Endpoint}) {
			t.Errorf("calls were ended on %d endpoints, want 1", len(f.cut()))
		}
		two.State.End()
	})
}

// An address that is found by another name stays the same endpoint; its calls go on.
func TestNameChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t), DrainTimeout: 10 * time.Second})
		sink := <-src.sinks
		list := endpoints(1)
		list[0].Name = "a.test"
		sink.Update(list)
		synctest.Wait()
		one := f.View().Endpoints[0]
		one.State.Begin()
		list[0].Name = "b.test"
		sink.Update(list)
		time.Sleep(2 * memoryTime)
		synctest.Wait()
		f.expect(t, "1", "")
		if f.View().Endpoints[0] != one {
			t.Fatal("it is another endpoint")
		}
		if len(f.cut()) != 0 {
			t.Error("calls on an endpoint that is in the list were ended")
		}
		one.State.End()
	})
}

// A reload does not give calls on an endpoint that has left the list more time. If the endpoint is in use again by then
// they are left alone.
func TestDrainTimeoutOverReload(t *testing.T) {
	for _, back := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			src := newScript()
			f := start(t, Config{Sources: dynamic(src, t)})
			sink := <-src.sinks
			sink.Update(endpoints(1, 2))
			synctest.Wait()
			two := f.View().Endpoints[1]
			two.State.Begin()
			defer two.State.End()
			sink.Update(endpoints(1))
			settle()
			again := newScript()
			g := start(t, Config{Sources: dynamic(again, t)})
			f.Close()
			if back {
				(<-again.sinks).Update(endpoints(1, 2))
				settle()
				g.expect(t, "1 2", "")
			}
			time.Sleep(9 * time.Minute)
			synctest.Wait()
			if len(f.cut()) != 0 {
				t.Fatal("calls were ended before their time")
			}
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			want := []*transport.Endpoint{two.Endpoint}
			if back {
				want = nil
			}
			if !slices.Equal(f.cut(), want) {
				t.Errorf("in use again %v: calls were ended on %d endpoints", back, len(f.cut()))
			}
		})
	}
}

// What calls wait for does not come any more: a call that asks again must not be told to wait for what is over.
func TestCloseWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Sources: dynamic(newScript(), t)})
		if !f.View().Pending {
			t.Error("the first list is not waited for")
		}
		told := f.await(Verdict)
		f.Close()
		<-told
		if f.View().Pending {
			t.Error("the first list is still waited for")
		}
		c, err := New(Config{Static: endpoints(1), Policy: f.cfg.Policy, Transport: f.cfg.Transport, Hold: true})
		if err != nil {
			t.Fatal(err)
		}
		told = (&fixture{Cluster: c}).await(Verdict)
		c.Close()
		<-told
		if c.View().Starting {
			t.Error("the start is still waited for")
		}
	})
}

// What the configuration says of a source's endpoints is true from the first list on, though that is from before a reload.
func TestDescribe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		of := func(s *script, weight uint32) []Source {
			list := dynamic(s, t)
			list[0].Describe = func(e *upstream.Endpoint) { e.Weight = weight }
			return list
		}
		f := start(t, Config{Sources: of(src, 3)})
		(<-src.sinks).Update(endpoints(1))
		synctest.Wait()
		if w := f.View().Snapshot.Endpoints[0].Weight; w != 3 {
			t.Errorf("weight %d, want 3", w)
		}
		g := start(t, Config{Sources: of(newScript(), 5)})
		if w := g.View().Snapshot.Endpoints[0].Weight; w != 5 {
			t.Errorf("weight %d after a reload, want 5", w)
		}
	})
}

// Whoever removes an upstream from a list is told when it can be switched off: once, when the last call on it is over.
func TestDrained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var (
			mu   sync.Mutex
			told []string
		)
		src := newScript()
		f := start(t, Config{
			Sources: dynamic(src, t), DrainTimeout: 20 * time.Second,
			Drained: func(e *upstream.Endpoint, since time.Time, why string) {
				mu.Lock()
				defer mu.Unlock()
				told = append(told, fmt.Sprintf("%s after %v: %s", strings.TrimPrefix(e.Address, "127.0.0.1:"), time.Since(since).Round(time.Second), why))
			},
		})
		expect := func(what string, wait time.Duration, want ...string) {
			t.Helper()
			time.Sleep(wait)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			slices.Sort(told)
			if !slices.Equal(told, want) {
				t.Errorf("%s: told %q, want %q", what, told, want)
			}
			told = nil
		}
		const none, ended = "it left the list of upstreams, and no call is left on it", "it left the list of upstreams, and its last calls were ended (drain_timeout)"
		sink := <-src.sinks
		sink.Update(endpoints(1, 2, 3, 4, 5))
		settle()
		ends := f.View().Endpoints
		for _, e := range ends[1:4] {
			e.State.Begin()
		}
		sink.Update(endpoints(1))
		expect("with calls on three of four", 5*time.Second, "5 after 1s: "+none)
		ends[1].State.End()
		expect("with calls on two", 5*time.Second, "2 after 5s: "+none)
		sink.Update(endpoints(1, 3))
		settle()
		ends[2].State.End()
		expect("when one has come back", time.Minute, "4 after 20s: "+ended)
		sink.Update(endpoints(1))
		expect("when it has gone again", time.Minute, "3 after 1s: "+none)
		ends[3].State.End()
		if n := f.logs.FilterMessage("upstream drained").FilterLevelExact(zap.InfoLevel).Len(); n != 2 {
			t.Errorf("%d lines about upstreams that had calls, want 2", n)
		}
	})
}

// An endpoint that is in the list by another name is not told to be drained.
func TestDrainedByName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t), Drained: func(e *upstream.Endpoint, _ time.Time, _ string) { t.Errorf("%s is drained", e.Name) }})
		sink := <-src.sinks
		list := endpoints(1)
		for _, name := range []string{"a.test", "b.test"} {
			list[0].Name = name
			sink.Update(list)
			settle()
		}
		time.Sleep(2 * memoryTime)
		synctest.Wait()
		f.expect(t, "1", "")
	})
}
