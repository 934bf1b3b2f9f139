package upstream

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// State is what is thought of one endpoint by those who judge its health in the same way. It also shows what is true for
// others as well: how many calls are on the address (Load), and how the connections are (Link). So pickers look at one thing.
// All methods may be called concurrently. The zero value is a usable endpoint without calls.
type State struct {
	shared  *Load // of the address; nil for own
	own     Load
	limit   atomic.Int64 // of calls in flight, see SetLimit
	reasons atomic.Uint32

	connected  atomic.Int64 // Unix nanoseconds
	usable     atomic.Int64 // since when, in Unix nanoseconds
	warm       atomic.Int64 // how long the endpoint warms up
	work       atomic.Pointer[Work]
	notServing atomic.Pointer[[]string]
	recorder   atomic.Pointer[any]

	mu             sync.Mutex
	trial, trials  Trial     // the call on trial, 0 unless OnTrial is set, and the last one
	trialSince     time.Time // when that began
	memory         map[any]any
	watchers       []*watcher
	statusWatchers []*statusWatcher
	notes          [noted]note
}

// States is the process's States.
var States = NewPool[*State]()

// NewState returns a State of an address with this load.
func NewState(l *Load) *State { return &State{shared: l} }

// Destruct does nothing: a State has nothing to give back.
func (*State) Destruct() error { return nil }

// Usable tells whether new calls may go to the endpoint. Pickers ask it for each candidate.
func (s *State) Usable() bool { return s.reasons.Load()&uint32(unusable) == 0 }

// UsableExcept is Usable for those to whom the reasons mean nothing: a sticky session may stay on an endpoint that is
// Draining.
func (s *State) UsableExcept(r Reason) bool { return s.reasons.Load()&uint32(unusable&^r) == 0 }

// Has tells whether one of the reasons is set.
func (s *State) Has(r Reason) bool { return s.reasons.Load()&uint32(r) != 0 }

// Set adds a reason, Clear takes it away. Both return whether that changed anything.
func (s *State) Set(r Reason) bool { return s.Change(r, 0, "") }

// SetWhy is Set with a text for people, which Status shows. It replaces the text of a reason that is set already.
func (s *State) SetWhy(r Reason, why string) bool { return s.Change(r, 0, why) }

// Clear takes a reason away.
func (s *State) Clear(r Reason) bool { return s.Change(0, r, "") }

// SetUsable sets or clears Unhealthy.
func (s *State) SetUsable(ok bool) {
	if ok {
		s.Clear(Unhealthy)
	} else {
		s.Set(Unhealthy)
	}
}

// Change adds and takes away reasons in one step, and returns whether that changed anything.
func (s *State) Change(add, remove Reason, why string) bool {
	changed, tell := s.change(add, remove, why)
	tell()
	return changed
}

// change is Change, but for telling the watchers. That is tell's, for when no lock is held.
func (s *State) change(add, remove Reason, why string) (changed bool, tell func()) {
	now := time.Now()
	s.mu.Lock()
	before := s.statusLocked(now)
	old, is := s.swap(add, remove)
	if is&OnTrial == 0 {
		s.trial = 0
	}
	if old != is && is&lasting == 0 && old&(lasting|Probation) != 0 && is&Probation == 0 {
		s.usable.Store(now.UnixNano())
	}
	for i := range s.notes {
		switch bit := Reason(1) << i; {
		case is&bit == 0:
			s.notes[i] = note{}
		case old&bit == 0:
			s.notes[i] = note{since: now, text: why}
		case add&bit != 0 && why != "":
			s.notes[i].text = why
		}
	}
	after := s.statusLocked(now)
	watchers, statusWatchers := s.watchers, s.statusWatchers
	s.mu.Unlock()

	return old != is, func() {
		switch was, now := old&lasting == 0, is&lasting == 0; {
		case was && !now:
			tellAll(watchers, BecameUnusable)
		case !was && now:
			tellAll(watchers, BecameUsable)
		}
		if before.Condition != after.Condition || before.Reason != after.Reason {
			for _, w := range statusWatchers {
				w.f(before, after)
			}
		}
	}
}

// swap changes the bits, some of which calls change at the same time.
func (s *State) swap(add, remove Reason) (old, is Reason) {
	for {
		old = Reason(s.reasons.Load())
		is = (old | add) &^ remove
		if old == is || s.reasons.CompareAndSwap(uint32(old), uint32(is)) {
			return old, is
		}
	}
}

// Connected is when the first of the connections that the endpoint has now was made; zero while it has none.
func (s *State) Connected() time.Time {
	if ns := s.connected.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

// IsConnected tells whether the endpoint has a connection.
func (s *State) IsConnected() bool { return s.connected.Load() != 0 }

// SetConnected records that the endpoint has a connection since t, or none any more (zero t).
func (s *State) SetConnected(t time.Time) {
	if s.setConnected(t) {
		s.notify(Disconnected)
	}
}

func (s *State) setConnected(t time.Time) (lost bool) {
	if t.IsZero() {
		return s.connected.Swap(0) != 0
	}
	s.connected.CompareAndSwap(0, t.UnixNano())
	return false
}

// Work counts what has been done on an endpoint: messages and their bytes, in both directions, of calls that are under
// way too.
type Work struct{ messages, bytes atomic.Uint64 }

// Add counts messages and bytes.
func (w *Work) Add(messages, bytes uint64) {
	if messages > 0 {
		w.messages.Add(messages)
	}
	w.bytes.Add(bytes)
}

// Messages and Bytes are the sums so far.
func (w *Work) Messages() uint64 { return w.messages.Load() }

// Bytes is the sum of messages' bytes.
func (w *Work) Bytes() uint64 { return w.bytes.Load() }

// Work returns the endpoint's counters of work, which nobody fills unless a policy asks for that (selection.Needs).
func (s *State) Work() *Work {
	if w := s.work.Load(); w != nil {
		return w
	}
	s.work.CompareAndSwap(nil, new(Work))
	return s.work.Load()
}

// Memory returns what is remembered about the endpoint under the key, made by create if there is nothing yet. A policy
// keeps here what it has learned, so that it survives the pickers that learned it, reloads and short absences. The key
// is a value of a type of the policy's own that says what makes it different (its decay time, say).
func (s *State) Memory(key any, create func() any) any {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.memory[key]
	if !ok {
		if s.memory == nil {
			s.memory = make(map[any]any)
		}
		v = create()
		s.memory[key] = v
	}
	return v
}

// Change is what watchers of a State are told.
type Change uint8

const (
	// BecameUsable: the last reason not to use the endpoint is gone.
	BecameUsable Change = iota
	// BecameUnusable: there is one.
	BecameUnusable
	// Disconnected: the endpoint's last connection is gone.
	Disconnected
	// ServicesChanged: the services are others that the endpoint does not serve.
	ServicesChanged
	// Stirred: something has changed that concerns only calls that wait: there is room for another one again, or a dial is over.
	Stirred
)

type watcher struct{ f func(Change) }

// Watch calls f at every change until stop is called; a call may still be under way then. f must not block. It is told
// that something changed, not in which order: it reads the state anew.
func (s *State) Watch(f func(Change)) (stop func()) {
	w := &watcher{f}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchers = append(slices.Clip(s.watchers), w)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		kept := make([]*watcher, 0, len(s.watchers))
		for _, v := range s.watchers {
			if v != w {
				kept = append(kept, v)
			}
		}
		s.watchers = kept
	}
}

func (s *State) notify(c Change) {
	s.mu.Lock()
	watchers := s.watchers
	s.mu.Unlock()
	tellAll(watchers, c)
}

func tellAll(watchers []*watcher, c Change) {
	for _, w := range watchers {
		w.f(c)
	}
}
