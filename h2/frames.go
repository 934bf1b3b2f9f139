package h2

import (
	"encoding/binary"

	"golang.org/x/net/http2"
)

// Frames are parsed here, not by http2.Framer, since that copies every payload and allocates for each frame that is not
// DATA, three times in the smallest RPC (BenchmarkParse compares them). FuzzParse holds the two against each other.

// frameHeader is the head of a frame (RFC 9113 section 4.1), reserved bit masked.
type frameHeader struct {
	length int
	t      http2.FrameType
	flags  http2.Flags
	id     uint32
}

func parseHeader(b []byte) frameHeader {
	return frameHeader{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]), t: http2.FrameType(b[3]), flags: http2.Flags(b[4]),
		id: be32(b[5:]) & maxStreamID,
	}
}

func be32(p []byte) uint32 { return binary.BigEndian.Uint32(p) }

// handle handles one frame. The error ends the connection.
func (c *Conn) handle(f frameHeader, p []byte) *Error {
	in := &c.in
	in.frames++
	if in.blockID != 0 && (f.t != http2.FrameContinuation || f.id != in.blockID) {
		// RFC 9113 section 6.10: nothing may come between HEADERS and its CONTINUATION frames.
		return violation(ProtocolError, "frame inside a header block")
	}
	if !in.begun {
		if (f.t != http2.FrameSettings || f.flags.Has(http2.FlagSettingsAck)) && !c.earlyAnswer(f) {
			return violation(ProtocolError, "the first frame is not SETTINGS")
		}
		in.begun = true
	}
	switch f.t {
	case http2.FrameData:
		return c.onData(f, p)
	case http2.FrameHeaders:
		return c.onHeaders(f, p)
	case http2.FrameContinuation:
		return c.onContinuation(f, p)
	case http2.FrameWindowUpdate:
		return c.onWindowUpdate(f, p)
	case http2.FrameRSTStream:
		return c.onReset(f, p)
	case http2.FrameSettings:
		return c.onSettings(f, p)
	case http2.FramePing:
		return c.onPing(f, p)
	case http2.FrameGoAway:
		return c.onGoAway(f, p)
	case http2.FramePriority:
		return c.onPriority(f, p)
	case http2.FramePushPromise:
		// A client may never send it, and we as a client have switched it off.
		return violation(ProtocolError, "PUSH_PROMISE")
	}
	return c.ignore()
}

// earlyAnswer tells whether a frame that comes before the first SETTINGS is the answer to a call that was opened early, as RFC
// 9113 section 3.4 lets a client do. The server should have sent its SETTINGS first; where it answers first, its SETTINGS may
// still come in time.
func (c *Conn) earlyAnswer(f frameHeader) bool {
	if !c.client || f.t != http2.FrameHeaders || f.length > int(c.cfg.MaxFrameSize) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.idleLocked(f.id)
}

// ignore counts a frame that is none of our business: unknown types (RFC 9113 section 5.5) and PRIORITY.
func (c *Conn) ignore() *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Ignored++
	if !c.lim.take(&c.lim.ignored, c.lastRead.Load()) {
		return violation(EnhanceYourCalm, "flood of frames without effect")
	}
	return nil
}

const priorityLen = 5

// dependsOnItself tells whether the priority at the start of p makes a stream depend on itself. RFC 9113 has given up priorities,
// but RFC 7540 section 5.3.1 says of that: "An endpoint MUST treat this as a stream error of type PROTOCOL_ERROR."
func dependsOnItself(id uint32, p []byte) bool { return be32(p)&maxStreamID == id }

const selfDependency = "stream that depends on itself"

func (c *Conn) onPriority(f frameHeader, p []byte) *Error {
	if f.id == 0 {
		return violation(ProtocolError, "PRIORITY on stream 0")
	}
	code, rule := ProtocolError, selfDependency
	if len(p) != priorityLen {
		code, rule = FrameSizeError, "PRIORITY of a size other than 5"
	} else if c.client || !dependsOnItself(f.id, p) {
		return c.ignore()
	}
	c.mu.Lock()
	defer c.unlock()
	s := c.streams[f.id]
	switch {
	case s != nil:
		return c.streamErrorLocked(s, code, rule)
	case code == ProtocolError && !c.idleLocked(f.id): // it is over, so nothing depends on it
		return c.strayLocked(f.id, 0, "PRIORITY")
	}
	return violation(code, rule) // there is no stream that could be reset
}

// payload strips padding from DATA and HEADERS (RFC 9113 sections 6.1, 6.2).
func payload(f frameHeader, p []byte) ([]byte, *Error) {
	if !f.flags.Has(http2.FlagDataPadded) {
		return p, nil
	}
	if len(p) == 0 {
		return nil, violation(FrameSizeError, "padded frame without a padding length")
	}
	pad := int(p[0])
	if p = p[1:]; pad > len(p) {
		return nil, violation(ProtocolError, "padding longer than the frame")
	}
	return p[:len(p)-pad], nil
}

// streamErrorLocked resets a stream whose peer broke a rule and tells the receiver (RFC 9113 section 5.4.2). It
// releases mu meanwhile. Its result is not nil when the peer has done so too often.
func (c *Conn) streamErrorLocked(s *Stream, code ErrCode, rule string) *Error {
	return c.failLocked(s, &Error{Kind: KindProtocol, Code: code, Debug: rule})
}

func (c *Conn) failLocked(s *Stream, e *Error) *Error {
	s.resetLocked(e.Code, e)
	c.control()
	c.stats.InducedResets++
	ok := c.client || c.lim.take(&c.lim.resets, c.lastRead.Load())
	c.unlock()
	if s.r != nil {
		s.r.RecvReset(s, e)
	}
	c.mu.Lock()
	if !ok {
		return violation(EnhanceYourCalm, "too many streams had to be reset")
	}
	return nil
}

func (c *Conn) onData(f frameHeader, p []byte) *Error {
	if f.id == 0 {
		return violation(ProtocolError, "DATA on stream 0")
	}
	data, bad := payload(f, p)
	if bad != nil {
		return bad
	}
	end := f.flags.Has(http2.FlagDataEndStream)
	full, n := int64(len(p)), int64(len(data))
	c.mu.Lock()
	// Padding and frames nobody wants count as well (RFC 9113 section 6.9.1).
	if full > c.recvWin {
		c.unlock()
		return violation(FlowControlError, "DATA beyond the window of the connection")
	}
	c.recvWin -= full
	s := c.streams[f.id]
	if s == nil {
		defer c.unlock()
		err := c.strayLocked(f.id, full, "DATA")
		c.owed += full
		c.grantConnLocked()
		if err == nil && !c.client && !c.resetByUsLocked(f.id) && !c.refusedLocked(f.id) {
			c.appendReset(f.id, StreamClosed)
			c.control()
			c.rememberLocked(f.id)
			c.stats.InducedResets++
			if !c.lim.take(&c.lim.resets, c.lastRead.Load()) {
				return violation(EnhanceYourCalm, "too much DATA on closed streams")
			}
		}
		return err
	}
	var rule string
	code := ProtocolError
	switch {
	case s.recvEnd:
		code, rule = StreamClosed, "DATA after END_STREAM"
	case c.client && !s.headDone:
		rule = "DATA before the response head"
	case full > s.recvWin:
		code, rule = FlowControlError, "DATA beyond the window of the stream"
	case s.want >= 0 && (n > s.want || end && n < s.want):
		rule = "DATA does not add up to content-length"
	case full == 0 && !end:
		c.stats.EmptyData++
		if c.lim.take(&c.lim.emptyData, c.lastRead.Load()) {
			c.unlock()
			return nil
		}
		code, rule = EnhanceYourCalm, "flood of empty DATA frames"
		if !c.client {
			c.unlock()
			return violation(code, rule)
		}
	}
	if rule != "" {
		c.owed += full
		err := c.streamErrorLocked(s, code, rule)
		c.grantConnLocked()
		c.unlock()
		return err
	}
	if s.grantAt == 0 {
		s.grantAt = c.lastRead.Load()
	}
	s.recvWin -= full
	if s.want >= 0 {
		s.want -= n
	}
	if n > 0 {
		c.lim.content()
	}
	s.held += n
	c.held += n
	c.stats.HeldPeak = max(c.stats.HeldPeak, c.held)
	c.chargeLocked()
	c.heldMoreLocked()
	if end {
		c.endReceivedLocked(s)
	}
	if full > n {
		c.creditLocked(s, full-n)
	}
	c.unlock()
	if n > 0 || end {
		s.r.RecvData(s, data, end)
	}
	return nil
}

// endReceivedLocked notes that END_STREAM came.
func (c *Conn) endReceivedLocked(s *Stream) {
	s.recvEnd = true
	s.shrinkLocked()
	if s.sentEnd {
		c.lim.completed()
		c.removeLocked(s)
	}
}

// onReset: RFC 9113 section 6.4.
func (c *Conn) onReset(f frameHeader, p []byte) *Error {
	if len(p) != 4 {
		return violation(FrameSizeError, "RST_STREAM of a size other than 4")
	}
	if f.id == 0 {
		return violation(ProtocolError, "RST_STREAM on stream 0")
	}
	code := ErrCode(be32(p))
	c.mu.Lock()
	s := c.streams[f.id]
	if s == nil {
		err := c.strayLocked(f.id, 0, "RST_STREAM")
		c.unlock()
		return err
	}
	e := &Error{Kind: KindReset, Code: code, Remote: true, Unprocessed: code == RefusedStream}
	c.stats.ResetsIn++
	var flood *Error
	if now := c.lastRead.Load(); !c.client && !s.headDone && !s.excusedLocked(now) {
		// Opening and abandoning calls faster than they can be answered is how "rapid reset" works. After the head, calls that
		// outlive their streams are counted (Stream.Done).
		c.stats.PrematureResets++
		if !c.lim.take(&c.lim.resets, now) {
			flood = violation(EnhanceYourCalm, "too many streams reset before they were answered")
		}
	}
	s.err = e
	s.dropLocked()
	c.unlock()
	if s.r != nil {
		s.r.RecvReset(s, e)
	}
	return flood
}
