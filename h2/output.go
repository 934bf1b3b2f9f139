package h2

import (
	"encoding/binary"
	"runtime"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

const (
	clientPreface = http2.ClientPreface
	headerLen     = 9
)

// buffer is a pooled byte slice; the struct spares an allocation per trip through the pool.
type buffer struct{ b []byte }

var outBuffers = sync.Pool{New: func() any { return &buffer{make([]byte, 0, 8<<10)} }}

func putOutBuffer(b *buffer) {
	if cap(b.b) <= 1<<20 {
		b.b = b.b[:0]
		outBuffers.Put(b)
	}
}

func (c *Conn) outBuffer() *buffer {
	if c.out == nil {
		c.out = outBuffers.Get().(*buffer)
	}
	return c.out
}

// offset is how many bytes were ever appended.
func (c *Conn) offset() uint64 {
	if c.out == nil {
		return c.outBase
	}
	return c.outBase + uint64(len(c.out.b))
}

// pendingLocked is how many bytes wait for the socket.
func (c *Conn) pendingLocked() int {
	n := c.inflight
	if c.out != nil {
		n += len(c.out.b)
	}
	if c.heads != nil {
		n += c.heads.size - c.heads.deadData
	}
	return n
}

// crowdedLocked tells whether so much waits for the socket that nothing more is to be caused. DATA stops earlier.
func (c *Conn) crowdedLocked() bool { return c.pendingLocked() > 2*c.cfg.MaxPending }

// frame appends a frame's header.
func (c *Conn) frame(length int, t http2.FrameType, flags http2.Flags, id uint32) *buffer {
	o := c.outBuffer()
	o.b = append(o.b, byte(length>>16), byte(length>>8), byte(length), byte(t), byte(flags),
		byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
	c.stats.FramesOut++
	return o
}

func (c *Conn) appendData(id uint32, p []byte, end bool) {
	var flags http2.Flags
	if end {
		flags = http2.FlagDataEndStream
	}
	o := c.frame(len(p), http2.FrameData, flags, id)
	o.b = append(o.b, p...)
	c.lim.progress()
}

// appendHeaders appends a header block as HEADERS and, where it is larger than the peer's frames may be, CONTINUATION
// frames, with nothing in between.
func (c *Conn) appendHeaders(id uint32, fields []Field, end bool) {
	flags := http2.FlagHeadersEndHeaders
	if end {
		flags |= http2.FlagHeadersEndStream
	}
	o := c.frame(0, http2.FrameHeaders, flags, id)
	at := len(o.b)
	o.b = c.enc.begin(o.b)
	for i := range fields {
		o.b = c.enc.field(o.b, fields[i])
	}
	c.lim.progress()
	n := len(o.b) - at
	if n <= c.peerMaxFrame {
		setLength(o.b[at-headerLen:], n)
		return
	}
	block := append([]byte(nil), o.b[at+c.peerMaxFrame:]...)
	o.b = o.b[:at+c.peerMaxFrame]
	setLength(o.b[at-headerLen:], c.peerMaxFrame)
	o.b[at-headerLen+4] &^= byte(http2.FlagHeadersEndHeaders)
	for len(block) > 0 {
		k := min(len(block), c.peerMaxFrame)
		flags = 0
		if k == len(block) {
			flags = http2.FlagContinuationEndHeaders
		}
		o = c.frame(k, http2.FrameContinuation, flags, id)
		o.b = append(o.b, block[:k]...)
		block = block[k:]
	}
}

func setLength(header []byte, n int) {
	header[0], header[1], header[2] = byte(n>>16), byte(n>>8), byte(n)
}

// control counts a frame that we send only because the peer made us: their number in the queue is bounded.
func (c *Conn) control() { c.controls++ }

// appendReset appends RST_STREAM. Where it is the peer's doing the caller counts it with control.
func (c *Conn) appendReset(id uint32, code ErrCode) {
	o := c.frame(4, http2.FrameRSTStream, 0, id)
	o.b = binary.BigEndian.AppendUint32(o.b, uint32(code))
}

func (c *Conn) appendWindowUpdate(id, n uint32) {
	o := c.frame(4, http2.FrameWindowUpdate, 0, id)
	o.b = binary.BigEndian.AppendUint32(o.b, n)
}

func (c *Conn) appendPing(ack bool, data uint64) {
	var flags http2.Flags
	if ack {
		flags = http2.FlagPingAck
		c.control()
	}
	o := c.frame(8, http2.FramePing, flags, 0)
	o.b = binary.BigEndian.AppendUint64(o.b, data)
}

func (c *Conn) appendGoAway(last uint32, code ErrCode, debug string) {
	o := c.frame(8+len(debug), http2.FrameGoAway, 0, 0)
	o.b = binary.BigEndian.AppendUint32(o.b, last)
	o.b = binary.BigEndian.AppendUint32(o.b, uint32(code))
	o.b = append(o.b, debug...)
	c.goAwayOut = min(c.goAwayOut, last)
}

// Flush sends what is pending, as far as the socket takes it without blocking; the rest goes to the connection's
// writer goroutine. If somebody is flushing already he takes it along.
func (c *Conn) Flush() {
	c.mu.Lock()
	c.flushLocked()
}

// flushLocked is Flush with mu held; it releases it.
func (c *Conn) flushLocked() {
	if c.flushing || c.out == nil || c.writeErr != nil {
		c.unlock()
		return
	}
	c.flushing = true
	if !c.sock.canTry {
		c.unlock()
		go c.writeLoop()
		return
	}
	for round := 0; ; round++ {
		b := c.takeLocked()
		if b == nil {
			break
		}
		c.unlock()
		n, err := c.sock.try(b.b)
		c.mu.Lock()
		c.wroteLocked(n)
		if err != nil {
			c.writeFailedLocked(err)
			putOutBuffer(b)
			break
		}
		// A reader must not become the writer of everybody's frames either: after a few rounds it hands over.
		if n < len(b.b) || round == 3 && c.out != nil {
			if c.cur, c.curOff = b, n; n == len(b.b) {
				putOutBuffer(b)
				c.cur = nil
			}
			c.stats.HandOvers++
			c.unlock()
			go c.writeLoop()
			return
		}
		putOutBuffer(b)
		if c.out == nil {
			break
		}
	}
	c.flushing = false
	c.flushedLocked()
	c.emptierLocked()
	if c.waiters.first != nil && c.roomLocked() {
		// Those who wait for room are called by the reader or the writer, never by whoever happens to flush.
		c.flushing = true
		go c.writeLoop()
	}
	c.unlock()
}

// FlushSoon lets the connection's writer goroutine flush, when those who can run now have run, so that frames of
// several callers leave together.
func (c *Conn) FlushSoon() {
	c.mu.Lock()
	if !c.flushing && c.out != nil && c.writeErr == nil {
		c.flushing = true
		go c.writeSoon()
	}
	c.unlock()
}

// writeSoon stands behind the goroutines that are ready to run, which may have something to append: on a busy
// connection that saves system calls, on a quiet one it costs next to nothing.
func (c *Conn) writeSoon() {
	runtime.Gosched()
	c.writeLoop()
}

// takeLocked takes the pending buffer for writing; nil if all that was in it was discarded.
func (c *Conn) takeLocked() *buffer {
	c.sealLocked()
	b := c.out
	c.out = nil
	if len(b.b) == 0 {
		putOutBuffer(b)
		return nil
	}
	c.outBase += uint64(len(b.b))
	c.stats.PendingPeak = max(c.stats.PendingPeak, c.inflight+len(b.b))
	c.inflight += len(b.b)
	c.stats.Flushes++
	c.controls = 0
	c.handed = c.outBase // until the write has returned nobody knows better: the peer may have acted on it before that
	return b
}

// wroteLocked notes that n more bytes have left.
func (c *Conn) wroteLocked(n int) {
	c.inflight -= n
	c.stats.BytesOut += uint64(n)
	if c.sock.exact {
		c.written += uint64(n)
		c.handed = c.written // else a TLS record may have left although the write failed
	}
}

// flushedLocked is called when a flusher leaves.
func (c *Conn) flushedLocked() {
	if c.stalled || c.over != nil {
		c.cond.Broadcast()
	}
}

// writeLoop is the writer goroutine. It owns the flushing flag and lives as long as there is something to write.
func (c *Conn) writeLoop() {
	c.mu.Lock()
	for c.writeErr == nil {
		if c.cur == nil {
			c.emptierLocked()
			if c.waiters.first != nil && c.roomLocked() {
				c.serveWaitersLocked()
			}
			if c.out == nil || c.writeErr != nil {
				break
			}
			if c.cur, c.curOff = c.takeLocked(), 0; c.cur == nil {
				continue // streams may have become free to write, or to be opened
			}
		}
		p := c.cur.b[c.curOff:]
		c.handed = c.outBase
		c.unlock()
		n, err := c.sock.write(p)
		c.mu.Lock()
		c.curOff += n
		c.wroteLocked(n)
		if err != nil {
			c.writeFailedLocked(err)
			break
		}
		if c.curOff == len(c.cur.b) {
			putOutBuffer(c.cur)
			c.cur = nil
		}
		if c.stalled && c.pendingLocked() <= c.cfg.MaxPending {
			c.cond.Broadcast()
		}
	}
	c.cur = nil
	c.flushing = false
	c.flushedLocked()
	c.unlock()
}

// writeFailedLocked stops all writing. What the peer has sent may still explain it (a GOAWAY, the last answers), so
// the reader gets a moment to read on before the connection ends.
func (c *Conn) writeFailedLocked(err error) {
	if c.writeErr != nil {
		return
	}
	c.writeErr = err
	c.loseHeadsLocked()
	c.out, c.inflight = nil, 0
	if isTimeout(err) {
		c.endLocked(&Error{Kind: KindTimeout, Debug: "the peer reads nothing", Err: err}, false)
	} else if c.over == nil {
		_ = c.nc.SetReadDeadline(time.Now().Add(250 * time.Millisecond))
	}
	c.cond.Broadcast()
}

// lostLocked tells whether a stream of the client role was taken for writing, or waited for that, but will never leave, since
// the socket has failed before it.
func (c *Conn) lostLocked(s *Stream) bool {
	return c.client && c.writeErr != nil && uint64(s.began) >= c.handed
}

// emptierLocked lets streams be opened again. That is where those who wait to write are served, so that neither can take all
// the room before the others come.
func (c *Conn) emptierLocked() {
	if c.full && c.pendingLocked() <= c.cfg.MaxPending/2 {
		c.full = false
		c.events |= evCapacity
	}
}

// roomLocked tells whether a waiter could write.
func (c *Conn) roomLocked() bool {
	return c.sendWin > 0 && c.pendingLocked() <= c.cfg.MaxPending/2 && c.over == nil
}

// serveWaitersLocked lets streams that wait for the connection write, first come, first served, while there is room.
// It releases mu during their calls.
func (c *Conn) serveWaitersLocked() {
	for c.waiters.first != nil && c.roomLocked() {
		s := c.waiters.first
		c.waiters.remove(s)
		if !s.waiting || s.sendWin <= 0 {
			continue // its own WINDOW_UPDATE will find it
		}
		if s.shortLocked() {
			c.capped.add(s)
			continue
		}
		s.callWaiterLocked()
	}
}

// callWaiterLocked tells a stream's writer that it can go on. It releases mu during the call. While accept, or a call of
// RecvWriteReady by the connection's other goroutine, runs, it only leaves a note.
func (s *Stream) callWaiterLocked() {
	if s.blocking {
		s.wakeLocked()
		return
	}
	s.waiting = false
	s.callDue = true
	if !s.calling {
		s.calling = true
		s.callReadyLocked()
	}
}

// callReadyLocked makes the calls of RecvWriteReady that are due, until none is. The caller has set s.calling; mu is released
// during the calls.
func (s *Stream) callReadyLocked() {
	w, ok := s.r.(WriteReadier)
	for ok && s.callDue && !s.closed {
		s.callDue = false
		s.c.unlock()
		w.RecvWriteReady(s)
		s.c.mu.Lock()
	}
	s.calling, s.callDue = false, false
}
