package upstream

import (
	"math/bits"
	"slices"
	"time"
)

// Condition is an endpoint's state in one word.
type Condition uint8

// If several things are true of an endpoint, its condition is the first of these:
//
//	set reason            condition    takes calls
//	Draining              draining     none
//	Unhealthy             unhealthy    none
//	Ejected, Failing      ejected      none
//	Probation             ejected      one at a time, until one succeeds
//	Backoff               unhealthy    none
//	Connecting            connecting   none
//	(slow start)          warming      fewer, where the policy weighs
//	none                  healthy      all
//
// What an operator says comes first, then what the endpoint says of itself, then what calls say of it. Backoff comes
// behind those: it comes and goes with each dial, while the others last.
const (
	ConditionHealthy Condition = iota
	ConditionWarming
	ConditionConnecting
	ConditionEjected
	ConditionUnhealthy
	ConditionDraining
)

// String is healthy, warming, connecting, ejected, unhealthy or draining.
func (c Condition) String() string {
	switch c {
	case ConditionHealthy:
		return "healthy"
	case ConditionWarming:
		return "warming"
	case ConditionConnecting:
		return "connecting"
	case ConditionEjected:
		return "ejected"
	case ConditionUnhealthy:
		return "unhealthy"
	case ConditionDraining:
		return "draining"
	}
	return "unknown"
}

// precedence is the table above.
var precedence = [...]struct {
	reason    Reason
	condition Condition
}{
	{Draining, ConditionDraining},
	{Unhealthy, ConditionUnhealthy},
	{Ejected, ConditionEjected},
	{Failing, ConditionEjected},
	{Probation, ConditionEjected},
	{Backoff, ConditionUnhealthy},
	{Connecting, ConditionConnecting},
}

// Status says how an endpoint is doing.
type Status struct {
	Condition Condition
	// Reason is the one that decided, 0 for healthy and warming.
	Reason Reason
	// Text says why, for people. It is empty for healthy and warming.
	Text string
	// Since is when that began; zero if it has been so from the start.
	Since time.Time
}

// note is what is known about a reason that is set.
type note struct {
	since time.Time
	text  string
}

// Status says how the endpoint is doing.
func (s *State) Status() Status {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.statusLocked(now)
}

func (s *State) statusLocked(now time.Time) Status {
	set := Reason(s.reasons.Load())
	for _, p := range precedence {
		if set&p.reason == 0 {
			continue
		}
		i := bits.TrailingZeros32(uint32(p.reason))
		n := s.notes[i]
		if n.text == "" {
			n.text = defaultText[i]
		}
		return Status{Condition: p.condition, Reason: p.reason, Text: n.text, Since: n.since}
	}
	st := Status{Since: s.UsableSince()}
	if w := s.WarmUp(); w > 0 && !st.Since.IsZero() && now.Sub(st.Since) < w {
		st.Condition = ConditionWarming
	}
	return st
}

// UsableSince is when the last of the lasting reasons went, or when the endpoint was found; zero if nobody has noted
// either. Slow start counts from it.
func (s *State) UsableSince() time.Time { return fromNano(s.usable.Load()) }

// Found notes that the endpoint is in use from t on, unless it was before.
func (s *State) Found(t time.Time) { s.usable.CompareAndSwap(0, t.UnixNano()) }

// SetWarmUp says how long the endpoint is warming after it has become usable (slow start).
func (s *State) SetWarmUp(d time.Duration) { s.warm.Store(int64(d)) }

// WarmUp is what SetWarmUp said.
func (s *State) WarmUp() time.Duration { return time.Duration(s.warm.Load()) }

// Drain keeps new calls away from the endpoint until Undrain; the calls that run go on. Both return whether that
// changed anything.
func (s *State) Drain(why string) bool { return s.SetWhy(Draining, why) }

// Undrain ends Drain.
func (s *State) Undrain() bool { return s.Clear(Draining) }

type statusWatcher struct{ f func(from, to Status) }

// WatchStatus calls f whenever the condition or the reason for it has changed (but not when time alone ends the
// warming), until stop is called; a call may still be under way then. f must not block. Two changes that come at once may
// be told in either order.
func (s *State) WatchStatus(f func(from, to Status)) (stop func()) {
	w := &statusWatcher{f}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.statusWatchers = append(slices.Clip(s.statusWatchers), w)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		kept := make([]*statusWatcher, 0, len(s.statusWatchers))
		for _, v := range s.statusWatchers {
			if v != w {
				kept = append(kept, v)
			}
		}
		s.statusWatchers = kept
	}
}

func fromNano(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}
