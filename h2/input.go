package h2

import (
	"bytes"
	"io"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	bigRead   = 64 << 10
	smallRead = 4 << 10
	// patience is how many small reads in a row make a connection that cannot give its buffer back while it waits
	// (TLS) change to a small one.
	patience = 32
)

var (
	inBuffers   = sync.Pool{New: func() any { return &buffer{make([]byte, bigRead)} }}
	partBuffers = sync.Pool{New: func() any { return &buffer{make([]byte, 0, protocolFrameSize+headerLen)} }}
)

// input is what only the reading goroutine touches.
type input struct {
	buf     *buffer // nil while there is nothing in it and nothing is being read
	part    *buffer // the start of a frame, kept while the reader waits for the rest
	small   buffer  // part, if it is short
	r, w    int     // unread bytes are buf[r:w]
	err     error
	quiet   int // small reads in a row
	prefix  []byte
	got     int    // bytes the last fill brought
	frames  uint64 // frames of this batch
	greeted bool   // server role: the client's preface has been seen
	begun   bool   // the peer's first SETTINGS has been seen

	// Header blocks.
	dec       *hpack.Decoder
	fields    []Field
	list      int // size of the header list so far
	maxList   int
	tooLarge  bool
	selfish   bool   // the last HEADERS has its stream depend on itself (server role)
	blockID   uint32 // stream of an unfinished header block, 0 if none
	blockEnd  bool   // it carried END_STREAM
	block     []byte
	blockMore int // CONTINUATION frames of it
	blockNone int // of them, empty ones
	passed    int // bytes of it that were given up (see passBlock)
}

// shortPart is how long the start of a frame may be to be kept in a buffer of the connection's own.
const shortPart = 512

// grab makes sure that there is a buffer with free space.
func (in *input) grab() {
	if in.buf != nil {
		return
	}
	in.buf = inBuffers.Get().(*buffer)
	in.r, in.w = 0, 0
	if p := in.part; p != nil {
		in.part = nil
		in.w = copy(in.buf.b, p.b)
		if p.b = p.b[:0]; p != &in.small {
			partBuffers.Put(p)
		}
	}
}

// release gives the buffer back while the reader waits. The start of a frame moves to a smaller one, so that peers who
// never send the rest cannot make every connection hold a large buffer.
func (in *input) release() {
	if in.buf == nil || len(in.buf.b) != bigRead {
		return
	}
	if rest := in.buf.b[in.r:in.w]; len(rest) > 0 {
		switch {
		case len(rest) <= shortPart:
			in.part = &in.small
		case len(rest) <= protocolFrameSize+headerLen:
			in.part = partBuffers.Get().(*buffer)
		default:
			return
		}
		in.part.b = append(in.part.b[:0], rest...)
	}
	in.drop()
}

// fit exchanges an empty buffer whose size does not suit the traffic, for connections that hold it while they wait.
func (in *input) fit() {
	if in.buf == nil || in.r != in.w {
		return
	}
	if small := len(in.buf.b) < bigRead; small != (in.quiet >= patience) {
		in.drop()
	}
}

func (in *input) drop() {
	if in.buf != nil && len(in.buf.b) == bigRead {
		inBuffers.Put(in.buf)
	}
	in.buf, in.r, in.w = nil, 0, 0
}

func (in *input) free() []byte { return in.buf.b[in.w:] }

// need makes room for a frame of n bytes whose start is in the buffer.
func (in *input) need(n int) {
	if len(in.buf.b)-in.r >= n {
		return
	}
	if n <= len(in.buf.b) {
		copy(in.buf.b, in.buf.b[in.r:in.w])
	} else {
		grown := &buffer{make([]byte, max(n, bigRead))}
		copy(grown.b, in.buf.b[in.r:in.w])
		w := in.w - in.r
		in.drop()
		in.buf, in.w = grown, w
		in.r = 0
		return
	}
	in.r, in.w = 0, in.w-in.r
}

// fill reads once.
func (c *Conn) fill() error {
	in := &c.in
	if len(in.prefix) > 0 {
		in.grab()
		in.need(in.w - in.r + len(in.prefix))
		in.got = copy(in.free(), in.prefix)
		in.w += in.got
		in.prefix = nil
		return nil
	}
	if in.buf != nil {
		switch {
		case in.r == in.w && len(in.buf.b) > bigRead:
			in.drop() // it was for one very large frame
		case in.r == in.w:
			in.r, in.w = 0, 0
		case len(in.free()) < len(in.buf.b)/2:
			copy(in.buf.b, in.buf.b[in.r:in.w])
			in.r, in.w = 0, in.w-in.r
		}
	}
	if c.sock.rawIn {
		in.err = nil
		if err := c.sock.raw.Read(c.sock.readFn); err != nil {
			return err
		}
		return in.err
	}
	if in.buf == nil {
		if in.quiet < patience {
			in.grab()
		} else {
			in.buf = &buffer{make([]byte, smallRead)}
		}
	}
	n, err := c.nc.Read(in.free())
	in.w += n
	in.got = n
	if n < smallRead/2 {
		in.quiet++
	} else {
		in.quiet = 0
	}
	if n > 0 {
		return nil // an error will come again
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// read is the reading goroutine.
func (c *Conn) read() {
	err := c.serve()
	c.finish(err)
}

// serve reads and handles until the connection is over, and returns the read error if there was one.
func (c *Conn) serve() error {
	in := &c.in
	for {
		if err := c.fill(); err != nil {
			if c.client && !in.begun && in.buf != nil && in.w > in.r && !isTimeout(err) {
				c.end(notHTTP2(in.buf.b[in.r:in.w]), false)
			}
			return err
		}
		now := c.nano()
		c.lastRead.Store(now)
		c.mu.Lock()
		c.inBatch = true
		c.stats.Reads++
		c.stats.BytesIn += uint64(in.got)
		c.mu.Unlock()
		if err := c.batch(); err != nil {
			c.end(err, err.Kind != KindNotHTTP2)
		}
		if !c.sock.rawIn {
			in.fit()
		}
		if c.cfg.OnBatch != nil {
			c.cfg.OnBatch(c)
		}
		c.flushAfter()
		if !c.endBatch() {
			return nil
		}
	}
}

// batch handles every complete frame in the buffer.
func (c *Conn) batch() *Error {
	in := &c.in
	if !in.greeted && !c.client {
		b := in.buf.b[in.r:in.w]
		n := min(len(b), len(clientPreface))
		if string(b[:n]) != clientPreface[:n] {
			return notHTTP2(b)
		}
		if n < len(clientPreface) {
			return nil
		}
		in.r += n
		in.greeted = true
	}
	for !c.stop.Load() {
		if in.frames%framesPerLook == framesPerLook-1 {
			c.mu.Lock()
			c.stallLocked()
			c.unlock()
		}
		b := in.buf.b[in.r:in.w]
		if !in.begun {
			// The first frame must be SETTINGS (RFC 9113 section 3.4); who speaks something else is told apart early.
			if len(b) >= 4 && http2.FrameType(b[3]) != http2.FrameSettings && !c.mayAnswer(b) || bytes.HasPrefix(b, []byte("HTTP/")) {
				if c.client {
					return notHTTP2(b)
				}
				return violation(ProtocolError, "the first frame is not SETTINGS")
			}
		}
		if len(b) < headerLen {
			in.need(headerLen)
			return nil
		}
		f := parseHeader(b)
		if f.length > int(c.cfg.MaxFrameSize) {
			return violation(FrameSizeError, "frame larger than MAX_FRAME_SIZE")
		}
		if len(b) < headerLen+f.length {
			in.need(headerLen + f.length)
			return nil
		}
		in.r += headerLen + f.length
		if err := c.handle(f, b[headerLen:headerLen+f.length]); err != nil {
			return err
		}
	}
	return nil
}

// mayAnswer tells whether the first bytes of the peer can be an answer: see earlyAnswer.
func (c *Conn) mayAnswer(b []byte) bool {
	if len(b) < headerLen {
		return c.client && http2.FrameType(b[3]) == http2.FrameHeaders
	}
	return c.earlyAnswer(parseHeader(b))
}

// endBatch flushes. It returns false when the connection is over.
func (c *Conn) endBatch() bool {
	c.mu.Lock()
	c.inBatch = false
	if c.peerReady && !c.told {
		// Only now: a GOAWAY right behind the SETTINGS sends away whoever would open a stream.
		c.told = true
		close(c.ready)
	}
	c.stats.FramesIn += c.in.frames
	c.in.frames = 0
	if c.controls > maxControls {
		c.endLocked(violation(EnhanceYourCalm, "too many answers to control frames wait for the peer"), true)
	}
	if c.in.blockID != 0 && c.blockAt == 0 {
		c.blockAt = c.nano()
		c.armLocked(c.blockAt + int64(c.cfg.SettingsTimeout))
	} else if c.in.blockID == 0 {
		c.blockAt = 0
	}
	c.flushLocked()
	c.mu.Lock()
	c.stallLocked()
	over := c.over != nil
	c.unlock()
	return !over
}

// framesPerLook is how many frames are handled between two looks at what they made us write.
const framesPerLook = 32

// stallLocked makes the reader wait while the peer makes us write but does not read itself.
func (c *Conn) stallLocked() {
	for c.crowdedLocked() && c.over == nil && c.writeErr == nil {
		if !c.flushing {
			c.flushing = true
			go c.writeLoop()
		}
		if !c.stalled {
			c.stalled = true
			c.stats.ReaderStalls++
		}
		c.cond.Wait()
	}
	c.stalled = false
}

// FlushAfter flushes another connection once, at the end of c's current batch of frames. It may be called on c's
// reading goroutine only, so by the receivers of c's streams: one read of c then costs each connection it wrote to
// one flush.
func (c *Conn) FlushAfter(other *Conn) {
	if other == c || other.afterFor.Load() == c {
		return // c flushes itself
	}
	other.afterFor.Store(c) // if another reader's mark is lost the worst is one flush too many
	c.after = append(c.after, other)
}

// BatchEnder is told of the end of a batch of frames.
type BatchEnder interface{ BatchEnd() }

// AtBatchEnd tells b at the end of c's current batch of frames, as often as it is called. It is FlushAfter for what is no connection,
// and may be called on c's reading goroutine only.
func (c *Conn) AtBatchEnd(b BatchEnder) { c.enders = append(c.enders, b) }

func (c *Conn) flushAfter() {
	for i, b := range c.enders {
		c.enders[i] = nil
		b.BatchEnd()
	}
	c.enders = c.enders[:0]
	for i, other := range c.after {
		c.after[i] = nil
		other.afterFor.CompareAndSwap(c, nil)
		other.Flush()
	}
	c.after = c.after[:0]
}

// finish runs on the reading goroutine when the connection is over: it tells the streams, then the owner, and takes
// leave of the peer.
func (c *Conn) finish(readErr error) {
	c.mu.Lock()
	if c.over == nil {
		c.endLocked(c.lossLocked(readErr), false)
	}
	e := c.over
	parting := readErr == nil || isTimeout(readErr)
	streams := make([]*Stream, 0, len(c.streams))
	errs := make([]*Error, 0, len(c.streams))
	for _, s := range c.streams {
		if s.err == nil {
			s.err = e
			if c.lostLocked(s) && !e.Unprocessed {
				own := *e
				own.Unprocessed = true // RFC 9113 section 8.7: nothing of it was ever sent
				s.err = &own
			}
		}
		streams, errs = append(streams, s), append(errs, s.err)
	}
	for _, s := range streams {
		s.dropLocked()
	}
	for c.holders.first != nil {
		c.holders.first.forgiveLocked()
	}
	c.cfg.Budget.leave(c)
	c.events &^= evIdle
	for _, p := range c.pings {
		close(p.ch)
	}
	c.pings = nil
	c.timer.Stop()
	if !c.told {
		c.told = true
		close(c.ready)
	}
	c.unlock()
	for i, s := range streams {
		if s.r != nil {
			s.r.RecvReset(s, errs[i])
		}
	}
	c.flushAfter()
	if c.cfg.OnClose != nil {
		c.cfg.OnClose(c, e)
	}
	close(c.done)
	c.leave(parting)
}

// leave flushes what is pending, ends the write side and reads on for a moment: closing a socket with unread input
// sends a TCP RST, which destroys what the peer has not read yet.
func (c *Conn) leave(parting bool) {
	const moment = time.Second
	kill := time.AfterFunc(moment, c.sock.abort) // closing TLS sends an alert, which can block too
	defer kill.Stop()
	if parting {
		_ = c.nc.SetReadDeadline(time.Now().Add(moment))
		flushed := make(chan struct{})
		go func() { // the peer may be taking its leave too, and write before it reads
			defer close(flushed)
			if !c.flushLast() {
				_ = c.nc.SetReadDeadline(time.Unix(1, 0))
			} else if !c.sock.closeWrite() {
				// The peer does not know yet that it should close.
				_ = c.nc.SetReadDeadline(time.Now().Add(moment / 20))
			}
		}()
		c.in.grab()
		for {
			if _, err := c.nc.Read(c.in.buf.b); err != nil {
				break
			}
		}
		<-flushed
	}
	_ = c.nc.Close()
	c.in.drop()
}

// flushLast waits until everything is written, and tells whether it was.
func (c *Conn) flushLast() bool {
	c.mu.Lock()
	defer c.unlock()
	if !c.flushing && c.out != nil && c.writeErr == nil {
		c.flushing = true
		go c.writeLoop()
	}
	for c.flushing {
		c.cond.Wait()
	}
	return c.writeErr == nil
}
