package discovery

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// polled runs a poll in a bubble of fake time and notes when it looks.
type polled struct {
	asked refreshes
	start time.Time
	sink  *recorder

	mu    sync.Mutex
	times []time.Duration
}

func (p *polled) looks() []time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.times)
}

func startPoll(t *testing.T, result func(n int, r *reporter) (time.Duration, error)) *polled {
	p := &polled{asked: newRefreshes(), start: time.Now(), sink: newRecorder()}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		poll(ctx, p.sink, p.asked, func(_ context.Context, r *reporter) (time.Duration, error) {
			p.mu.Lock()
			p.times = append(p.times, time.Since(p.start))
			n := len(p.times)
			p.mu.Unlock()
			return result(n, r)
		})
	}()
	t.Cleanup(func() { cancel(); <-done })
	return p
}

// about: within what jitter allows.
func about(got, want time.Duration) bool { return got <= want && got >= want-want/10 }

func (p *polled) gap(i int) time.Duration {
	looks := p.looks()
	return looks[i] - looks[i-1]
}

func TestPollInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		list := []upstream.Endpoint{{Network: "tcp", Address: "a:1"}}
		p := startPoll(t, func(_ int, r *reporter) (time.Duration, error) {
			r.update(list)
			return 10 * time.Second, nil
		})
		time.Sleep(95 * time.Second)
		synctest.Wait()
		if n := len(p.looks()); n < 10 || n > 11 || p.looks()[0] != 0 {
			t.Errorf("looked at %v; want every 9 to 10 s from the beginning", p.looks())
		}
		for i := 1; i < len(p.looks()); i++ {
			if !about(p.gap(i), 10*time.Second) {
				t.Errorf("look %d came after %v", i, p.gap(i))
			}
		}
		if updates, errs := p.sink.count(); updates != 1 || errs != 0 {
			t.Errorf("%d updates, %d errors; a list that stays is handed on once", updates, errs)
		}
	})
}

func TestPollFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("broken")
		list := []upstream.Endpoint{{Network: "tcp", Address: "a:1"}}
		p := startPoll(t, func(n int, r *reporter) (time.Duration, error) {
			switch {
			case n == 1 || n == 10:
				r.update(list)
				return time.Second, nil
			case n == 9:
				return 3 * time.Second, broken // It knows when it makes sense to look again.
			}
			return 0, broken
		})
		time.Sleep(200 * time.Second)
		synctest.Wait()
		want := []time.Duration{1, 1, 2, 4, 8, 16, 30, 30, 3, 1, 1}
		if len(p.looks()) < len(want) {
			t.Fatalf("looked at %v", p.looks())
		}
		for i, w := range want[:len(want)-1] {
			if !about(p.gap(i+1), w*time.Second) {
				t.Errorf("look %d came after %v; want %v s", i+1, p.gap(i+1), int(w))
			}
		}
		if updates, errs := p.sink.count(); updates != 2 || errs < 9 {
			t.Errorf("%d updates, %d errors; want the same list again after the errors", updates, errs)
		}
	})
}

func TestPollRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var news atomic.Bool
		address := "a:1"
		p := startPoll(t, func(_ int, r *reporter) (time.Duration, error) {
			if news.Load() {
				address += "1"
			}
			r.update([]upstream.Endpoint{{Network: "tcp", Address: address}})
			return time.Hour, nil
		})
		ask := func() {
			for range 3 {
				p.asked.ask()
				synctest.Wait()
			}
		}
		synctest.Wait()
		ask()
		if len(p.looks()) != 1 {
			t.Fatalf("looked again at once; a second must pass")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if len(p.looks()) != 2 {
			t.Fatalf("looked %d times; want once more after a second", len(p.looks()))
		}
		// Nothing new came of it, so the next must wait for longer and longer.
		for _, hold := range []time.Duration{2, 4, 8, 16, 30, 30} {
			n := len(p.looks())
			ask()
			time.Sleep(hold*time.Second - time.Millisecond)
			synctest.Wait()
			if len(p.looks()) != n {
				t.Fatalf("looked again before %v s", int(hold))
			}
			time.Sleep(time.Millisecond)
			synctest.Wait()
			if len(p.looks()) != n+1 {
				t.Fatalf("did not look again after %v s", int(hold))
			}
		}
		// Something new does away with that.
		news.Store(true)
		time.Sleep(time.Minute)
		ask()
		n := len(p.looks())
		synctest.Wait()
		if len(p.looks()) != n {
			t.Fatal("more than one look")
		}
		ask()
		time.Sleep(time.Second)
		synctest.Wait()
		if len(p.looks()) != n+1 {
			t.Error("the wait is not short again after something new was found")
		}
		// Long after the last look, a look is made at once.
		time.Sleep(10 * time.Minute)
		n = len(p.looks())
		ask()
		if len(p.looks()) != n+1 {
			t.Error("did not look at once")
		}
	})
}

// spoiler is a sink that changes its lists.
type spoiler struct{ *recorder }

func (s spoiler) Update(list []upstream.Endpoint) {
	s.recorder.Update(list)
	for i := range list {
		list[i].Weight = 7
	}
}

// TestReporter: a list that stays is handed on once, whatever the sink does with it.
func TestReporter(t *testing.T) {
	sink := newRecorder()
	r := &reporter{sink: spoiler{sink}}
	list := func() []upstream.Endpoint {
		return []upstream.Endpoint{{Network: "tcp", Address: "a:1", Metadata: map[string]string{"k": "v"}}}
	}
	expect := func(updates, errs int) {
		t.Helper()
		if u, e := sink.count(); u != updates || e != errs {
			t.Errorf("%d updates, %d errors; want %d, %d", u, e, updates, errs)
		}
	}
	r.update(nil)
	expect(1, 0) // That there are none is news, too.
	r.update([]upstream.Endpoint{})
	expect(1, 0)
	r.update(list())
	r.update(list())
	expect(2, 0)
	r.fail(errors.New("broken"))
	r.update(list())
	expect(3, 1)
	for i, change := range []func(e *upstream.Endpoint){
		func(e *upstream.Endpoint) { e.Network = "unix" },
		func(e *upstream.Endpoint) { e.Address = "b:1" },
		func(e *upstream.Endpoint) { e.Name = "b" },
		func(e *upstream.Endpoint) { e.Weight = 7 },
		func(e *upstream.Endpoint) { e.Priority = 1 },
		func(e *upstream.Endpoint) { e.Locality.Zone = "z" },
		func(e *upstream.Endpoint) { e.Origin = "x" },
		func(e *upstream.Endpoint) { e.Metadata = map[string]string{"k": "w"} },
	} {
		l := list()
		change(&l[0])
		r.update(l)
		r.update(list())
		expect(5+2*i, 1)
	}
}
