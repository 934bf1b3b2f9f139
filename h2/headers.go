package h2

import "golang.org/x/net/http2"

// listSize is the size of a header list as SETTINGS_MAX_HEADER_LIST_SIZE counts it (RFC 9113 section 6.5.2).
func listSize(fields []Field) (n uint64) {
	for i := range fields {
		n += uint64(len(fields[i].Name) + len(fields[i].Value) + 32)
	}
	return n
}

// field takes one decoded field. Above the limit the rest is decoded for the table's sake only.
func (in *input) field(f Field) {
	in.list += len(f.Name) + len(f.Value) + 32
	if in.list > in.maxList {
		in.tooLarge = true
		in.dec.SetEmitEnabled(false)
		return
	}
	in.fields = append(in.fields, f)
}

// maxBlock is how many bytes of a compressed header block are taken. The list's limit counts decoded bytes, which are
// more; room is left so that a list somewhat too large is answered instead of costing the connection.
func (in *input) maxBlock() int { return 2*in.maxList + 16<<10 }

// Bounds of CONTINUATION frames within a block, beside the bytes (CVE-2024-27316 and its relatives).
const (
	maxContinuations      = 256
	maxEmptyContinuations = 4
)

// fragment strips padding and priority from HEADERS (RFC 9113 section 6.2), and tells whether the stream depends on itself.
func fragment(f frameHeader, p []byte) (block []byte, selfish bool, _ *Error) {
	p, bad := payload(f, p)
	if bad != nil || !f.flags.Has(http2.FlagHeadersPriority) {
		return p, false, bad
	}
	if len(p) < priorityLen {
		return nil, false, violation(FrameSizeError, "HEADERS too short for its priority")
	}
	return p[priorityLen:], dependsOnItself(f.id, p), nil
}

func (c *Conn) onHeaders(f frameHeader, p []byte) *Error {
	if f.id == 0 {
		return violation(ProtocolError, "HEADERS on stream 0")
	}
	p, selfish, bad := fragment(f, p)
	if bad != nil {
		return bad
	}
	c.in.selfish = selfish && !c.client
	end := f.flags.Has(http2.FlagHeadersEndStream)
	if f.flags.Has(http2.FlagHeadersEndHeaders) {
		return c.onBlock(f.id, p, end)
	}
	in := &c.in
	in.blockID, in.blockEnd = f.id, end
	in.blockMore, in.blockNone, in.passed = 0, 0, 0
	in.block = append(in.block[:0], p...)
	return nil
}

func (c *Conn) onContinuation(f frameHeader, p []byte) *Error {
	in := &c.in
	if in.blockID == 0 {
		return violation(ProtocolError, "CONTINUATION without HEADERS")
	}
	c.mu.Lock()
	c.stats.Continuations++
	c.mu.Unlock()
	in.blockMore++
	if len(p) == 0 {
		in.blockNone++
	}
	if len(in.block)+len(p) > in.maxBlock() {
		if bad := c.passBlock(); bad != nil {
			return bad
		}
	}
	most := in.maxBlock()
	if in.passed > 0 {
		most *= mostPassed
	}
	if in.blockNone > maxEmptyContinuations || in.blockMore > maxContinuations+most/protocolFrameSize {
		return violation(EnhanceYourCalm, "CONTINUATION flood")
	}
	in.block = append(in.block, p...)
	if !f.flags.Has(http2.FlagContinuationEndHeaders) {
		return nil
	}
	block := in.block
	in.block = nil
	in.blockID = 0
	if in.passed > 0 {
		return c.passedBlock(f.id, block)
	}
	return c.onBlock(f.id, block, in.blockEnd)
}

// mostPassed is how many times the largest block that is taken a server's may be long for its stream alone to end.
const mostPassed = 8

// passBlock makes room in a header block that is far above the limit. It is a server's, whose connection carries the calls of
// many, and a client can bring it about, by a service that repeats what it is told: so the stream that it belongs to ends, and
// the rest of it is decoded for the table's sake only. A client has its connection ended.
func (c *Conn) passBlock() *Error {
	in := &c.in
	c.mu.Lock()
	s := c.streams[in.blockID]
	if s != nil && c.client && !s.recvEnd {
		_ = c.failLocked(s, &Error{Kind: KindHeaderListSize, Code: Cancel})
	}
	c.unlock()
	if in.passed += len(in.block); !c.client || in.passed > mostPassed*in.maxBlock() {
		return violation(EnhanceYourCalm, "header block far above the limit")
	}
	in.dec.SetEmitEnabled(false)
	in.dec.SetMaxStringLength(in.maxBlock()) // the decoder keeps what has come of one
	if _, err := in.dec.Write(in.block); err != nil {
		return badBlock(err)
	}
	in.block = in.block[:0]
	return nil
}

// passedBlock handles the end of such a block.
func (c *Conn) passedBlock(id uint32, rest []byte) *Error {
	in := &c.in
	in.passed = 0
	_, err := in.dec.Write(rest)
	if err == nil {
		err = in.dec.Close()
	}
	in.dec.SetMaxStringLength(0)
	if err != nil {
		return badBlock(err)
	}
	c.mu.Lock()
	defer c.unlock()
	c.stats.OversizedHeaders++
	return c.strayLocked(id, 0, "HEADERS")
}

func badBlock(err error) *Error {
	return &Error{Kind: KindProtocol, Code: CompressionError, Debug: "header block", Err: err}
}

// onBlock handles a whole header block. It is decoded whatever happens, since the table must stay in step.
func (c *Conn) onBlock(id uint32, block []byte, end bool) *Error {
	in := &c.in
	in.fields, in.list, in.tooLarge = in.fields[:0], 0, false
	in.dec.SetEmitEnabled(true)
	_, err := in.dec.Write(block)
	if err == nil {
		err = in.dec.Close()
	}
	if err != nil {
		return badBlock(err)
	}
	e := c.onFields(id, end)
	clear(in.fields)
	if cap(in.fields) > 256 {
		in.fields = nil
	}
	return e
}

func (c *Conn) onFields(id uint32, end bool) *Error {
	c.mu.Lock()
	c.lim.content()
	if c.in.tooLarge {
		c.stats.OversizedHeaders++
	}
	s := c.streams[id]
	switch {
	case s == nil && !c.client && id&1 == 1 && id >= c.nextID:
		return c.onRequest(id, end)
	case s == nil:
		defer c.unlock()
		if !c.client && !c.idleLocked(id) && !c.resetByUsLocked(id) {
			return c.outOfTurnLocked()
		}
		return c.strayLocked(id, 0, "HEADERS")
	case s.recvEnd:
		defer c.unlock()
		return c.streamErrorLocked(s, StreamClosed, "HEADERS after END_STREAM")
	case c.in.tooLarge:
		defer c.unlock()
		code := Cancel
		if !c.client {
			code = EnhanceYourCalm
		}
		return c.failLocked(s, &Error{Kind: KindHeaderListSize, Code: code})
	case c.client && !s.headDone:
		return c.onResponse(s, end)
	}
	return c.onTrailers(s, end)
}

// onResponse handles an informational or final response head. It is called with mu held and releases it.
func (c *Conn) onResponse(s *Stream, end bool) *Error {
	fields := c.in.fields
	h := checkResponse(fields)
	informational := h.status >= 100 && h.status < 200
	rule := h.malformed
	switch {
	case rule != "":
	case informational && end:
		rule = "informational response with END_STREAM"
	case informational:
		if !c.lim.take(&c.lim.informational, c.lastRead.Load()) {
			defer c.unlock()
			return c.streamErrorLocked(s, EnhanceYourCalm, "flood of informational responses")
		}
		c.unlock()
		s.r.RecvHead(s, fields, false)
		return nil
	}
	if !s.noBody && h.status != 204 && h.status != 304 {
		s.want = h.length
	}
	if rule == "" && end && s.want > 0 {
		rule = "no DATA, but a content-length"
	}
	if rule != "" {
		defer c.unlock()
		return c.streamErrorLocked(s, ProtocolError, rule)
	}
	s.headDone = true
	c.lim.answered()
	c.probes = 0
	if end {
		c.endReceivedLocked(s)
	}
	c.unlock()
	s.r.RecvHead(s, fields, end)
	return nil
}

// onTrailers handles the block that ends a stream. It is called with mu held and releases it.
func (c *Conn) onTrailers(s *Stream, end bool) *Error {
	fields := c.in.fields
	rule := ""
	if c.in.selfish {
		rule = selfDependency
	} else if !end {
		rule = "second HEADERS without END_STREAM"
	} else if rule = checkTrailers(fields, !c.client); rule == "" && s.want > 0 {
		rule = "DATA does not add up to content-length"
	}
	if rule != "" {
		defer c.unlock()
		return c.streamErrorLocked(s, ProtocolError, rule)
	}
	c.endReceivedLocked(s)
	c.unlock()
	s.r.RecvTrailers(s, fields)
	return nil
}

// onRequest handles a request head. It is called with mu held and releases it.
func (c *Conn) onRequest(id uint32, end bool) *Error {
	fields := c.in.fields
	c.skipped = c.skipped || id > c.nextID|1
	c.nextID = id + 1
	if c.refusedLocked(id) {
		c.stats.Ignored++ // RFC 9113 section 6.8: above the last identifier of our GOAWAY
		c.stray.allow(c.firstWindowLocked(), end)
		c.unlock()
		return nil
	}
	if uint64(len(c.streams)+c.lingering) >= uint64(c.cfg.MaxStreams) {
		// RFC 9113 section 5.1.2. The client may not have read our SETTINGS yet, or it has reset streams whose calls still run.
		defer c.unlock()
		c.stats.Refused++
		c.appendReset(id, RefusedStream)
		c.control()
		c.rememberLocked(id)
		c.stray.allow(c.firstWindowLocked(), end)
		if c.settingsAcked && !c.lim.take(&c.lim.resets, c.lastRead.Load()) {
			return violation(EnhanceYourCalm, "too many streams above MAX_CONCURRENT_STREAMS")
		}
		return nil
	}
	h := headInfo{length: -1}
	if !c.in.tooLarge {
		h = checkRequest(fields)
		switch {
		case h.malformed != "":
		case end && h.length > 0:
			h.malformed = "no DATA, but a content-length"
		case c.in.selfish:
			h.malformed = selfDependency
		case h.crumbs > 1:
			fields = joinCrumbs(fields)
		}
	}
	s := &Stream{
		c: c, id: id, sendWin: c.peerInitWindow, recvWin: c.firstWindowLocked(), window: int64(c.cfg.InitialWindow),
		recvEnd: end, want: h.length, began: c.lastRead.Load(), calling: true,
	}
	c.addLocked(s)
	if h.malformed != "" {
		defer c.unlock()
		return c.streamErrorLocked(s, ProtocolError, h.malformed)
	}
	c.unlock()
	if c.in.tooLarge {
		c.answerOversized(s, fields)
		return nil
	}
	r := c.accept(s, fields, end)
	c.mu.Lock()
	defer c.unlock()
	if r != nil {
		s.acceptedLocked(r)
	} else if !s.closed {
		code := RefusedStream
		switch {
		case s.sentEnd:
			code = NoError
		case s.headDone:
			code = InternalError
		}
		s.resetLocked(code, &Error{Kind: KindReset, Code: code})
		c.control()
	}
	return nil
}

// answerOversized answers a request whose header list is too large: RFC 6585 section 5.
func (c *Conn) answerOversized(s *Stream, fields []Field) {
	if c.cfg.OnOversized != nil {
		c.cfg.OnOversized(s, fields)
	}
	c.mu.Lock()
	answered := s.headDone
	c.mu.Unlock()
	if !answered {
		// An error means that the hook has reset the stream.
		_ = s.WriteHeaders([]Field{{Name: ":status", Value: "431"}}, true)
	}
	c.mu.Lock()
	if !s.closed {
		code := InternalError
		if s.sentEnd {
			code = NoError
		}
		s.resetLocked(code, &Error{Kind: KindHeaderListSize, Code: code})
		c.control()
	}
	c.unlock()
}
