package upstream

import "time"

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
	over := s.trial == t
	if over {
		s.trial = 0
		s.reasons.And(^uint32(OnTrial))
	}
	s.mu.Unlock()
	if over {
		s.notify(Stirred)
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

// load has the calls on the address.
func (s *State) load() *Load {
	if s.shared != nil {
		return s.shared
	}
	return &s.own
}

// Active is the number of calls in flight on the address.
func (s *State) Active() int64 { return s.load().Active() }

// Begun is how many calls have ever begun there. It overflows: that it has changed says that calls have come.
func (s *State) Begun() uint32 { return s.load().begun() }

// Begin counts one more call in flight.
func (s *State) Begin() { s.load().begin() }

// End is Begin's counterpart; a call ends once, at its very end.
func (s *State) End() { s.load().end() }

// SetLimit makes the endpoint unusable (Full) while so many calls or more are in flight on the address; 0 takes the limit
// away.
func (s *State) SetLimit(n int64) {
	s.load().setLimit(s, n)
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
				s.notify(Stirred)
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
