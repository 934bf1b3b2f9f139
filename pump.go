package grpcproxy

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

const (
	// firstChunk is how much of a request is read at first: most messages are small, and an idle stream keeps it.
	firstChunk = 4 << 10
	// maxChunk is what a busy request's buffer grows to, and the replay buffer's bound (linkerd2-proxy: 64 KiB).
	maxChunk = 64 << 10
	// quietConn is how many streams a connection may have for its frames to be sent one by one.
	quietConn = 4
	// maxReplay bounds the replay buffers of all calls together, beyond the first chunk of each.
	maxReplay = 64 << 20
)

// replayHeld is the bytes that replay buffers hold beyond first chunks.
var replayHeld atomic.Int64

var chunks = sync.Pool{New: func() any { b := make([]byte, 0, firstChunk); return &b }}

// sender is the request's way: from the client's body to the current attempt. Until the call is committed, what was
// read is kept, so that it can be sent again to another endpoint.
type sender struct {
	x *exchange

	mu   sync.Mutex
	cond sync.Cond // tells the pump that there is a new attempt, or that the call is over
	att  *attempt  // where bytes go; nil between attempts
	// buf holds the request from offset start on. Only the pump changes it, under mu; it reads new bytes into the
	// spare capacity without mu.
	pooled *[]byte
	buf    []byte
	start  int64
	held   int64 // what buf counts in replayHeld
	// keep: nothing of buf may be dropped, since the call may have to be sent again.
	keep bool
	// committed is set by the responder, which must not wait for mu: a pump that is blocked by flow control holds it.
	committed atomic.Bool
	eof       bool
	stopped   bool
	framing   grpcwire.Framing
	// full: the last read took all the space there was. quiet counts the reads since then that a first chunk had
	// been enough for.
	full  bool
	quiet int
}

func (s *sender) init(x *exchange) {
	s.x = x
	s.cond.L = &s.mu
	s.keep = true
	s.pooled = chunks.Get().(*[]byte)
	s.buf = (*s.pooled)[:0]
}

// release gives the buffer back. Nothing may be sent any more.
func (s *sender) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
	s.start += int64(len(s.buf)) // counts is still asked
	s.buf = nil
	if s.pooled != nil {
		chunks.Put(s.pooled)
		s.pooled = nil
	}
	replayHeld.Add(-s.held)
	s.held = 0
}

// pump reads the client's request and sends it on until it ends, cannot be read, or the call is over.
func (x *exchange) pump() {
	s := &x.send
	var total int64
	for s.room() {
		n, err := x.body.Read(s.buf[len(s.buf):cap(s.buf)])
		if n > 0 {
			x.moved.Add(int64(n))
			total += int64(n)
		}
		eof := errors.Is(err, io.EOF)
		if eof && x.r.ProtoMajor == 3 && total < x.r.ContentLength { // which the HTTP/3 server does not look at
			x.cut(requestLength(bodyShorter))
			return
		}
		if !s.push(n, eof) || eof {
			return
		}
		if err != nil {
			x.cut(fromBody(x.r, err))
			return
		}
	}
}

// room makes space to read into. It returns false when reading on is pointless.
func (s *sender) room() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if s.stopped {
			return false
		}
		if s.committed.Load() {
			s.letGoLocked()
		}
		if !s.keep {
			s.dropLocked()
			s.fitLocked()
		}
		if len(s.buf) < cap(s.buf) {
			return true
		}
		if cap(s.buf) < maxChunk && s.growLocked() {
			return true
		}
		if s.keep && s.att != nil {
			s.letGoLocked() // the request is larger than what can be sent again
			continue
		}
		if s.att == nil {
			s.cond.Wait() // the attempt failed; what is kept goes to the next one first
			continue
		}
		return true
	}
}

// letGoLocked gives up sending the call again: what was sent may be dropped, and the buffer counts as a replay buffer no
// more.
func (s *sender) letGoLocked() {
	s.keep = false
	replayHeld.Add(-s.held)
	s.held = 0
}

// dropLocked forgets what the current attempt was sent.
func (s *sender) dropLocked() {
	if s.att == nil {
		return
	}
	n := s.att.sent - s.start
	s.start += n
	s.buf = s.buf[:copy(s.buf, s.buf[n:])]
}

// quietReads is how many small reads in a row make a large buffer shrink again.
const quietReads = 32

// fitLocked makes the buffer as large as the request's pace wants it: fewer, larger reads for bulk, and not more than a
// first chunk for a stream that has calmed down.
func (s *sender) fitLocked() {
	switch {
	case s.full && cap(s.buf) < maxChunk:
		s.full = false
		s.growLocked()
	case s.quiet >= quietReads && cap(s.buf) > firstChunk && len(s.buf) == 0 && s.pooled != nil:
		s.buf, s.quiet = (*s.pooled)[:0], 0
	}
}

func (s *sender) growLocked() bool {
	size := min(max(4*cap(s.buf), firstChunk), maxChunk)
	extra := int64(size - cap(s.buf))
	if s.keep {
		if replayHeld.Load()+extra > maxReplay {
			return false
		}
		replayHeld.Add(extra)
		s.held += extra
	}
	s.buf = append(make([]byte, 0, size), s.buf...)
	return true
}

// push takes n bytes that were read and sends them on. It returns false when the call is over.
func (s *sender) push(n int, eof bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.buf[len(s.buf) : len(s.buf)+n]
	s.buf = s.buf[:len(s.buf)+n]
	before := s.framing.Messages()
	s.framing.Add(p)
	if s.full = len(s.buf) == cap(s.buf); s.full || n > firstChunk {
		s.quiet = 0
	} else {
		s.quiet++
	}
	if s.att != nil {
		s.att.worked(s.framing.Messages()-before, n)
	}
	s.eof = eof
	if s.stopped {
		return false
	}
	s.flowLocked(true)
	return true
}

// flowLocked sends the current attempt what it has not been sent yet. It may block on flow control, for as long as
// the attempt lives, unless it may not: then it returns false and has sent what it could.
func (s *sender) flowLocked(mayBlock bool) bool {
	a := s.att
	if a == nil || a.ended {
		return true
	}
	p := s.buf[a.sent-s.start:]
	// What the client sent after the body goes no further. gRPC over HTTP/2: "Request → Request-Headers
	// *Length-Prefixed-Message EOS". Servers take a second HEADERS of a request for a violation, and close the connection that
	// all clients share. Where nothing is left to be sent, an empty DATA frame carries the end.
	end := s.eof
	first := a.sent == 0
	if len(p) > 0 || end {
		n, err := a.stream.TryWrite(p, end)
		a.sent += int64(n)
		if err == nil && n < len(p) {
			if !mayBlock {
				a.stream.Conn().Flush()
				return false
			}
			err = s.waitWrite(a, p[n:], end)
			a.sent += int64(len(p) - n)
		}
		a.asked()
		if err != nil {
			s.att = nil // the responder hears of it from the stream, and decides
			return true
		}
	}
	a.ended = s.eof
	if first && !s.eof || a.stream.Conn().Streams() > quietConn {
		// A unary call's end follows at once: wait a moment for it, so that the whole call leaves in one packet. And on
		// a busy connection others have something to send as well.
		a.stream.Conn().FlushSoon()
		return true
	}
	a.stream.Conn().Flush()
	return true
}

// waitWrite blocks until the upstream takes p. Nobody reads the request meanwhile, and there may be no responder yet: who
// else would notice that the client goes away?
func (s *sender) waitWrite(a *attempt, p []byte, end bool) *h2.Error {
	stop := context.AfterFunc(s.x.r.Context(), func() { s.x.cut(clientGone()) })
	defer stop()
	return a.stream.Write(p, end)
}

// attach makes the attempt the one that gets the request, from its beginning. It does not block: it is called by the one
// who has to handle what comes back.
func (s *sender) attach(a *attempt) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.att = a
	switch {
	case len(s.buf) == 0 && !s.eof:
		a.stream.Conn().FlushSoon()
	case !s.flowLocked(false):
		go func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.att == a && !s.stopped {
				s.flowLocked(true)
			}
		}()
	}
	s.cond.Broadcast()
}

// detach takes the failed attempt away. It tells whether the request can still be sent from its beginning.
func (s *sender) detach(a *attempt) (replayable bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.att == a {
		s.att = nil
	}
	return s.keep && s.start == 0
}

// commit tells that the call will not be sent again.
func (s *sender) commit() { s.committed.Store(true) }

// stop ends the pump.
func (s *sender) stop() {
	s.mu.Lock()
	s.stopped = true
	s.cond.Broadcast()
	s.mu.Unlock()
}

func (s *sender) counts() (bytes, messages int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.start + int64(len(s.buf)), s.framing.Messages()
}
