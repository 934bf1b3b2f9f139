package upstream

import "sync/atomic"

// State is the live state of one endpoint, shared by all that use it. All methods may be called concurrently.
type State struct {
	active   atomic.Int64
	unusable atomic.Bool
}

// Active is the number of calls in flight on the endpoint.
func (s *State) Active() int64 { return s.active.Load() }

// Begin counts one more call in flight, End one less.
func (s *State) Begin() { s.active.Add(1) }

// End is Begin's counterpart; a call ends once, at its very end.
func (s *State) End() { s.active.Add(-1) }

// Usable tells whether new calls may go to the endpoint. Pickers ask it for each candidate.
func (s *State) Usable() bool { return !s.unusable.Load() }

// SetUsable sets what Usable tells. A new State is usable.
func (s *State) SetUsable(ok bool) { s.unusable.Store(!ok) }
