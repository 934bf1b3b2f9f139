package upstream

import "time"

// TryBegin counts one more call in flight, like Begin, unless the endpoint is on probation and serves its one call
// already: pickers that asked at the same time may have seen it free, and all but one of them have to ask again. trial
// tells that the call is that one. Whoever learns how it went clears OnTrial (EndTrial) or what else is due.
func (s *State) TryBegin() (trial, ok bool) {
	for {
		r := s.reasons.Load()
		switch {
		case r&uint32(Probation) == 0:
			s.Begin()
			return false, true
		case r&uint32(OnTrial) != 0:
			return false, false
		case s.reasons.CompareAndSwap(r, r|uint32(OnTrial)):
			s.trial.Store(time.Now().UnixNano())
			s.Begin()
			return true, true
		}
	}
}

// EndTrial lets the endpoint have another call on trial, since the last one said nothing about it.
func (s *State) EndTrial() { s.reasons.And(^uint32(OnTrial)) }

// TrialSince is when the last call on trial began.
func (s *State) TrialSince() time.Time { return fromNano(s.trial.Load()) }

// Begin counts one more call in flight.
func (s *State) Begin() {
	n := s.active.Add(1)
	if !s.touched.Load() {
		s.touched.Store(true)
	}
	if l := s.limit.Load(); l != 0 && n >= l {
		s.fill()
	}
}

// End is Begin's counterpart; a call ends once, at its very end.
func (s *State) End() {
	n := s.active.Add(-1)
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
	return l != 0 && s.active.Load() >= l
}

// Touched tells whether calls have run on the endpoint since it was last asked.
func (s *State) Touched() bool { return s.touched.Swap(false) || s.Active() > 0 }

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
