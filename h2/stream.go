package h2

// Stream is one request and its response. Its methods may be called concurrently, from receivers too; frames of one
// stream are appended in the order of the calls, so its writer should be one goroutine at a time.
type Stream struct {
	c  *Conn
	id uint32

	// Under c.mu.
	sentEnd  bool // END_STREAM was appended
	recvEnd  bool // END_STREAM came
	closed   bool // both, or reset: no longer in the table
	headDone bool // client role: the final response head came. server role: an answer was begun
	noBody   bool // client role: the request was HEAD
	waiting  bool // a write took less than it was given
	blocking bool // the one who waits is in Write
	calling  bool // RecvWriteReady runs, or accept
	callDue  bool // RecvWriteReady is to be called then
	done     bool // server role: the owner of the receiver has said so

	wants   uint16 // what the one who waits needs at least of its share (share.go)
	staged  int32  // client role: DATA appended while HEADERS wait
	expires int32  // server role: milliseconds after which the client is expected to give up, 0 if unknown
	// began is, in the client role, where HEADERS stand in all that was ever appended, or why they have no place there (heads.go);
	// in the server role, the nano at which the request head was read.
	began int64
	wake  chan struct{}
	err   *Error // why it is over, if not in order

	list          *waiters // that it is in, between before and after
	before, after *Stream

	// Output flow control (share.go).
	unacked int64 // sent, and not known to be given back

	r       Receiver
	sendWin int64
	recvWin int64 // what the peer may still send
	window  int64 // what it is granted when nothing is held
	held    int64 // delivered, not yet consumed
	owed    int64 // consumed, not yet given back
	grantAt int64 // nano of the last grant, or of the first DATA
	want    int64 // content-length still to come, -1 if unknown
}

// ID is the stream's identifier.
func (s *Stream) ID() uint32 { return s.id }

// Conn is the stream's connection.
func (s *Stream) Conn() *Conn { return s.c }

// Closed tells whether the stream is over: both sides have ended, or one has reset it.
func (s *Stream) Closed() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.closed
}

// Err says why the stream is over; nil while it is open and when both sides ended in order, unless what its receiver held was given up
// afterwards (KindMemory).
func (s *Stream) Err() *Error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.err
}

// writeErrLocked says why nothing can be written, nil if something can.
func (s *Stream) writeErrLocked() *Error {
	switch {
	case s.err != nil:
		return s.err
	case s.closed || s.sentEnd:
		return &Error{Kind: KindLocal, Code: StreamClosed, Debug: "write after the end of the stream"}
	}
	return nil
}

// WriteHeaders appends a header block: an informational or final response head or trailers (server role), trailers
// (client role, with end). Field names must be lower case, pseudo-header fields first. It does not wait for windows
// and does not flush. What TryWrite has not taken yet would arrive behind trailers, so write that first.
func (s *Stream) WriteHeaders(fields []Field, end bool) *Error {
	c := s.c
	c.mu.Lock()
	if err := s.writeErrLocked(); err != nil {
		c.unlock()
		return err
	}
	if c.client {
		c.queueHeadLocked(s, fields, false, end)
	} else {
		c.appendHeaders(s.id, fields, end)
		s.headDone = true
	}
	if end {
		s.endSentLocked()
	}
	c.unlock()
	return nil
}

// WriteLast appends, in the server role, the header block that ends the answer. A client that has not ended its request is let send no
// more of it (RFC 9113 section 8.1: "by sending a RST_STREAM with an error code of NO_ERROR after sending a complete response"), with
// nothing in between, and the connection is given credit for what the receiver holds. Else it is like WriteHeaders.
func (s *Stream) WriteLast(fields []Field) *Error {
	c := s.c
	c.mu.Lock()
	err := s.writeErrLocked()
	if err == nil {
		c.appendHeaders(s.id, fields, true)
		s.headDone = true
		s.endSentLocked()
	}
	if s.closed {
		s.forgiveLocked()
	} else {
		s.resetLocked(NoError, &Error{Kind: KindReset, Code: NoError})
	}
	c.unlock()
	return err
}

// endSentLocked notes that END_STREAM was appended.
func (s *Stream) endSentLocked() {
	s.sentEnd = true
	s.wakeLocked()
	s.waiting = false
	s.c.waiters.remove(s)
	s.c.capped.remove(s)
	s.c.fewerSendersLocked()
	if s.recvEnd {
		s.c.lim.completed()
		s.c.removeLocked(s)
	}
}

// TryWrite appends as many bytes of p as the windows of stream and connection and Config.MaxPending allow, as DATA
// frames of the size the peer accepts. It never blocks, copies p and does not flush. end (END_STREAM) takes effect only when
// all of p was taken; an end without bytes needs no window and is always taken. After n < len(p) the receiver's
// RecvWriteReady, if it has one, is called once when more can be written. The error says why the stream can take
// nothing any more.
func (s *Stream) TryWrite(p []byte, end bool) (n int, err *Error) {
	c := s.c
	c.mu.Lock()
	if err = s.writeErrLocked(); err == nil {
		n = s.appendLocked(p, end)
		if n < len(p) {
			s.waitLocked(false)
		}
	}
	c.unlock()
	return n, err
}

// Write appends all of p, and END_STREAM if end is set. Where it must wait for windows or for the socket it flushes
// first; what is appended last is not flushed. It returns early, with the reason, when the stream is over. It must not be
// called by a receiver.
func (s *Stream) Write(p []byte, end bool) *Error {
	c := s.c
	for {
		c.mu.Lock()
		if err := s.writeErrLocked(); err != nil {
			c.unlock()
			return err
		}
		n := s.appendLocked(p, end)
		if n == len(p) {
			c.unlock()
			return nil
		}
		p = p[n:]
		s.waitLocked(true)
		wake := s.wake
		c.unlock()
		c.Flush()
		<-wake
	}
}

// appendLocked appends DATA frames for what may be sent now and returns how many bytes that was.
func (s *Stream) appendLocked(p []byte, end bool) (n int) {
	c := s.c
	for n < len(p) {
		room := min(int64(len(p)-n), s.sendWin, c.sendWin, int64(c.peerMaxFrame), int64(c.cfg.MaxPending-c.pendingLocked()))
		if room > 0 {
			room = s.shareOfLocked(room, len(p)-n)
		}
		if room <= 0 {
			s.wants = uint16(min(len(p)-n, shareStep))
			return n
		}
		k := int(room)
		last := end && n+k == len(p)
		c.appendData(s.id, p[n:n+k], last)
		s.sentLocked(room)
		if s.began == headWaits {
			s.staged += int32(room) // MaxPending bounds it
		}
		n += k
		if last {
			s.endSentLocked()
		}
	}
	if end && len(p) == 0 {
		c.appendData(s.id, nil, true)
		s.endSentLocked()
	}
	return n
}

// waitLocked notes that somebody wants to write more. If only the stream's own window is in the way, its
// WINDOW_UPDATE will find the note; otherwise the stream queues for what all streams share.
func (s *Stream) waitLocked(blocking bool) {
	s.waiting, s.blocking = true, blocking
	if blocking && s.wake == nil {
		s.wake = make(chan struct{}, 1)
	}
	switch {
	case s.sendWin <= 0 || s.list != nil:
	case s.shortLocked():
		s.c.capped.add(s)
	default:
		s.c.waiters.add(s)
	}
}

// waiters is a list of streams, first come, first served. A stream that is over leaves it at once, from wherever it stands:
// what waits for a window that its peer never opens would be kept for the life of the connection.
type waiters struct{ first, last *Stream }

func (w *waiters) add(s *Stream) {
	if s.list != nil {
		return
	}
	s.list = w
	if s.before = w.last; s.before != nil {
		s.before.after = s
	} else {
		w.first = s
	}
	w.last = s
}

func (w *waiters) remove(s *Stream) {
	if s.list != w {
		return
	}
	if s.before != nil {
		s.before.after = s.after
	} else {
		w.first = s.after
	}
	if s.after != nil {
		s.after.before = s.before
	} else {
		w.last = s.before
	}
	s.list, s.before, s.after = nil, nil, nil
}

// wakeLocked releases a blocked Write.
func (s *Stream) wakeLocked() {
	if s.waiting && s.blocking {
		s.waiting = false
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// Reset abandons the stream: it appends RST_STREAM (the flush is the caller's), or, where its HEADERS have not left, takes it
// back without a trace, and releases a blocked Write. On a stream
// that is over it only gives back the credit its receiver still owes. After it has returned no further call of the receiver begins; one may be running.
// After an answer sent in full, NoError tells the client to stop sending (RFC 9113 section 8.1).
func (s *Stream) Reset(code ErrCode) {
	c := s.c
	c.mu.Lock()
	if !s.closed {
		s.resetLocked(code, &Error{Kind: KindReset, Code: code})
	} else {
		s.forgiveLocked()
	}
	c.unlock()
}

// resetLocked appends RST_STREAM, unless the peer does not know the stream, and takes the stream out of the table.
func (s *Stream) resetLocked(code ErrCode, err *Error) {
	c := s.c
	s.err = err
	if s.began >= headLost {
		s.dropLocked()
		return
	}
	c.appendReset(s.id, code)
	c.rememberLocked(s.id)
	c.stray.allow(s.recvWin, s.recvEnd)
	s.dropLocked()
}

// dropLocked takes a stream that did not end in order out of the table, and gives back what its receiver holds.
func (s *Stream) dropLocked() {
	s.forgiveLocked()
	s.c.removeLocked(s)
}

func (s *Stream) forgiveLocked() {
	if c := s.c; s.held > 0 {
		c.held -= s.held
		c.owed += s.held
		s.held = 0
		s.releasedLocked()
		c.chargeLocked()
		c.grantConnLocked()
	}
}
