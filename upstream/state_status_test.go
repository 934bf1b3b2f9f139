package upstream

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Each reason, set on top of all those behind it in the table, decides; the rest come back as they are taken away.
func TestStatusPrecedence(t *testing.T) {
	var s State
	for i := len(precedence) - 1; i >= 0; i-- {
		p := precedence[i]
		s.SetWhy(p.reason, "because")
		if st := s.Status(); st.Condition != p.condition || st.Reason != p.reason || st.Text != "because" || st.Since.IsZero() {
			t.Errorf("with reason %b: %+v, want condition %v", p.reason, st, p.condition)
		}
		if usable := p.reason == Probation && !s.Has(lasting); s.Usable() != usable {
			t.Errorf("with reason %b: usable %v", p.reason, s.Usable())
		}
	}
	for i, p := range precedence {
		s.Clear(p.reason)
		want := ConditionHealthy
		if i+1 < len(precedence) {
			want = precedence[i+1].condition
		}
		if st := s.Status(); st.Condition != want {
			t.Errorf("after reason %b: condition %v, want %v", p.reason, st.Condition, want)
		}
	}
}

func TestStatusHasText(t *testing.T) {
	for _, p := range precedence {
		var s State
		s.Set(p.reason)
		if s.Status().Text == "" {
			t.Errorf("reason %b has no text", p.reason)
		}
	}
}

func TestWarming(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s State
		s.SetWarmUp(time.Minute)
		if c := s.Status().Condition; c != ConditionHealthy {
			t.Errorf("an endpoint that was always there is %v", c)
		}
		s.Set(Unhealthy)
		time.Sleep(time.Hour)
		s.Clear(Unhealthy)
		since := time.Now()
		time.Sleep(59 * time.Second)
		if st := s.Status(); st.Condition != ConditionWarming || !st.Since.Equal(since) {
			t.Errorf("after 59 s: %+v, want warming since %v", st, since)
		}
		time.Sleep(time.Second)
		if st := s.Status(); st.Condition != ConditionHealthy || !st.Since.Equal(since) {
			t.Errorf("after 60 s: %+v, want healthy since %v", st, since)
		}
		var added State
		added.SetWarmUp(time.Minute)
		added.Found(time.Now())
		time.Sleep(time.Second)
		added.Found(time.Now())
		if st := added.Status(); st.Condition != ConditionWarming || time.Since(st.Since) != time.Second {
			t.Errorf("an endpoint found a second ago: %+v", st)
		}
	})
}

func TestWatchStatus(t *testing.T) {
	var s State
	var got []Condition
	stop := s.WatchStatus(func(from, to Status) { got = append(got, from.Condition, to.Condition) })
	s.Set(Connecting)
	s.Set(Connecting)
	s.Change(Unhealthy, Connecting, "no answer")
	s.Set(Backoff) // hidden behind Unhealthy
	s.Drain("maintenance")
	s.Clear(Unhealthy | Backoff)
	s.Undrain()
	stop()
	s.Set(Ejected)
	want := []Condition{
		ConditionHealthy, ConditionConnecting,
		ConditionConnecting, ConditionUnhealthy,
		ConditionUnhealthy, ConditionDraining,
		ConditionDraining, ConditionHealthy,
	}
	if len(got) != len(want) {
		t.Fatalf("told %v, want %v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("told %v, want %v", got, want)
		}
	}
}

// Of many callers that saw an endpoint on probation as usable, one gets it at a time.
func TestTrialIsOneCall(t *testing.T) {
	var s State
	s.Set(Ejected)
	s.Change(Probation, Ejected, "")
	if !s.Usable() {
		t.Fatal("on probation and not usable")
	}
	for round := range 20 {
		var admitted atomic.Int32
		var its atomic.Uint32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if trial, ok := s.TryBegin(); ok {
					if trial == 0 {
						t.Error("admitted, but not on trial")
					}
					admitted.Add(1)
					its.Store(uint32(trial))
				}
			})
		}
		wg.Wait()
		if n := admitted.Load(); n != 1 || s.Active() != 1 {
			t.Fatalf("round %d: %d callers were admitted, %d calls are active", round, n, s.Active())
		}
		if s.Usable() {
			t.Fatal("usable for another call during the trial")
		}
		if s.Status().Condition != ConditionEjected {
			t.Errorf("on trial: %+v", s.Status())
		}
		trial := Trial(its.Load())
		s.EndTrial(trial - 1) // an earlier one, or none
		if s.Usable() {
			t.Fatal("somebody else has ended the trial")
		}
		s.EndTrial(trial)
		s.EndTrial(trial)
		s.End()
	}
	s.Clear(Probation)
	if trial, ok := s.TryBegin(); trial != 0 || !ok || !s.Usable() {
		t.Errorf("after probation: trial %v, ok %v", trial, ok)
	}
}

// What comes and goes with single calls is of no interest but to those who wait for it to go.
func TestTrialStirs(t *testing.T) {
	var s State
	s.SetLimit(1)
	told := 0
	defer s.Watch(func(ch Change) {
		if told++; ch != Stirred {
			t.Errorf("told of %d", ch)
		}
	})()
	s.Set(Probation)
	trial, _ := s.TryBegin()
	if told != 0 {
		t.Error("told of a call that begins")
	}
	s.End()
	s.EndTrial(trial)
	s.EndTrial(trial)
	if told != 2 {
		t.Errorf("told %d times", told)
	}
}

func TestLimit(t *testing.T) {
	var s State
	s.SetLimit(2)
	s.Begin()
	if !s.Usable() {
		t.Error("full with one call of two")
	}
	s.Begin()
	if s.Usable() || s.Status().Condition != ConditionHealthy {
		t.Errorf("with two calls of two: usable %v, %+v", s.Usable(), s.Status())
	}
	s.End()
	if !s.Usable() {
		t.Error("still full")
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				s.Begin()
				s.End()
			}
		})
	}
	wg.Wait()
	if !s.Usable() || s.Active() != 1 {
		t.Errorf("after the storm: usable %v, active %d", s.Usable(), s.Active())
	}
	s.Begin()
	s.SetLimit(0)
	if !s.Usable() {
		t.Error("full without a limit")
	}
}

// Calls of services that the endpoint does not serve stay away, others may come.
func TestServices(t *testing.T) {
	var s State
	changes := 0
	defer s.Watch(func(ch Change) {
		if ch == ServicesChanged {
			changes++
		}
	})()
	is := func(a, b, all bool) {
		t.Helper()
		if s.UsableFor("a") != a || s.UsableFor("b") != b || s.UsableForAll() != all {
			t.Errorf("usable for a %v, b %v, all %v", s.UsableFor("a"), s.UsableFor("b"), s.UsableForAll())
		}
	}
	s.SetNotServing()
	if is(true, true, true); changes != 0 {
		t.Error("no change was told of")
	}
	s.SetNotServing("a", "c")
	is(false, true, false)
	s.SetNotServing("a", "c")
	if !s.Usable() || !s.Serves("b") || s.Serves("c") || changes != 1 {
		t.Errorf("usable %v, serves b %v, c %v, %d changes", s.Usable(), s.Serves("b"), s.Serves("c"), changes)
	}
	s.Set(Unhealthy)
	is(false, false, false)
	if s.UsableForExcept("a", Unhealthy) || !s.UsableForExcept("b", Unhealthy) || !s.Serves("b") {
		t.Error("with the health of the whole disregarded, a is being served or b is not")
	}
	s.Clear(Unhealthy)
	s.SetNotServing("b")
	is(true, false, false)
	s.SetNotServing()
	if is(true, true, true); changes != 3 {
		t.Errorf("told of %d changes", changes)
	}
}

func TestBegun(t *testing.T) {
	var s State
	for n := range uint32(3) {
		if got := s.Begun(); got != n {
			t.Errorf("%d calls have begun, not %d", got, n)
		}
		s.Begin()
		if n > 0 {
			s.End()
		}
	}
	if s.Begun() != 3 || s.Active() != 1 {
		t.Errorf("begun %d, in flight %d", s.Begun(), s.Active())
	}
	// More calls than can be counted, and ends without a beginning, do not get from one half of the word into the other.
	s.own.v.Store(1<<64 - 1<<32 + 5)
	s.Begin()
	if s.Begun() != 0 || s.Active() != 6 {
		t.Errorf("after the overflow: begun %d, in flight %d", s.Begun(), s.Active())
	}
	for range 7 {
		s.End()
	}
	if s.Active() != -1 {
		t.Errorf("in flight %d", s.Active())
	}
	s.Begin()
	if s.Active() != 0 {
		t.Errorf("in flight %d", s.Active())
	}
}

func TestCallPathAllocates(t *testing.T) {
	var s State
	s.SetNotServing("pkg.Other")
	s.SetLimit(10)
	if n := testing.AllocsPerRun(100, func() {
		s.Usable()
		s.UsableFor("pkg.Service")
		s.TryBegin()
		s.End()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkUsable(b *testing.B) {
	var s State
	b.Run("all", func(b *testing.B) {
		for b.Loop() {
			s.Usable()
		}
	})
	b.Run("service/all", func(b *testing.B) {
		for b.Loop() {
			s.UsableFor("pkg.Service")
		}
	})
	s.SetNotServing("pkg.Other")
	b.Run("service/one down", func(b *testing.B) {
		for b.Loop() {
			s.UsableFor("pkg.Service")
		}
	})
	b.Run("begin", func(b *testing.B) {
		for b.Loop() {
			s.TryBegin()
			s.End()
		}
	})
}
