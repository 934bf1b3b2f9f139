package upstream

import (
	"sync/atomic"
	"time"
)

// Trial is the number of a call on trial, 0 for any other call.
type Trial uint32

// TryBegin counts one more call in flight, like Begin, unless the endpoint is on probation and serves its one call
// already: pickers that asked at the same time may have seen it free, and all but one of them have to ask again. If the
// call is that one, it has a number. Whoever learns how it went clears OnTrial (EndTrial) or what else is due.
func (s *State) TryBegin() (trial Trial, ok bool) {
	if s.Has(Probation) {
		return s.tryTrial()
	}
	s.Begin()
	return 0, true
}

func (s *State) tryTrial() (trial Trial, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.Has(OnTrial):
		return 0, false
	case s.Has(Probation): // else it has ended meanwhile
		s.trials = max(s.trials+1, 1)
		s.trial, s.trialSince = s.trials, time.Now()
		s.reasons.Or(uint32(OnTrial))
	}
	s.Begin()
	return s.trial, true
}

// EndTrial lets the endpoint have another call on trial, since this one said nothing about it. It does nothing if that was
// done before: another call may be on trial by now.
func (s *State) EndTrial(t Trial) {
	if t == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.trial == t {
		s.trial = 0
		s.reasons.And(^uint32(OnTrial))
	}
}

// Trial is the call on trial, 0 if there is none, and when the last one began.
func (s *State) Trial() (t Trial, since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trial, s.trialSince
}

// LastTrial is the number of the last call on trial, whatever has become of it.
func (s *State) LastTrial() Trial {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trials
}

// calls counts, in one word, the calls in flight (its lower half) and those that ever began (the upper half, which overflows).
type calls struct{ v atomic.Uint64 }

const oneBegun = 1 << 32

func (c *calls) begin() (active int64) { return inFlight(c.v.Add(oneBegun + 1)) }
func (c *calls) end() (active int64)   { return inFlight(c.v.Add(^uint64(0))) }
func (c *calls) active() int64         { return inFlight(c.v.Load()) }
func (c *calls) begun() uint32         { return uint32(c.v.Load() / oneBegun) }

func inFlight(v uint64) int64 { return int64(int32(v)) } // the lower half, with its sign

// Begin counts one more call in flight.
func (s *State) Begin() {
	n := s.calls.begin()
	if l := s.limit.Load(); l != 0 && n >= l {
		s.fill()
	}
}

// End is Begin's counterpart; a call ends once, at its very end.
func (s *State) End() {
	n := s.calls.end()
	if l := s.limit.Load(); l != 0 && n < l {
		s.fill()
	}
}

// SetLimit makes the endpoint unusable (Full) while so many calls or more are in flight; 0 takes the limit away.
func (s *State) SetLimit(n int64) {
	s.limit.Store(n)
	s.fill()
}

// fill sets or clears Full. Calls come and go meanwhile, so whoever wrote last looks again.
func (s *State) fill() {
	for {
		full := s.isFull()
		if full != s.Has(Full) {
			if full {
				s.reasons.Or(uint32(Full))
			} else {
				s.reasons.And(^uint32(Full))
			}
		}
		if s.isFull() == full {
			return
		}
	}
}

func (s *State) isFull() bool {
	l := s.limit.Load()
	return l != 0 && s.Active() >= l
}

// SetRoom sets or clears NoRoom: whether the endpoint's connections can take another call.
func (s *State) SetRoom(room bool) {
	switch {
	case room == !s.Has(NoRoom):
	case room:
		s.reasons.And(^uint32(NoRoom))
	default:
		s.reasons.Or(uint32(NoRoom))
	}
}

// Begun is how many calls have ever begun. It overflows: that it has changed says that calls have come.
func (s *State) Begun() uint32 { return s.calls.begun() }

// Recorder is what InitRecorder made, nil before.
func (s *State) Recorder() any {
	if p := s.recorder.Load(); p != nil {
		return *p
	}
	return nil
}

// InitRecorder returns the one thing per endpoint that counts how attempts went, made by create if there is none yet.
// Unlike Memory, reading it takes no lock.
func (s *State) InitRecorder(create func() any) any {
	if s.recorder.Load() == nil {
		v := create()
		s.recorder.CompareAndSwap(nil, &v)
	}
	return s.Recorder()
}
