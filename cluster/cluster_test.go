package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddygrpc/caddy-grpc-proxy/discovery"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// script is a source that a test speaks for.
type script struct {
	sinks   chan discovery.Sink
	refresh chan struct{}
}

func newScript() *script {
	return &script{make(chan discovery.Sink, 4), make(chan struct{}, 100)}
}

func (s *script) Watch(ctx context.Context, sink discovery.Sink) {
	s.sinks <- sink
	<-ctx.Done()
}

func (s *script) Refresh() { s.refresh <- struct{}{} }

// endpoints makes a list of ports.
func endpoints(ports ...int) []upstream.Endpoint {
	out := make([]upstream.Endpoint, 0, len(ports))
	for _, p := range ports {
		out = append(out, upstream.Endpoint{Network: "tcp", Address: fmt.Sprintf("127.0.0.1:%d", p), Weight: 1})
	}
	return out
}

// runs tells the runs of tests apart.
var runs = struct {
	sync.Mutex
	of   map[*testing.T]int
	last int
}{of: make(map[*testing.T]int)}

// own is a name that this run of a test alone has: what an earlier one has left in the process's pools is not for its bubble.
func own(t *testing.T) string {
	runs.Lock()
	defer runs.Unlock()
	if runs.of[t] == 0 {
		runs.last++
		runs.of[t] = runs.last
		t.Cleanup(func() {
			runs.Lock()
			defer runs.Unlock()
			delete(runs.of, t)
		})
	}
	return fmt.Sprintf("%s, run %d", t.Name(), runs.of[t])
}

// fixture is a cluster whose endpoints belong to one run of a test: its name is part of their key.
type fixture struct {
	*Cluster
	logs *observer.ObservedLogs
	mu   sync.Mutex
	ends []*transport.Endpoint
}

// cut are the endpoints whose calls were ended.
func (f *fixture) cut() []*transport.Endpoint {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.ends)
}

// endCalls ends the calls that a test has left on the addresses of endpoints: they are counted by address, which tests share.
func endCalls() {
	for p := range 100 {
		s := upstream.NewState(upstream.LoadOf(upstream.Address{Network: "tcp", Dial: fmt.Sprintf("127.0.0.1:%d", p)}))
		for s.Active() > 0 {
			s.End()
		}
	}
}

func start(t *testing.T, cfg Config) *fixture {
	t.Helper()
	t.Cleanup(endCalls)
	f := &fixture{}
	core, logs := observer.New(zap.DebugLevel)
	f.logs = logs
	cfg.Logger = zap.New(core)
	if cfg.Policy == nil {
		cfg.Policy = new(selection.RoundRobin)
	}
	if cfg.Transport == nil {
		name := own(t)
		cfg.Transport = func(*upstream.Endpoint) transport.Config { return transport.Config{Identity: name} }
	}
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = 10 * time.Minute
	}
	cfg.Cut = func(e *transport.Endpoint) int {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.ends = append(f.ends, e)
		return 1
	}
	var err error
	if f.Cluster, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	f.Start()
	return f
}

func addresses(list []upstream.Endpoint) string {
	var out []string
	for _, e := range list {
		out = append(out, strings.TrimPrefix(e.Address, "127.0.0.1:"))
	}
	return strings.Join(out, " ")
}

// expect compares the view with the ports of live and draining endpoints.
func (f *fixture) expect(t *testing.T, live, draining string) {
	t.Helper()
	v := f.View()
	if got := addresses(v.Snapshot.Endpoints); got != live {
		t.Errorf("live are %q, want %q", got, live)
	}
	if got := addresses(v.Snapshot.Draining); got != draining {
		t.Errorf("draining are %q, want %q", got, draining)
	}
	for i, e := range slices.Concat(v.Snapshot.Endpoints, v.Snapshot.Draining) {
		if e.Index != i || e.State == nil || v.Endpoints[i].State != e.State || v.Endpoints[i].Address() != e.Address {
			t.Errorf("endpoint %d is %+v, its connections are those of %s", i, e, v.Endpoints[i].Address())
		}
	}
}

func (f *fixture) warnings(text string) int {
	return f.logs.FilterLevelExact(zap.WarnLevel).FilterMessageSnippet(text).Len()
}

// settle lets debounced changes come into force.
func settle() {
	time.Sleep(2 * debounce)
	synctest.Wait()
}

func dynamic(s discovery.Source, t *testing.T) []Source {
	return []Source{{Source: s, Name: "script", Key: own(t), Preferred: true}}
}

func TestStatic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Static: endpoints(1, 2, 3)})
		f.expect(t, "1 2 3", "")
		if f.View().Pending {
			t.Error("something is pending")
		}
	})
}

// Calls wait for the first list, which is there at once; the static endpoints are for the time before.
func TestFirstList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Static: endpoints(9), Sources: dynamic(src, t)})
		f.expect(t, "9", "")
		if !f.View().Pending {
			t.Fatal("nothing is pending before the first list")
		}
		sink := <-src.sinks
		before := time.Now()
		sink.Update(endpoints(1, 2))
		synctest.Wait()
		if d := time.Since(before); d > 0 {
			t.Errorf("the first list took %v", d)
		}
		f.expect(t, "1 2", "9")
		if f.View().Pending {
			t.Error("something is still pending")
		}
	})
}

// A source that cannot say anything at first: static endpoints serve, or calls are told why there are none.
func TestFirstFailure(t *testing.T) {
	for _, static := range [][]upstream.Endpoint{nil, endpoints(9)} {
		synctest.Test(t, func(t *testing.T) {
			src := newScript()
			f := start(t, Config{Static: static, Sources: dynamic(src, t)})
			sink := <-src.sinks
			told := f.await(Verdict)
			synctest.Wait()
			if isClosed(told) != (static != nil) {
				t.Errorf("with %d endpoints woken before the source has said anything: %v", len(static), isClosed(told))
			}
			sink.Fail(errors.New("no such host"))
			<-told
			synctest.Wait()
			v := f.View()
			if v.Err == nil || v.Err.Error() != "script: no such host" || len(v.Endpoints) != len(static) || v.Pending {
				t.Errorf("err %v, %d endpoints, pending %v", v.Err, len(v.Endpoints), v.Pending)
			}
			for range 3 {
				sink.Fail(errors.New("no such host"))
			}
			if n := f.warnings("no upstreams found"); n != 1 {
				t.Errorf("%d warnings of the same", n)
			}
			sink.Update(endpoints(1))
			settle()
			if f.View().Err != nil || addresses(f.View().Snapshot.Endpoints) != "1" {
				t.Errorf("after recovery: %+v", f.View())
			}
		})
	}
}

// The last good list stays in force, whatever the source says.
func TestLastListStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t)})
		sink := <-src.sinks
		sink.Update(endpoints(1, 2))
		synctest.Wait()
		sink.Update(nil)
		settle()
		f.expect(t, "1 2", "")
		if n := f.warnings("the last one stays in force"); n != 1 {
			t.Errorf("%d warnings", n)
		}
		sink.Fail(errors.New("timeout"))
		settle()
		f.expect(t, "1 2", "")
		if f.View().Err != nil {
			t.Errorf("calls are told %v while there are endpoints", f.View().Err)
		}
	})
}

// Many changes in a row are one; the same list again is none.
func TestDebounce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t)})
		sink := <-src.sinks
		sink.Update(endpoints(1))
		synctest.Wait()
		before := f.View().Snapshot.Generation
		for i := range 20 {
			sink.Update(endpoints(1, 2+i))
		}
		f.expect(t, "1", "")
		settle()
		f.expect(t, "1 21", "")
		if n := f.View().Snapshot.Generation - before; n != 1 {
			t.Errorf("%d new views of 20 changes", n)
		}
		list := f.logs.FilterMessage("upstreams have changed").Len()
		sink.Update(endpoints(1, 21))
		settle()
		if n := f.logs.FilterMessage("upstreams have changed").Len(); n != list {
			t.Error("the same list is logged as a change")
		}
	})
}

// A removed endpoint drains: it stays until its calls are over, and is forgotten a minute later at the earliest; its
// return finds everything as it was.
func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t)})
		sink := <-src.sinks
		sink.Update(endpoints(1, 2))
		synctest.Wait()
		two := f.View().Snapshot.Endpoints[1].State
		two.Begin()
		two.SetUsable(false)
		sink.Update(endpoints(1))
		settle()
		f.expect(t, "1", "2")

		time.Sleep(memoryTime / 2)
		sink.Update(endpoints(1, 2))
		settle()
		f.expect(t, "1 2", "")
		if got := f.View().Snapshot.Endpoints[1].State; got != two || got.Usable() || got.Active() != 1 {
			t.Errorf("what was known is forgotten: %p %p, usable %v, active %d", got, two, got.Usable(), got.Active())
		}

		sink.Update(endpoints(1))
		time.Sleep(5 * time.Minute)
		f.expect(t, "1", "2") // a call is still there
		two.End()
		time.Sleep(3 * time.Second)
		synctest.Wait()
		f.expect(t, "1", "")
		if len(f.cut()) != 0 {
			t.Errorf("%d endpoints' calls were ended", len(f.cut()))
		}
		sink.Update(endpoints(1, 2))
		settle()
		if f.View().Snapshot.Endpoints[1].State == two {
			t.Error("it was never let go")
		}
	})
}

func TestDrainTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t), DrainTimeout: 20 * time.Second})
		sink := <-src.sinks
		sink.Update(endpoints(1, 2))
		synctest.Wait()
		two := f.View().Endpoints[1]
		two.State.Begin()
		sink.Update(endpoints(1))
		time.Sleep(15 * time.Second)
		synctest.Wait()
		if len(f.cut()) != 0 {
			t.Fatal("calls were ended before their time")
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if !slices.Equal(f.cut(), []*transport.Endpoint{two.Endpoint}) {
			t.Fatalf("calls were ended on %v, want once on %s", f.cut(), two.Address())
		}
		two.State.End()
		time.Sleep(2 * memoryTime)
		synctest.Wait()
		f.expect(t, "1", "")
		if len(f.cut()) != 1 {
			t.Error("calls were ended twice")
		}
	})
}

// A later cluster of the same source begins with the last list, and with the same endpoints.
func TestReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t)})
		sink := <-src.sinks
		sink.Update(endpoints(1, 2, 3))
		synctest.Wait()
		sink.Update(endpoints(1, 2))
		settle()
		one := f.View().Endpoints[0]
		three := f.View().Endpoints[2]

		again := newScript()
		g := start(t, Config{Sources: dynamic(again, t)})
		g.expect(t, "1 2", "")
		if g.View().Endpoints[0] != one || g.View().Pending {
			t.Error("the new configuration does not begin with what was known")
		}
		f.Close()
		sink.Update(endpoints(7)) // the old source's last words
		time.Sleep(memoryTime / 2)
		f.expect(t, "1 2", "3")
		sink = <-again.sinks
		sink.Update(endpoints(1, 2, 3))
		settle()
		if g.View().Endpoints[2] != three {
			t.Error("an endpoint that came back within a minute, over a reload, is another one")
		}
	})
}

func TestDuplicates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t)})
		sink := <-src.sinks
		var list []upstream.Endpoint
		for range 1000 {
			list = append(list, endpoints(1)...)
		}
		list = append(list, endpoints(2)...)
		sink.Update(list)
		synctest.Wait()
		f.expect(t, "1 2", "")
		if w := f.View().Snapshot.Endpoints[0].Weight; w != 1000 {
			t.Errorf("weight %d, want the sum", w)
		}
		if n := f.warnings("listed more than once"); n != 1 {
			t.Errorf("%d warnings", n)
		}
		for i := range list {
			list[i].Weight = upstream.MaxWeight
		}
		sink.Update(list)
		settle()
		if w := f.View().Snapshot.Endpoints[0].Weight; w != upstream.MaxWeight {
			t.Errorf("weight %d, want the largest", w)
		}
		if n := f.warnings("listed more than once"); n != 1 {
			t.Errorf("%d warnings of the same duplicates", n)
		}
	})
}

// A lost connection or a failed dial makes the source look again.
func TestRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t)})
		sink := <-src.sinks
		sink.Update(endpoints(1))
		synctest.Wait()
		state := f.View().Snapshot.Endpoints[0].State
		for _, lose := range []func(){
			func() { state.SetConnected(time.Now()); state.SetConnected(time.Time{}) },
			func() { state.Set(upstream.Backoff) },
		} {
			lose()
			select {
			case <-src.refresh:
			default:
				t.Error("the source was not asked to look again")
			}
		}
	})
}

// watchful is a policy that is built anew when health changes.
type watchful struct {
	selection.RoundRobin
	mu     sync.Mutex
	builds int
}

func (w *watchful) Build(s *upstream.Snapshot) selection.Picker {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.builds++
	return w.RoundRobin.Build(s)
}

func (w *watchful) WatchesHealth() bool { return true }

func TestHealthRebuilds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := new(watchful)
		f := start(t, Config{Static: endpoints(1, 2), Policy: p})
		for i := range 10 {
			f.View().Snapshot.Endpoints[0].State.SetUsable(i%2 == 1)
		}
		settle()
		if p.builds != 2 {
			t.Errorf("built %d times, want 2", p.builds)
		}
	})
}

// noisy panics, as a module of somebody's might.
type noisy struct{ times int }

func (n *noisy) Watch(ctx context.Context, sink discovery.Sink) {
	if n.times++; n.times == 1 {
		panic("oops")
	}
	sink.Update(endpoints(5))
	<-ctx.Done()
}

func TestSourcePanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, Config{Sources: dynamic(new(noisy), t)})
		synctest.Wait()
		if v := f.View(); v.Err == nil || !strings.Contains(v.Err.Error(), "panic: oops") {
			t.Errorf("calls are told %v", v.Err)
		}
		time.Sleep(2 * restartAfter)
		f.expect(t, "5", "")
	})
}

// Companions come and go with their endpoints.
func TestCompanions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		running := map[string]int{}
		count := func(addr string, n int) int {
			mu.Lock()
			defer mu.Unlock()
			running[addr] += n
			return running[addr]
		}
		src := newScript()
		f := start(t, Config{
			Static: endpoints(9), Sources: dynamic(src, t),
			Companions: []Companion{func(e *upstream.Endpoint, end *transport.Endpoint) func() {
				if e.State == nil || end.Address() != e.Address {
					t.Errorf("%+v is looked after with the connections of %s", e, end.Address())
				}
				count(e.Address, 1)
				return func() { count(e.Address, -1) }
			}},
		})
		sink := <-src.sinks
		sink.Update(endpoints(1, 2))
		synctest.Wait()
		sink.Update(endpoints(2))
		time.Sleep(2 * memoryTime)
		synctest.Wait()
		for addr, want := range map[string]int{"127.0.0.1:1": 0, "127.0.0.1:2": 1, "127.0.0.1:9": 0} {
			if got := count(addr, 0); got != want {
				t.Errorf("%s: %d companions, want %d", addr, got, want)
			}
		}
		f.Close()
		if count("127.0.0.1:2", 0) != 0 {
			t.Error("a companion outlives the cluster")
		}
	})
}

// The log counts upstreams that come back like others that come.
func TestChangesAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t)})
		sink := <-src.sinks
		for i, tt := range []struct {
			ports                     []int
			upstreams, added, removed int64
		}{
			{[]int{1, 2, 3}, 3, 3, 0},
			{[]int{1}, 1, 0, 2},
			{[]int{1, 2, 3}, 3, 2, 0},
			{[]int{3, 4}, 2, 1, 2},
		} {
			sink.Update(endpoints(tt.ports...))
			settle()
			lines := f.logs.FilterMessage("upstreams have changed").All()
			if len(lines) != i+1 {
				t.Fatalf("%v: %d lines", tt.ports, len(lines))
			}
			got := lines[i].ContextMap()
			if got["upstreams"] != tt.upstreams || got["added"] != tt.added || got["removed"] != tt.removed {
				t.Errorf("%v: %v", tt.ports, got)
			}
		}
	})
}

// BenchmarkUpdate: 1 % of 10,000 endpoints are replaced by others.
func BenchmarkUpdate(b *testing.B) {
	for name, p := range map[string]selection.Policy{"round_robin": new(selection.RoundRobin), "least_request": new(selection.LeastRequest)} {
		b.Run(name, func(b *testing.B) {
			const n = 10_000
			list := func(round int) []upstream.Endpoint {
				out := make([]upstream.Endpoint, n)
				for i := range out {
					port := i
					if i%100 == 0 {
						port += 10_000 * (1 + round%5)
					}
					out[i] = upstream.Endpoint{Network: "tcp", Address: fmt.Sprintf("127.0.0.1:%d", 1+port), Weight: 1}
				}
				return out
			}
			c, err := New(Config{
				Static: list(0), Policy: p, Logger: zap.NewNop(), DrainTimeout: time.Minute,
				Transport: func(*upstream.Endpoint) transport.Config { return transport.Config{} },
				Cut:       func(*transport.Endpoint) int { return 0 },
			})
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			round := 0
			for b.Loop() {
				b.StopTimer()
				round++
				c.cfg.Static = list(round)
				b.StartTimer()
				c.mu.Lock()
				if err := c.listLocked(); err != nil {
					b.Fatal(err)
				}
				c.publishLocked()
				c.mu.Unlock()
			}
		})
	}
}
