package healthcheck

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Attempts as they come.
var (
	attemptOK      = call.Attempt{Code: grpcwire.OK, SentMessages: 1, ReceivedMessages: 1}
	attemptFailed  = call.Attempt{Code: grpcwire.Unavailable}
	attemptBroken  = call.Attempt{Code: grpcwire.Unavailable, Source: call.SourceProxy}
	attemptCaller  = call.Attempt{Code: grpcwire.InvalidArgument}
	attemptGone    = call.Attempt{Code: grpcwire.Canceled, EndedBy: call.EndedByClient, Source: call.SourceProxy}
	attemptLimited = call.Attempt{Code: grpcwire.Unavailable, EndedBy: call.EndedByProxy, Source: call.SourceProxy}
)

// group is some endpoints under one detector.
type group struct {
	p      *Passive
	states []*upstream.State
	stops  []func()
}

func newGroup(t testing.TB, n int, p *Passive) *group {
	t.Helper()
	if err := p.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	g := &group{p: p}
	for i := range n {
		s := new(upstream.State)
		g.states = append(g.states, s)
		g.stops = append(g.stops, p.attend(fmt.Sprintf("10.0.0.%d:1", i+1), s))
	}
	return g
}

func (g *group) close() {
	for _, stop := range g.stops {
		stop()
	}
}

// observe reports n attempts on endpoint i.
func (g *group) observe(i, n int, a call.Attempt) {
	for range n {
		g.p.Observe(g.states[i], &a, 0)
	}
}

func (g *group) ejected() []int {
	var list []int
	for i, s := range g.states {
		if s.Has(upstream.Ejected) {
			list = append(list, i)
		}
	}
	return list
}

// The table of judge, row by row: what a client can provoke counts for nothing.
func TestJudge(t *testing.T) {
	p := &Passive{DeadlineFailureAfter: testSecond, OutlierDetection: new(OutlierDetection)}
	if err := p.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	for code := range grpcwire.Code(20) {
		want := good
		switch code {
		case grpcwire.Unavailable, grpcwire.DataLoss:
			want = failed
		case grpcwire.Internal, grpcwire.Unknown, grpcwire.DeadlineExceeded, grpcwire.Canceled:
			want = neutral
		}
		if is := p.judge(&call.Attempt{Code: code}); is != want {
			t.Errorf("%v from the upstream: %v, want %v", code, is, want)
		}
	}
	http := func(status int) call.Attempt {
		return call.Attempt{Code: grpcwire.FromHTTPStatus(status), Source: call.SourceHTTP, HTTPStatus: status}
	}
	broke := func(cause call.Cause, code grpcwire.Code) call.Attempt {
		return call.Attempt{Code: code, Source: call.SourceProxy, Cause: cause}
	}
	deadline := call.Attempt{Code: grpcwire.DeadlineExceeded, EndedBy: call.EndedByDeadline, Source: call.SourceProxy}
	long := deadline
	long.Latency = time.Second
	longAnswered := long
	longAnswered.ReceivedBytes = 1
	silent := deadline
	silent.Connection = new(wire)
	left := attemptGone
	left.Connection, left.Latency = new(wire), time.Hour
	for _, tc := range []struct {
		name string
		a    call.Attempt
		want outcome
	}{
		{"client gone", attemptGone, neutral},
		{"limit of the proxy", attemptLimited, neutral},
		{"broken, nobody knows how", attemptBroken, broken},
		{"cannot connect", broke(call.CauseConnect, grpcwire.Unavailable), broken},
		{"connection dead", broke(call.CauseSilence, grpcwire.Unavailable), broken},
		{"connection lost", broke(call.CauseLost, grpcwire.Unavailable), neutral},
		{"connection lost after messages", call.Attempt{Code: grpcwire.Unavailable, Source: call.SourceProxy, Cause: call.CauseLost, ReceivedMessages: 100, Latency: time.Hour}, neutral},
		{"refused", broke(call.CauseRefused, grpcwire.Unavailable), neutral},
		{"reset", broke(call.CauseAnswer, grpcwire.Internal), neutral},
		{"malformed", broke(call.CauseAnswer, grpcwire.Unknown), neutral},
		{"reset with ENHANCE_YOUR_CALM", broke(call.CauseAnswer, grpcwire.ResourceExhausted), neutral},
		{"metadata too large", broke(call.CauseSize, grpcwire.ResourceExhausted), neutral},
		{"HTTP 502", http(502), failed},
		{"HTTP 503", http(503), failed},
		{"HTTP 504", http(504), neutral},
		{"HTTP 429", http(429), neutral},
		{"HTTP 500", http(500), neutral},
		{"HTTP 431", http(431), neutral},
		{"HTTP 400", http(400), neutral},
		{"HTTP 404", http(404), good},
		{"short deadline", deadline, neutral},
		{"short deadline, nothing came", silent, doubtful},
		{"client gone, nothing came", left, doubtful},
		{"long deadline", long, broken},
		{"long deadline, answered", longAnswered, neutral},
	} {
		if is := p.judge(&tc.a); is != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, is, tc.want)
		}
	}
	own := &Passive{FailureCodes: []grpcwire.CodeText{"RESOURCE_EXHAUSTED", "14", "INTERNAL"}}
	if err := own.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	for code, want := range map[grpcwire.Code]outcome{
		grpcwire.ResourceExhausted: failed, grpcwire.Unavailable: failed, grpcwire.Internal: failed, grpcwire.DataLoss: neutral, grpcwire.NotFound: good,
	} {
		if is := own.judge(&call.Attempt{Code: code}); is != want {
			t.Errorf("%v with codes of its own: %v, want %v", code, is, want)
		}
	}
	for _, tc := range []struct {
		a    call.Attempt
		want outcome
	}{
		{broke(call.CauseAnswer, grpcwire.Internal), failed},
		{broke(call.CauseAnswer, grpcwire.Unknown), neutral},
		{broke(call.CauseLost, grpcwire.Unavailable), neutral},
		{http(429), neutral},
		{http(400), failed},
	} {
		if is := own.judge(&tc.a); is != tc.want {
			t.Errorf("%+v with codes of its own: %v, want %v", tc.a, is, tc.want)
		}
	}
}

// One dial that has failed, or one connection that was given up, counts once, however many attempts it has ended.
func TestIncidentsCountOnce(t *testing.T) {
	g := newGroup(t, 2, &Passive{OutlierDetection: &OutlierDetection{ConsecutiveLocalFailures: 3}})
	defer g.close()
	failedDial := func() call.Attempt {
		a := attemptBroken
		a.Cause, a.Incident = call.CauseConnect, new(int)
		return a
	}
	first, second := failedDial(), failedDial()
	for range 10 { // those who waited need not hear of it one dial after the other
		g.observe(0, 1, first)
		g.observe(0, 1, second)
	}
	if e := g.ejected(); e != nil {
		t.Fatalf("ejected %v by two dials", e)
	}
	g.observe(0, 1, failedDial())
	if e := g.ejected(); !slices.Equal(e, []int{0}) {
		t.Errorf("ejected %v by three dials", e)
	}
}

// wire is a connection to an endpoint that answers PINGs, or does not.
type wire struct {
	hangs, unknown bool
	silence        time.Duration
	asked          atomic.Int32
}

func (w *wire) Silence() time.Duration { return w.silence }

func (w *wire) Alive(ctx context.Context) (alive, known bool) {
	w.asked.Add(1)
	if w.hangs {
		<-ctx.Done()
	}
	return !w.hangs, !w.unknown
}

// An attempt whose deadline ran out without a byte counts if the endpoint does not answer a PING either, and whatever the
// deadline was. A client in a hurry ejects nobody.
func TestDeadlineWithoutByte(t *testing.T) {
	for _, tc := range []struct {
		name    string
		wire    *wire
		latency time.Duration
		ejected bool
		asked   int32
	}{
		{"hangs", &wire{hangs: true, silence: time.Second}, time.Second, true, 1},
		{"hangs, in a hurry", &wire{hangs: true, silence: time.Second}, time.Millisecond, true, 1},
		{"slow", &wire{silence: time.Second}, time.Second, false, 1},
		{"in a hurry", &wire{silence: time.Hour}, 0, false, 1},
		{"spoke just now", &wire{hangs: true, silence: 400 * time.Millisecond}, time.Second, false, 0},
		{"cannot be asked", &wire{hangs: true, unknown: true, silence: time.Second}, time.Second, false, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGroup(t, 3, &Passive{OutlierDetection: new(OutlierDetection)})
				defer after(2 * pingPatience)
				defer g.close()
				a := call.Attempt{
					Code: grpcwire.DeadlineExceeded, EndedBy: call.EndedByDeadline, Source: call.SourceProxy, Latency: tc.latency, Connection: tc.wire,
				}
				for range 10 {
					g.observe(0, 1, a)
					after(10 * time.Millisecond)
				}
				if e := g.ejected(); e != nil {
					t.Errorf("ejected %v before there can be an answer", e)
				}
				after(2 * pingPatience)
				if got := g.ejected() != nil; got != tc.ejected || tc.wire.asked.Load() != tc.asked {
					t.Errorf("ejected %v, want %v; asked %d times, want %d", got, tc.ejected, tc.wire.asked.Load(), tc.asked)
				}
				a.EndedBy = call.EndedByClient // who counts the same deadline
				g.observe(0, 5, a)             // the configuration goes before there is an answer
			})
		})
	}
}

// The trial of an endpoint that still hangs fails, and that of one that only was too slow is another call's.
func TestTrialWithoutByte(t *testing.T) {
	for _, hangs := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			g := newGroup(t, 3, &Passive{OutlierDetection: &OutlierDetection{BaseEjectionTime: testSecond}})
			defer g.close()
			s := g.states[0]
			g.observe(0, 5, attemptFailed)
			after(time.Second)
			trial, ok := s.TryBegin()
			if !ok || trial == 0 {
				t.Fatal("no trial")
			}
			g.p.Observe(s, &call.Attempt{
				Code: grpcwire.DeadlineExceeded, EndedBy: call.EndedByDeadline, Latency: time.Second, Connection: &wire{hangs: hangs, silence: time.Second},
			}, trial)
			s.End()
			after(pingPatience)
			if got := s.Has(upstream.Ejected); got != hangs || s.Has(upstream.OnTrial) {
				t.Errorf("hangs %v: ejected again %v, on trial %v", hangs, got, s.Has(upstream.OnTrial))
			}
		})
	}
}

func TestConsecutiveFailures(t *testing.T) {
	g := newGroup(t, 3, &Passive{OutlierDetection: new(OutlierDetection)})
	defer g.close()
	g.observe(0, 4, attemptFailed)
	g.observe(0, 1, attemptOK)
	g.observe(0, 4, attemptFailed)
	g.observe(0, 100, attemptGone)
	g.observe(0, 100, attemptLimited)
	if e := g.ejected(); e != nil {
		t.Fatalf("ejected %v by four failures in a row", e)
	}
	g.observe(0, 1, attemptFailed)
	if e := g.ejected(); !slices.Equal(e, []int{0}) {
		t.Fatalf("ejected %v by five failures in a row", e)
	}
	if st := g.states[0].Status(); st.Condition != upstream.ConditionEjected || !strings.Contains(st.Text, "5 failures in a row, the last: UNAVAILABLE; for 30s") {
		t.Errorf("%+v", st)
	}
	// The caller's faults are answers like others.
	g.observe(1, 4, attemptFailed)
	g.observe(1, 1, attemptCaller)
	g.observe(1, 4, attemptFailed)
	if g.states[1].Has(upstream.Ejected) {
		t.Error("ejected, though it answered in between")
	}
}

// Attempts without an answer are counted apart from failures that were answered, which do not make up for them: a server
// that hangs may well answer some of its calls with DEADLINE_EXCEEDED.
func TestConsecutiveBreaks(t *testing.T) {
	g := newGroup(t, 2, &Passive{OutlierDetection: &OutlierDetection{ConsecutiveFailures: -1, ConsecutiveLocalFailures: 3, MaxEjectionPercent: 100}})
	defer g.close()
	g.observe(0, 100, attemptFailed)
	g.observe(0, 2, attemptBroken)
	g.observe(0, 1, attemptCaller) // it does answer
	g.observe(0, 2, attemptBroken)
	g.observe(0, 5, attemptFailed)
	if e := g.ejected(); e != nil {
		t.Fatalf("ejected %v", e)
	}
	g.observe(0, 1, attemptBroken)
	if e := g.ejected(); !slices.Equal(e, []int{0}) {
		t.Fatalf("ejected %v", e)
	}
	if st := g.states[0].Status(); !strings.Contains(st.Text, "no answer") {
		t.Errorf("%+v", st)
	}
}

func TestMaxEjectionPercent(t *testing.T) {
	for _, tc := range []struct{ endpoints, percent, want int }{
		{3, 10, 1}, {10, 10, 1}, {11, 10, 2}, {10, 50, 5}, {4, 100, 4}, {1, 10, 1}, {5, -1, 0},
	} {
		g := newGroup(t, tc.endpoints, &Passive{OutlierDetection: &OutlierDetection{MaxEjectionPercent: tc.percent}})
		for i := range g.states {
			g.observe(i, 5, attemptFailed)
		}
		if n := len(g.ejected()); n != tc.want {
			t.Errorf("%d of %d endpoints ejected at %d%%, want %d", n, tc.endpoints, tc.percent, tc.want)
		}
		g.close()
	}
}

// base × ejections in a row, at most the maximum; back on trial with one call; one ejection is forgotten per interval.
func TestEjectionTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &OutlierDetection{BaseEjectionTime: 30 * testSecond, MaxEjectionTime: 75 * testSecond}
		g := newGroup(t, 1, &Passive{OutlierDetection: o})
		defer g.close()
		s := g.states[0]
		g.observe(0, 5, attemptFailed)
		for i, want := range []time.Duration{30 * time.Second, 60 * time.Second, 75 * time.Second, 75 * time.Second} {
			after(want - time.Millisecond)
			if s.Usable() || !s.Has(upstream.Ejected) {
				t.Fatalf("ejection %d: usable before %v", i+1, want)
			}
			after(2 * time.Millisecond)
			if !s.Usable() || s.Has(upstream.Ejected) || s.Status().Condition != upstream.ConditionEjected {
				t.Fatalf("ejection %d: after %v: usable %v, %+v", i+1, want, s.Usable(), s.Status())
			}
			trial, ok := s.TryBegin()
			if trial == 0 || !ok || s.Usable() {
				t.Fatalf("trial %v, ok %v, usable %v", trial, ok, s.Usable())
			}
			if _, ok := s.TryBegin(); ok {
				t.Fatal("two calls on trial")
			}
			// A call that began before the ejection says nothing about the trial.
			g.p.Observe(s, &attemptOK, 0)
			if s.Usable() {
				t.Fatal("an old call ends the trial")
			}
			// One that the client gives up is no verdict, and the next call is tried.
			g.p.Observe(s, &attemptGone, trial)
			s.End()
			if trial, ok = s.TryBegin(); trial == 0 || !ok {
				t.Fatal("no second trial")
			}
			s.End()
			g.p.Observe(s, &attemptFailed, trial)
			if s.Usable() || !s.Has(upstream.Ejected) || s.Has(upstream.OnTrial) {
				t.Fatal("the trial failed, and it is not ejected")
			}
		}
		after(75*time.Second + time.Millisecond)
		trial, _ := s.TryBegin()
		g.p.Observe(s, &attemptOK, trial)
		s.End()
		if st := s.Status(); !s.Usable() || st.Condition != upstream.ConditionHealthy {
			t.Fatalf("the trial succeeded: %+v", st)
		}
		// Five ejections, less two in two intervals: the next is the fourth.
		after(20*time.Second + time.Millisecond)
		g.observe(0, 5, attemptFailed)
		if st := s.Status(); !strings.Contains(st.Text, "for 1m15s") {
			t.Errorf("%+v", st)
		}
		after(75*time.Second + time.Millisecond)
		trial, _ = s.TryBegin()
		g.p.Observe(s, &attemptOK, trial)
		s.End()
		after(10 * time.Minute)
		g.observe(0, 5, attemptFailed)
		if st := s.Status(); !strings.Contains(st.Text, "for 30s") {
			t.Errorf("after a long time: %+v", st)
		}
	})
}

// A trial that lasts, such as a stream, neither keeps other calls out for ever nor needs to end to count.
func TestTrialThatLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 1, &Passive{OutlierDetection: new(OutlierDetection)})
		defer g.close()
		s := g.states[0]
		g.observe(0, 5, attemptFailed)
		after(30*time.Second + time.Millisecond)
		s.TryBegin()
		after(time.Minute)
		if !s.Usable() || !s.Has(upstream.Probation) {
			t.Fatalf("a trial without an answer blocks: %+v", s.Status())
		}
		trial, _ := s.TryBegin()
		g.p.Responded(s, trial)
		after(time.Minute)
		if !s.Usable() || s.Has(upstream.Probation) {
			t.Errorf("a trial that is being answered for a minute has not succeeded: %+v", s.Status())
		}
	})
}

// Several trials, one after the other: what becomes of one says nothing of the next.
func TestTrialsAreToldApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 1, &Passive{OutlierDetection: new(OutlierDetection)})
		defer g.close()
		s := g.states[0]
		g.observe(0, 5, attemptFailed)
		after(30*time.Second + time.Millisecond)
		first, _ := s.TryBegin()
		g.p.Responded(s, first)
		g.p.Observe(s, &attemptGone, first) // its client has gone
		second, ok := s.TryBegin()
		if second == 0 || !ok {
			t.Fatal("no second trial")
		}
		after(time.Minute) // it has no answer, and gives way
		if !s.Usable() || !s.Has(upstream.Probation) {
			t.Errorf("the first trial's answer was taken for the second's: %+v", s.Status())
		}
		third, ok := s.TryBegin()
		if third == 0 || !ok {
			t.Fatal("no third trial")
		}
		g.p.Observe(s, &attemptGone, second)
		if _, ok := s.TryBegin(); ok {
			t.Error("two calls on trial, since the end of an older trial was taken for the third's")
		}
		g.p.Observe(s, &attemptOK, third)
		if s.Has(upstream.Probation) {
			t.Errorf("the third trial succeeded: %+v", s.Status())
		}
		// A trial of an earlier ejection that ends during the next decides nothing either.
		g.observe(0, 5, attemptFailed)
		after(60*time.Second + time.Millisecond)
		if !s.Has(upstream.Probation) {
			t.Fatalf("no second probation: %+v", s.Status())
		}
		for _, a := range []call.Attempt{attemptOK, attemptFailed, attemptGone} {
			g.p.Observe(s, &a, second)
			if !s.Has(upstream.Probation) || s.Has(upstream.OnTrial) {
				t.Errorf("an old trial has decided: %+v", s.Status())
			}
		}
	})
}

// The ejection and what was counted survive the handler that saw it.
func TestEjectionSurvivesReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 1, &Passive{OutlierDetection: new(OutlierDetection)})
		s := g.states[0]
		g.observe(0, 4, attemptFailed)
		next := &Passive{OutlierDetection: new(OutlierDetection)}
		if err := next.Provision(caddy.Context{}); err != nil {
			t.Fatal(err)
		}
		g.close()
		stop := next.attend("10.0.0.1:1", s)
		next.Observe(s, &attemptFailed, 0)
		if !s.Has(upstream.Ejected) {
			t.Fatal("the failures before the reload are forgotten")
		}
		stop()
		after(29 * time.Second)
		if s.Usable() {
			t.Error("the ejection is forgotten")
		}
		after(2 * time.Second)
		if !s.Usable() || s.Has(upstream.Probation) {
			t.Errorf("on probation, though nobody looks: %+v", s.Status())
		}
	})
}

// A good health check brings the trial forward, but only once in a row.
func TestCheckShortensEjection(t *testing.T) {
	for _, ignore := range []bool{false, true} {
		t.Run(fmt.Sprint("ignore=", ignore), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := new(script)
				p.say(Serving, "")
				info, end := endpoint(t, "127.0.0.1:1")
				s := end.State
				defer active(t, steady(&Active{Interval: 5 * testSecond}), p).Attend(info, end.Endpoint)()
				passive := &Passive{OutlierDetection: &OutlierDetection{IgnoreChecks: ignore}}
				if err := passive.Provision(caddy.Context{}); err != nil {
					t.Fatal(err)
				}
				defer passive.Attend(info, end.Endpoint)()
				after(time.Second)
				for range 5 {
					passive.Observe(s, &attemptFailed, 0)
				}
				after(6 * time.Second)
				if s.Has(upstream.Probation) == ignore {
					t.Fatalf("after a good check: %+v", s.Status())
				}
				if ignore {
					return
				}
				trial, _ := s.TryBegin()
				passive.Observe(s, &attemptFailed, trial)
				s.End()
				after(50 * time.Second)
				if !s.Has(upstream.Ejected) {
					t.Errorf("ejected for the second time, and a check shortens that: %+v", s.Status())
				}
			})
		})
	}
}

// The examples are those of grpc-go's tests of outlier detection.
func TestSuccessRate(t *testing.T) {
	s := &SuccessRate{StdevFactor: 500, MinimumHosts: 3, RequestVolume: 3}
	all := func(counts ...[2]uint64) []tally {
		var list []tally
		for _, c := range counts {
			list = append(list, tally{good: c[0], bad: c[1]})
		}
		return list
	}
	for _, tc := range []struct {
		name string
		list []tally
		want []int
	}{
		{"all the same", all([2]uint64{5, 0}, [2]uint64{5, 0}, [2]uint64{5, 0}), nil},
		// mean 2/3, stdev 0.471: below 0.431 is an outlier.
		{"one fails", all([2]uint64{5, 0}, [2]uint64{5, 0}, [2]uint64{0, 5}), []int{2}},
		{"too few hosts with enough calls", all([2]uint64{5, 0}, [2]uint64{2, 0}, [2]uint64{0, 5}), nil},
		{"all fail", all([2]uint64{0, 5}, [2]uint64{0, 5}, [2]uint64{0, 5}), nil},
	} {
		var got []int
		for _, f := range s.outliers(tc.list) {
			got = append(got, f.index)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
	// Envoy's documentation of the factor: mean - 1.9 standard deviations. Nine hosts at 100 %, one at 90 %: mean 99 %,
	// standard deviation 3 %, threshold 93.3 %.
	var list []tally
	for range 9 {
		list = append(list, tally{good: 100})
	}
	list = append(list, tally{good: 90, bad: 10})
	envoy := &SuccessRate{StdevFactor: 1900, MinimumHosts: 5, RequestVolume: 100}
	if f := envoy.outliers(list); len(f) != 1 || f[0].index != 9 || !strings.Contains(f[0].why(), "90.0%, below 93.3%") {
		t.Errorf("found %d", len(f))
	}
}

func TestFailurePercentage(t *testing.T) {
	f := &FailurePercentage{Threshold: 50, MinimumHosts: 3, RequestVolume: 4}
	list := []tally{{good: 2, bad: 2}, {good: 1, bad: 3}, {good: 0, bad: 3}, {good: 10}}
	got := f.outliers(list)
	if len(got) != 1 || got[0].index != 1 {
		t.Errorf("found %d; 50%% is not more than 50%%, and three calls are too few", len(got))
	}
	if got := f.outliers(list[:3]); got != nil {
		t.Errorf("found %d among two hosts with enough calls", len(got))
	}
}

func TestLatencyOutliers(t *testing.T) {
	l := &Latency{Factor: 3, MinimumDifference: 50 * ms, MinimumHosts: 3, RequestVolume: 10}
	list := make([]tally, 4)
	for i, ms := range []uint64{20, 30, 25, 100} {
		list[i] = tally{latency: 10 * ms * 1000, latencies: 10}
	}
	if f := l.outliers(list); len(f) != 1 || f[0].index != 3 || !strings.Contains(f[0].why(), "mean latency 100ms, more than 3 times the upstreams' median of 27.5ms") {
		t.Errorf("found %d", len(f))
	}
	for i := range list {
		list[i].latency /= 10 // 10 ms against 2.75 ms are nothing to anybody
	}
	if f := l.outliers(list); f != nil {
		t.Errorf("found %d", len(f))
	}
}

// The sweep looks at what happened in its interval alone, and the reload does not disturb it.
func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &OutlierDetection{ConsecutiveFailures: -1, ConsecutiveLocalFailures: -1, FailurePercentage: &FailurePercentage{Threshold: 50}, MaxEjectionPercent: 50}
		g := newGroup(t, 6, &Passive{OutlierDetection: o})
		defer g.close()
		for i := range g.states {
			g.observe(i, 1000, attemptOK)
		}
		after(11 * time.Second)
		for i := range g.states {
			g.observe(i, 40, attemptOK)
		}
		g.observe(2, 60, attemptFailed)
		g.observe(3, 60, attemptBroken)
		g.observe(4, 60, attemptCaller)
		g.observe(5, 60, attemptOK)
		g.observe(0, 60, attemptOK)
		if e := g.ejected(); e != nil {
			t.Fatalf("ejected %v before the sweep", e)
		}
		after(10 * time.Second)
		if e := g.ejected(); !slices.Equal(e, []int{2, 3}) {
			t.Fatalf("ejected %v", e)
		}
		if st := g.states[2].Status(); !strings.Contains(st.Text, "60.0% of 100 calls failed, more than 50%") {
			t.Errorf("%+v", st)
		}
	})
}

func TestEnforcement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &OutlierDetection{ConsecutiveFailures: -1, FailurePercentage: &FailurePercentage{Enforcement: -1}}
		g := newGroup(t, 5, &Passive{OutlierDetection: o})
		defer g.close()
		for i := range g.states {
			g.observe(i, 100, attemptFailed)
		}
		after(11 * time.Second)
		if e := g.ejected(); e != nil {
			t.Errorf("ejected %v, though nothing is enforced", e)
		}
	})
}
