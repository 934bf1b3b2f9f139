package healthcheck

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// steady makes checks whose times are exact: every second, no jitter.
func steady(a *Active) *Active {
	a.Jitter = -1
	defaultTo(&a.Interval, testSecond)
	defaultTo(&a.FastInterval, a.Interval)
	return a
}

// after waits in the bubble and lets everything that became due happen.
func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestThresholds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := new(script)
		p.say(Serving, "")
		info, end := endpoint(t, "127.0.0.1:1")
		s := end.State
		defer active(t, steady(&Active{Passes: 2, Fails: 3}), p).Attend(info, end.Endpoint)()
		synctest.Wait()
		if s.Usable() {
			t.Error("usable before the first answer")
		}
		after(spread)
		if !s.Usable() {
			t.Fatal("the first good answer does not decide")
		}
		steps := []struct {
			answer Answer
			usable bool
		}{
			{NoAnswer, true},
			{NoAnswer, true},
			{Serving, true}, // a good answer in between
			{NoAnswer, true},
			{NotServing, true},
			{NoAnswer, false},
			{Undecided, false},
			{Serving, false},
			{NoAnswer, false},
			{Serving, false},
			{Undecided, false},
			{Serving, true},
			{Serving, true},
		}
		for i, st := range steps {
			p.say(st.answer, "because")
			after(time.Second)
			if s.Usable() != st.usable {
				t.Errorf("step %d (%v): usable %v", i, st.answer, s.Usable())
			}
		}
	})
}

func TestFirstAnswerDecides(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := new(script)
		p.say(NoAnswer, "nobody there")
		info, end := endpoint(t, "127.0.0.1:1")
		defer active(t, steady(&Active{Fails: 3}), p).Attend(info, end.Endpoint)()
		after(spread)
		if st := end.State.Status(); st.Condition != upstream.ConditionUnhealthy || st.Text != "nobody there" {
			t.Errorf("after a bad first answer: %+v", st)
		}
		since := end.State.Status().Since
		p.say(NotServing, "not now")
		after(time.Second)
		if st := end.State.Status(); st.Text != "not now" || !st.Since.Equal(since) {
			t.Errorf("after another bad answer: %+v, want the new reason and the old time", st)
		}
	})
}

func TestInitialHealthy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := new(script)
		p.say(NoAnswer, "nobody there")
		info, end := endpoint(t, "127.0.0.1:1")
		s := end.State
		defer active(t, steady(&Active{Fails: 2, Initial: InitialHealthy}), p).Attend(info, end.Endpoint)()
		if !s.Usable() {
			t.Error("not usable at first")
		}
		after(spread)
		if !s.Usable() {
			t.Error("one bad answer of two decides")
		}
		after(time.Second)
		if s.Usable() {
			t.Error("two bad answers of two do not decide")
		}
	})
}

// A probe that takes longer than the timeout is over then, and the next comes an interval later.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &script{hang: true}
		info, end := endpoint(t, "127.0.0.1:1")
		begin := time.Now()
		defer active(t, steady(&Active{Interval: 10 * testSecond}), p).Attend(info, end.Endpoint)()
		after(spread + DefaultTimeout)
		if !end.State.Has(upstream.Unhealthy) {
			t.Error("not unhealthy after the timeout")
		}
		after(20 * time.Second)
		if n := len(p.asked()); n != 2 {
			t.Errorf("asked %d times in %v", n, time.Since(begin))
		}
	})
}

func TestIntervals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := new(script)
		p.say(Serving, "")
		info, end := endpoint(t, "127.0.0.1:1")
		a := steady(&Active{
			Interval: 10 * testSecond, FastInterval: testSecond, UnhealthyInterval: 20 * testSecond,
			UnhealthyEdgeInterval: 3 * testSecond, HealthyEdgeInterval: 4 * testSecond, NoTrafficInterval: 60 * testSecond,
			Fails: 2, Passes: 2,
		})
		defer active(t, a, p).Attend(info, end.Endpoint)()
		var want []time.Duration
		next := func(d time.Duration, answer Answer) {
			t.Helper()
			want = append(want, d)
			p.say(answer, "")
			after(d)
			if got := p.asked(); len(got) != len(want)+1 {
				t.Fatalf("after %v: asked %d times", want, len(got))
			}
		}
		after(spread)
		end.State.Begin()              // there is traffic
		next(4*time.Second, Serving)   // it has just become healthy
		next(10*time.Second, NoAnswer) // steady
		next(time.Second, NoAnswer)    // to be confirmed
		next(3*time.Second, NoAnswer)  // it has just become unhealthy
		next(20*time.Second, Serving)  // steady
		next(time.Second, Serving)     // to be confirmed
		next(4*time.Second, Serving)   // it has just become healthy
		end.State.End()
		next(10*time.Second, Serving) // a call ran until now
		next(60*time.Second, Serving) // none any more
		var got []time.Duration
		asked := p.asked()
		for i := 1; i < len(asked); i++ {
			got = append(got, asked[i].Sub(asked[i-1]))
		}
		if !slices.Equal(got, want) {
			t.Errorf("intervals %v, want %v", got, want)
		}
	})
}

// Handlers with the same settings share the checks; they end with the last of them. Who came last asks:
// the others' configuration may have been unloaded.
func TestShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, other := new(script), new(script)
		p.say(Serving, "")
		other.say(Serving, "")
		info, end := endpoint(t, "127.0.0.1:1")
		first := active(t, steady(new(Active)), p).Attend(info, end.Endpoint)
		second := active(t, steady(new(Active)), other).Attend(info, end.Endpoint)
		after(10*time.Second + spread)
		if n, m := len(p.asked()), len(other.asked()); n != 0 || m != 11 {
			t.Errorf("asked %d and %d times in 10 s", n, m)
		}
		first()
		after(10 * time.Second)
		if n := len(other.asked()); n != 21 {
			t.Errorf("asked %d times in 20 s, the first handler gone", n)
		}
		second()
		after(10 * time.Second)
		if n := len(other.asked()); n != 21 {
			t.Errorf("asked %d times though both have gone", n)
		}
		if !end.State.Usable() {
			t.Error("not usable without checks")
		}
	})
}

// A reload, with the same settings or others, remembers what was found and when to ask again.
func TestReload(t *testing.T) {
	for _, interval := range []time.Duration{time.Minute, 90 * time.Second} {
		t.Run(interval.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := new(script)
				p.say(NotServing, "no")
				info, end := endpoint(t, "127.0.0.1:1")
				stop := active(t, steady(&Active{Interval: caddy.Duration(time.Minute)}), p).Attend(info, end.Endpoint)
				after(spread)
				if !end.State.Has(upstream.Unhealthy) {
					t.Fatal("not unhealthy")
				}
				after(50 * time.Second)
				// Even one that leaves a gap.
				stop()
				if !end.State.Usable() {
					t.Error("nobody checks, but it is unhealthy")
				}
				defer active(t, steady(&Active{Interval: caddy.Duration(interval)}), p).Attend(info, end.Endpoint)()
				if st := end.State.Status(); st.Condition != upstream.ConditionUnhealthy || st.Text != "no" {
					t.Errorf("after a reload: %+v", st)
				}
				after(5 * time.Second)
				if n := len(p.asked()); n != 1 {
					t.Errorf("asked %d times, before its time", n)
				}
				after(5 * time.Second)
				if n := len(p.asked()); n != 2 {
					t.Errorf("asked %d times a minute after the first", n)
				}
			})
		})
	}
}

// Different questions are asked side by side, and the endpoint is usable if all answers are good.
func TestTwoQuestions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, q := new(script), new(script)
		p.say(Serving, "")
		q.say(NotServing, "q says no")
		info, end := endpoint(t, "127.0.0.1:1")
		stopP := active(t, steady(new(Active)), p).Attend(info, end.Endpoint)
		stopQ := active(t, steady(&Active{Port: 99}), q).Attend(info, end.Endpoint)
		after(spread)
		if st := end.State.Status(); st.Text != "q says no" {
			t.Errorf("%+v", st)
		}
		stopQ()
		if !end.State.Usable() {
			t.Error("q has gone, but its answer has not")
		}
		stopP()
	})
}

// Checks of many endpoints that begin together do not stay together.
func TestChecksAreSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := new(script)
		p.say(Serving, "")
		a := active(t, &Active{Interval: testSecond}, p)
		const n = 500
		for i := range n {
			info, end := endpoint(t, fmt.Sprintf("127.0.0.1:%d", i+1))
			defer a.Attend(info, end.Endpoint)()
		}
		after(2 * time.Minute)
		begin := time.Now()
		before := len(p.asked())
		after(time.Second)
		var tenths [10]int
		asked := p.asked()[before:]
		for _, at := range asked {
			tenths[int(at.Sub(begin)/(100*time.Millisecond))%10]++
		}
		if len(asked) < n*8/10 || len(asked) > n*12/10 {
			t.Errorf("%d checks of %d endpoints in a second", len(asked), n)
		}
		for i, k := range tenths {
			if k < n/10/3 || k > n/10*3 {
				t.Errorf("%d of %d checks in the tenth %d of a second", k, len(asked), i)
			}
		}
	})
}

// panicky is somebody's prober with a bug.
type panicky struct{ asked int }

func (p *panicky) Probe(context.Context, *Target) Verdict {
	if p.asked++; p.asked == 2 {
		panic("a bug")
	}
	return Verdict{Answer: Serving}
}

func TestPanicInProber(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := new(panicky)
		info, end := endpoint(t, "127.0.0.1:1")
		defer active(t, steady(&Active{Fails: 1}), p).Attend(info, end.Endpoint)()
		after(5 * time.Second)
		if !end.State.Usable() || p.asked < 3 {
			t.Errorf("usable %v, asked %d times", end.State.Usable(), p.asked)
		}
	})
}

// watcher tells what it is told to.
type watcher struct {
	script
	mode    WatchMode
	tell    chan Verdict
	end     chan error
	watched chan time.Time
}

func newWatcher(mode WatchMode) *watcher {
	return &watcher{mode: mode, tell: make(chan Verdict), end: make(chan error), watched: make(chan time.Time, 100)}
}

func (w *watcher) WatchMode() WatchMode { return w.mode }

func (w *watcher) Watch(ctx context.Context, _ *Target, report func(Verdict)) error {
	w.watched <- time.Now()
	for {
		select {
		case v := <-w.tell:
			report(v)
		case err := <-w.end:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// gRFC A17: exponential backoff between Watches that say nothing, reset by a message; no more than the interval here.
func TestWatchBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatcher(WatchOnly)
		info, end := endpoint(t, "127.0.0.1:1")
		defer active(t, steady(&Active{Interval: 4 * testSecond}), w).Attend(info, end.Endpoint)()
		last := <-w.watched
		for i, want := range []time.Duration{1000, 1600, 2560, 4000, 4000} {
			w.end <- errors.New("some status")
			if st := end.State.Status(); i > 0 && st.Condition != upstream.ConditionUnhealthy {
				t.Errorf("without a watch: %+v", st)
			}
			at := <-w.watched
			if d := at.Sub(last); d < want*time.Millisecond*8/10 || d > want*time.Millisecond*12/10 {
				t.Errorf("attempt %d after %v, want about %v", i+1, d, want*time.Millisecond)
			}
			last = at
		}
		w.tell <- Verdict{Answer: Serving}
		synctest.Wait()
		if !end.State.Usable() {
			t.Error("not usable")
		}
		w.end <- errors.New("some status")
		synctest.Wait()
		if end.State.Usable() {
			t.Error("usable though the watch has ended")
		}
		began := time.Now()
		if d := (<-w.watched).Sub(began); d > 1200*time.Millisecond {
			t.Errorf("backoff of %v after a message", d)
		}
		// A connection that is lost after a while is replaced at once, and says nothing about the endpoint.
		w.tell <- Verdict{Answer: Serving}
		after(time.Minute)
		began = time.Now()
		w.end <- fmt.Errorf("%w: reset", ErrConnectionLost)
		if d := (<-w.watched).Sub(began); d != 0 {
			t.Errorf("watched again after %v", d)
		}
		if !end.State.Usable() {
			t.Error("not usable after a lost connection")
		}
	})
}

// A server that ends connections as soon as they are a second old, or a tenth of one, or a Watch with OK, is watched again at
// once, and what it has said holds; only what repeats faster is watched less often.
func TestWatchEndsInOrder(t *testing.T) {
	for _, mode := range []WatchMode{WatchOnly, WatchAndProbe} {
		for _, why := range []error{ErrInOrder, ErrConnectionLost} {
			synctest.Test(t, func(t *testing.T) {
				w := newWatcher(mode)
				w.say(Serving, "")
				info, end := endpoint(t, "127.0.0.1:1")
				defer active(t, steady(&Active{Interval: 4 * testSecond}), w).Attend(info, end.Endpoint)()
				defer end.State.WatchStatus(func(_, to upstream.Status) {
					if to.Reason == upstream.Unhealthy {
						t.Errorf("told %+v", to)
					}
				})()
				<-w.watched
				again := func(life, pause time.Duration) {
					t.Helper()
					w.tell <- Verdict{Answer: Serving}
					after(life)
					began := time.Now()
					w.end <- fmt.Errorf("%w: too old", why)
					if d := (<-w.watched).Sub(began); d < pause*8/10 || d > pause*12/10 {
						t.Errorf("after %v watched again after %v, want %v", life, d, pause)
					}
				}
				for _, life := range []time.Duration{time.Minute, time.Second, 300 * time.Millisecond, renewEvery, renewEvery} {
					again(life, 0)
				}
				again(renewEvery/2, 0)
				again(renewEvery/2, watchBackoffBase)
				again(renewEvery/2, watchBackoffBase)
				again(time.Second, 0)
				again(renewEvery/2, 0)
			})
		}
	}
}

// A server whose every connection ends before it has said anything is not taken to be well for ever.
func TestWatchEndsBeforeAnything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatcher(WatchOnly)
		info, end := endpoint(t, "127.0.0.1:1")
		defer active(t, steady(&Active{Interval: 4 * testSecond}), w).Attend(info, end.Endpoint)()
		<-w.watched
		w.tell <- Verdict{Answer: Serving}
		after(time.Second)
		for range 3 {
			if !end.State.Usable() {
				t.Error("unusable too soon")
			}
			w.end <- ErrInOrder
			<-w.watched
		}
		if end.State.Usable() {
			t.Error("usable though it says nothing any more")
		}
	})
}

// What the endpoint tells unasked is newer than the answer to a probe that was under way.
func TestPushOvertakesProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &slowWatcher{watcher: newWatcher(WatchAndProbe), answer: make(chan Verdict)}
		info, end := endpoint(t, "127.0.0.1:1")
		defer active(t, steady(new(Active)), w).Attend(info, end.Endpoint)()
		<-w.watched
		after(spread) // the probe is under way
		w.tell <- Verdict{NotServing, "pushed"}
		synctest.Wait()
		w.answer <- Verdict{Answer: Serving}
		synctest.Wait()
		if end.State.Usable() {
			t.Error("an old answer has overtaken a new one")
		}
	})
}

type slowWatcher struct {
	*watcher
	answer chan Verdict
}

func (w *slowWatcher) Probe(ctx context.Context, _ *Target) Verdict {
	select {
	case v := <-w.answer:
		return v
	case <-ctx.Done():
		return Verdict{NoAnswer, "no answer"}
	}
}

// Where nothing can be watched, nothing is watched until there is another connection.
func TestCannotWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatcher(WatchAndProbe)
		w.say(Serving, "")
		info, end := endpoint(t, "127.0.0.1:1")
		defer active(t, steady(new(Active)), w).Attend(info, end.Endpoint)()
		<-w.watched
		w.end <- ErrCannotWatch
		after(time.Hour)
		if len(w.watched) != 0 || !end.State.Usable() {
			t.Errorf("watched %d times, usable %v", len(w.watched), end.State.Usable())
		}
		end.State.SetConnected(time.Now())
		end.State.SetConnected(time.Time{}) // the connection is lost
		after(10 * time.Second)
		if len(w.watched) != 1 {
			t.Errorf("watched %d times after a new connection", len(w.watched))
		}
	})
}

func TestActiveRefuses(t *testing.T) {
	for _, tc := range []struct {
		a    Active
		text string
	}{
		{Active{Port: 70000}, "port is 70000"},
		{Active{Interval: -1}, "interval is -1ns"},
		{Active{Timeout: 1}, "timeout is 1ns; it must be at least 10ms"},
		{Active{Passes: -1}, "passes"},
		{Active{Fails: -2}, "fails"},
		{Active{Jitter: 91}, "jitter is 91"},
		{Active{Initial: "up"}, `initial "up" is none of connecting, healthy`},
		{Active{FastInterval: -5}, "fast_interval"},
	} {
		if err := tc.a.setDefaults(); err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%+v: error %v, want %q in it", tc.a, err, tc.text)
		}
	}
}

// slow hands out what makes it answer.
type slow chan chan struct{}

func (s slow) Probe(context.Context, *Target) Verdict {
	answer := make(chan struct{})
	s <- answer
	<-answer
	return Verdict{Answer: NotServing}
}

// An endpoint that is not checked any more and then is again, while an old question is still under way: that one's answer
// means nothing.
func TestJoinAgain(t *testing.T) {
	wiretest.CheckLeaks(t)
	p := make(slow, 1)
	a := active(t, &Active{Interval: caddy.Duration(time.Hour), Timeout: caddy.Duration(time.Hour)}, p)
	info, end := endpoint(t, "127.0.0.1:1")
	stop := a.Attend(info, end.Endpoint)
	old := <-p
	stop()
	close(old)
	defer a.Attend(info, end.Endpoint)()
	now := <-p
	if !end.State.Has(upstream.Connecting) {
		t.Errorf("%+v from the old question", end.State.Status())
	}
	close(now)
	eventually(t, "there is a verdict", func() bool { return end.State.Has(upstream.Unhealthy) })
}
