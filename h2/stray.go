package h2

import "slices"

// allowance is what the peer may still send on streams this side has reset or refused. It does so before it knows, within
// the windows it was granted (RFC 9113 section 5.4.2 has it ignored), so it is no flood, however small its pieces are. One sum
// serves all streams: which of them the frames come on makes no difference to what they cost.
type allowance struct {
	data   int64 // bytes of DATA
	frames int64 // frames without flow control
}

// strayFrames is how many frames without flow control an honest peer may have under way on a stream: response head,
// trailers, WINDOW_UPDATE, RST_STREAM.
const strayFrames = 4

// allow notes that a stream was reset whose peer had a window left and, unless it has ended its side, may still use it.
func (a *allowance) allow(window int64, ended bool) {
	a.frames += strayFrames
	if !ended {
		a.data += max(window, 0)
	}
}

// take tells whether a frame, with size bytes of DATA, is within the allowance.
func (a *allowance) take(size int64) bool {
	switch {
	case size > 0 && size <= a.data:
		a.data -= size
	case size == 0 && a.frames > 0:
		a.frames--
	default:
		return false
	}
	return true
}

// idleLocked tells whether a stream identifier was never used.
func (c *Conn) idleLocked(id uint32) bool { return id&1 == 0 || id >= c.nextID }

// strayLocked is for frames on streams that are not in the table: an error on those never used (RFC 9113 section
// 5.1), ignored on those that are over, since they may have crossed our own frames, and counted if there are more of them
// than can have.
func (c *Conn) strayLocked(id uint32, size int64, what string) *Error {
	if c.idleLocked(id) && !c.refusedLocked(id) {
		return violation(ProtocolError, what+" on an idle stream")
	}
	c.stats.Ignored++
	if !c.stray.take(size) && !c.lim.take(&c.lim.ignored, c.lastRead.Load()) {
		return violation(EnhanceYourCalm, "flood of frames on closed streams")
	}
	return nil
}

// outOfTurnLocked is the error of HEADERS on a stream that is over, or that the client has left out. Of the latter RFC
// 9113 section 5.1.1 says: "An endpoint that receives an unexpected stream identifier MUST respond with a connection error
// (Section 5.4.1) of type PROTOCOL_ERROR." Of the former section 5.1: "An endpoint MAY treat receipt of any other type of frame on
// a closed stream as a connection error (Section 5.4.1) of type STREAM_CLOSED". Streams that are over are not remembered, so where
// identifiers were left out it may be either, and the MUST goes first.
func (c *Conn) outOfTurnLocked() *Error {
	if c.skipped {
		return violation(ProtocolError, "HEADERS on a stream below the last one")
	}
	return violation(StreamClosed, "HEADERS on a closed stream")
}

// refusedLocked tells whether a stream is above the last identifier of our GOAWAY, so that all its frames are ignored.
func (c *Conn) refusedLocked(id uint32) bool { return !c.client && id&1 == 1 && id > c.goAwayOut }

// mostRecent is how many reset streams are remembered.
const mostRecent = 512

// rememberLocked keeps the identifiers of streams we have reset: what the peer sent before it knew is to be ignored
// (RFC 9113 section 5.4.2).
func (c *Conn) rememberLocked(id uint32) {
	if len(c.recent) < mostRecent {
		c.recent = append(c.recent, id)
		return
	}
	c.recent[c.recentPos] = id
	c.recentPos = (c.recentPos + 1) % mostRecent
}

func (c *Conn) resetByUsLocked(id uint32) bool {
	if slices.Contains(c.recent, id) {
		return true
	}
	return len(c.recent) == mostRecent // it may have been forgotten: the benefit of the doubt
}
