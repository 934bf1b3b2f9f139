package upstream

import "sync/atomic"

// Reason says why an endpoint takes no new calls. Reasons add up: an endpoint is usable when none is set.
type Reason uint32

const (
	// Backoff: the last dial failed and the wait before the next has not passed.
	Backoff Reason = 1 << iota
	// Unhealthy: a health check says so.
	Unhealthy
)

// State is the live state of one endpoint, shared by all that use it. All methods may be called concurrently. The
// zero value is a usable endpoint without calls.
type State struct {
	active  atomic.Int64
	reasons atomic.Uint32
}

// Active is the number of calls in flight on the endpoint.
func (s *State) Active() int64 { return s.active.Load() }

// Begin counts one more call in flight.
func (s *State) Begin() { s.active.Add(1) }

// End is Begin's counterpart; a call ends once, at its very end.
func (s *State) End() { s.active.Add(-1) }

// Usable tells whether new calls may go to the endpoint. Pickers ask it for each candidate.
func (s *State) Usable() bool { return s.reasons.Load() == 0 }

// Has tells whether the reason is set.
func (s *State) Has(r Reason) bool { return s.reasons.Load()&uint32(r) != 0 }

// Set adds a reason, Clear takes it away. Both return whether that changed anything.
func (s *State) Set(r Reason) bool { return s.reasons.Or(uint32(r))&uint32(r) == 0 }

// Clear takes a reason away.
func (s *State) Clear(r Reason) bool { return s.reasons.And(^uint32(r))&uint32(r) != 0 }

// SetUsable sets or clears Unhealthy.
func (s *State) SetUsable(ok bool) {
	if ok {
		s.Clear(Unhealthy)
	} else {
		s.Set(Unhealthy)
	}
}
