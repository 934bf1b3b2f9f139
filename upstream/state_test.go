package upstream

import (
	"slices"
	"sync"
	"testing"
	"time"
)

func TestStateChanges(t *testing.T) {
	var s State
	var seen []Change
	stop := s.Watch(func(c Change) { seen = append(seen, c) })
	steps := []struct {
		do     func() bool
		moved  bool
		usable bool
		told   []Change
	}{
		{func() bool { return s.Set(Backoff) }, true, false, []Change{BecameUnusable}},
		{func() bool { return s.Set(Backoff) }, false, false, nil},
		{func() bool { return s.Set(Unhealthy) }, true, false, nil},
		{func() bool { return s.Clear(Backoff) }, true, false, nil},
		{func() bool { return s.Clear(Unhealthy) }, true, true, []Change{BecameUsable}},
		{func() bool { return s.Clear(Unhealthy) }, false, true, nil},
	}
	for i, st := range steps {
		seen = nil
		if got := st.do(); got != st.moved || s.Usable() != st.usable || !slices.Equal(seen, st.told) {
			t.Errorf("step %d: changed %v, usable %v, told %v; want %+v", i, got, s.Usable(), seen, st)
		}
	}
	stop()
	seen = nil
	s.Set(Backoff)
	if seen != nil {
		t.Errorf("told %v after stop", seen)
	}
}

func TestStateConnected(t *testing.T) {
	var s State
	var seen []Change
	defer s.Watch(func(c Change) { seen = append(seen, c) })()
	first := time.Unix(1000, 0)
	s.SetConnected(first)
	s.SetConnected(first.Add(time.Hour))
	if got := s.Connected(); !got.Equal(first) {
		t.Errorf("connected since %v, not %v", got, first)
	}
	s.SetConnected(time.Time{})
	s.SetConnected(time.Time{})
	if !s.Connected().IsZero() || !slices.Equal(seen, []Change{Disconnected}) {
		t.Errorf("connected since %v, told %v", s.Connected(), seen)
	}
}

// Two watchers, one of which leaves while both are told things.
func TestStateWatchConcurrently(t *testing.T) {
	var s State
	told := make(chan struct{}, 1)
	defer s.Watch(func(Change) {
		select {
		case told <- struct{}{}:
		default:
		}
	})()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 200 {
				stop := s.Watch(func(Change) {})
				s.Set(Unhealthy)
				s.Clear(Unhealthy)
				stop()
			}
		})
	}
	wg.Wait()
	select {
	case <-told:
	default:
		t.Error("the watcher was told nothing")
	}
	if len(s.watchers) != 1 {
		t.Errorf("%d watchers are left", len(s.watchers))
	}
}

func TestStateMemory(t *testing.T) {
	type key struct{ decay time.Duration }
	var s State
	a := s.Memory(key{1}, func() any { return new(int) })
	if b := s.Memory(key{1}, func() any { return new(int) }); a != b {
		t.Error("what was remembered is another thing now")
	}
	if b := s.Memory(key{2}, func() any { return new(int) }); a == b {
		t.Error("two keys share what is remembered")
	}
	if w := s.Work(); w != s.Work() {
		t.Error("the counters of work are others each time")
	}
}

// What comes and goes with single calls keeps calls away, and tells no watcher.
func TestNoRoom(t *testing.T) {
	var s State
	changes := 0
	defer s.Watch(func(Change) { changes++ })()
	s.SetRoom(false)
	s.SetRoom(false)
	if s.Usable() || s.UsableFor("a") || !s.UsableExcept(NoRoom) || s.Status().Condition != ConditionHealthy {
		t.Errorf("full: usable %v, %+v", s.Usable(), s.Status())
	}
	s.SetNotServing("a")
	for service, want := range map[string]bool{"a": false, "b": true} {
		if s.UsableFor(service) || s.UsableForExcept(service, NoRoom) != want {
			t.Errorf("service %s: usable %v, but for the room %v", service, s.UsableFor(service), s.UsableForExcept(service, NoRoom))
		}
	}
	s.SetRoom(true)
	if !s.Usable() || changes != 1 { // the services
		t.Errorf("usable %v, %d changes", s.Usable(), changes)
	}
}

// IsConnected is Connected in short.
func TestIsConnected(t *testing.T) {
	var s State
	for _, at := range []time.Time{{}, time.Now(), {}} {
		s.SetConnected(at)
		if s.IsConnected() == at.IsZero() || s.IsConnected() == s.Connected().IsZero() {
			t.Errorf("connected since %v: %v", at, s.IsConnected())
		}
	}
}
