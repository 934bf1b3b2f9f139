package h2

import "time"

// What the server role does beyond RFC 9113 so that a client cannot have more done for it than MaxStreams says.

// acceptedLocked notes that accept has returned a receiver, and makes the call of RecvWriteReady that became due meanwhile.
func (s *Stream) acceptedLocked(r Receiver) {
	s.r = r
	if s.closed {
		s.lingerLocked()
	}
	s.callReadyLocked()
}

// lingerLocked keeps counting a call whose stream is over before it was answered to the end: the stream has gone at once, what
// works on the call may take a while to notice. An answer that has ended was the last thing its call had to do.
func (s *Stream) lingerLocked() {
	if s.lingersLocked() {
		s.c.lingering++
	}
}

// lingersLocked tells whether a stream is over, but still counted.
func (s *Stream) lingersLocked() bool {
	return s.closed && s.r != nil && !s.c.client && !s.sentEnd && !s.done
}

// Done tells, in the server role, that the call behind the stream's receiver is over: nothing works on it any more. A call
// for which accept has returned a receiver counts against Config.MaxStreams until its answer has ended, or, where the stream
// was reset before, by either side, until Done is called. So a client cannot have more calls worked on by resetting streams
// and opening others (CVE-2023-44487 "rapid reset", CVE-2025-8671 "made you reset"). Call it once for each call, however it
// ended, for example deferred; it may be called at any time, and more than once.
func (s *Stream) Done() {
	c := s.c
	c.mu.Lock()
	if s.lingersLocked() {
		c.lingering--
	}
	s.done = true
	c.mu.Unlock()
}

// Expires tells, in the server role, that the client is expected to give the call up after d, counted from the arrival of its
// head, as gRPC clients do at the deadline that they announce as grpc-timeout. A reset at that time costs no reset budget.
func (s *Stream) Expires(d time.Duration) {
	s.c.mu.Lock()
	s.expires = int32(min(max(d, leastExpiry), longestExpiry) / time.Millisecond)
	s.c.mu.Unlock()
}

const (
	// leastExpiry is the shortest deadline that excuses a reset: one that has passed before it has arrived is no deadline.
	leastExpiry   = time.Millisecond
	longestExpiry = 24 * time.Hour
	// patientFor is for how long a client must have waited for its reset to be no abuse, whatever the deadline. Streams that
	// are kept open for so long are bounded by MaxStreams, which an attack with resets wants to get around.
	patientFor = time.Second
)

// excusedLocked tells whether the peer may reset a stream without a loss of budget, given the time of the reset. The client's
// clock has started earlier than ours, and head and reset have waited in different queues, so half of a deadline is enough.
func (s *Stream) excusedLocked(now int64) bool {
	age := time.Duration(now - s.began)
	return age >= patientFor || s.expires != 0 && age >= time.Duration(s.expires)*time.Millisecond/2
}

// Release takes its receiver off a stream that is over, so that the receiver can be used for something else. It returns false where
// that may still be called, or a call of it by the connection's other goroutine may be running: then it must be left alone. The caller
// must have seen the END_STREAM of the peer. The stream forgets its receiver, so that nothing can reach who comes after.
func (s *Stream) Release() bool {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !s.closed || s.err != nil || !s.recvEnd || s.held > 0 || s.calling {
		return false
	}
	s.r = released{}
	return true
}

// released is what a stream without its receiver has for one.
type released struct{}

// RecvHead implements Receiver.
func (released) RecvHead(*Stream, []Field, bool) {}

// RecvData implements Receiver.
func (released) RecvData(*Stream, []byte, bool) {}

// RecvTrailers implements Receiver.
func (released) RecvTrailers(*Stream, []Field) {}

// RecvReset implements Receiver.
func (released) RecvReset(*Stream, *Error) {}
