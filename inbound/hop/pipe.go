package hop

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// pipeBuffer is how much a pipe holds in each direction. Go's server writes once for each frame; what reads the pipe takes many of
// them at once then.
const pipeBuffer = 64 << 10

var pipeBuffers = sync.Pool{New: func() any { return new([pipeBuffer]byte) }}

// Pipe returns the two ends of a connection within the process. They are as those of a TCP connection, with deadlines, but that a write
// is over as soon as its bytes are in the buffer. A quiet one has no buffer.
func Pipe(local, remote net.Addr) (a, b net.Conn) {
	to, from := newHalf(), newHalf()
	return &end{in: from, out: to, local: remote, remote: local}, &end{in: to, out: from, local: local, remote: remote}
}

// end is one end of a pipe.
type end struct {
	in, out       *half
	local, remote net.Addr
}

// Read implements net.Conn.
func (e *end) Read(p []byte) (int, error) { return e.in.read(p) }

// Write implements net.Conn.
func (e *end) Write(p []byte) (int, error) { return e.out.write(p) }

// CloseWrite lets the other end read to the end of what was written.
func (e *end) CloseWrite() error {
	e.out.end(nil)
	return nil
}

// Close implements net.Conn. What was written before can still be read at the other end.
func (e *end) Close() error {
	e.out.end(net.ErrClosed)
	e.in.drop()
	return nil
}

// LocalAddr implements net.Conn.
func (e *end) LocalAddr() net.Addr { return e.local }

// RemoteAddr implements net.Conn.
func (e *end) RemoteAddr() net.Addr { return e.remote }

// SetDeadline implements net.Conn.
func (e *end) SetDeadline(t time.Time) error {
	e.in.reading.set(e.in, t)
	e.out.writing.set(e.out, t)
	return nil
}

// SetReadDeadline implements net.Conn.
func (e *end) SetReadDeadline(t time.Time) error {
	e.in.reading.set(e.in, t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (e *end) SetWriteDeadline(t time.Time) error {
	e.out.writing.set(e.out, t)
	return nil
}

// half is one direction of a pipe.
type half struct {
	mu   sync.Mutex // LOCKS: guards what follows
	cond sync.Cond
	buf  *[pipeBuffer]byte // nil while it is empty
	r, w int               // what is in it is buf[r:w]

	writeErr error // nothing more is written
	ended    bool
	readErr  error // nobody reads any more

	reading, writing deadline
}

func newHalf() *half {
	h := new(half)
	h.cond.L = &h.mu
	return h
}

// deadline is when reading, or writing, fails.
type deadline struct {
	timer  *time.Timer
	at     time.Time
	passed bool
}

func (d *deadline) set(h *half, t time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
	d.at, d.passed = t, !t.IsZero() && !t.After(time.Now())
	h.cond.Broadcast()
	if t.IsZero() || d.passed {
		return
	}
	d.timer = time.AfterFunc(time.Until(t), func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if d.at.Equal(t) { // else it was changed meanwhile
			d.passed = true
			h.cond.Broadcast()
		}
	})
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.readErr != nil:
			return 0, h.readErr
		case h.reading.passed:
			return 0, os.ErrDeadlineExceeded
		case h.w > h.r:
			n := copy(p, h.buf[h.r:h.w])
			if h.r += n; h.r == h.w {
				h.freeLocked()
			}
			h.cond.Broadcast()
			return n, nil
		case h.ended:
			return 0, io.EOF
		case len(p) == 0:
			return 0, nil
		}
		h.cond.Wait()
	}
}

func (h *half) write(p []byte) (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.writeErr != nil:
			return n, h.writeErr
		case h.readErr != nil:
			return n, io.ErrClosedPipe
		case h.writing.passed:
			return n, os.ErrDeadlineExceeded
		case len(p) == 0:
			return n, nil
		}
		if k := h.putLocked(p); k > 0 {
			n += k
			p = p[k:]
			h.cond.Broadcast()
			continue
		}
		h.cond.Wait()
	}
}

func (h *half) putLocked(p []byte) int {
	if h.buf == nil {
		h.buf = pipeBuffers.Get().(*[pipeBuffer]byte)
	}
	if h.r > 0 && pipeBuffer-h.w < len(p) {
		h.w = copy(h.buf[:], h.buf[h.r:h.w])
		h.r = 0
	}
	n := copy(h.buf[h.w:], p)
	h.w += n
	return n
}

func (h *half) freeLocked() {
	if h.buf != nil {
		pipeBuffers.Put(h.buf)
	}
	h.buf, h.r, h.w = nil, 0, 0
}

// end lets nothing more be written.
func (h *half) end(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended = true; h.writeErr == nil || err != nil {
		h.writeErr = err
	}
	if h.writeErr == nil {
		h.writeErr = io.ErrClosedPipe
	}
	h.writing.stop()
	h.cond.Broadcast()
}

// drop lets nothing more be read.
func (h *half) drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.readErr = net.ErrClosed
	h.reading.stop()
	h.freeLocked()
	h.cond.Broadcast()
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
}
