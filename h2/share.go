package h2

import "time"

// Output flow control. The peer's window of the connection is shared by all streams. A peer that gives it back when its
// application has read (as proxies, Java's and Go's servers do) lets one stream whose reader has stopped use all of it up, and then
// no other stream can send anything. So a stream may have under way no more than a multiple of what it leaves, and when little is
// left, no more than a part of that: whatever streams stall, something is left for the next one, and a stream that is read gets
// nearly all there is. (Switches share their memory between queues by such a rule: Choudhury and Hahne, "Dynamic queue length
// thresholds", 1998.)
//
// What a stream has under way is what it has sent and the peer has not given back, to the stream or to the connection: a
// peer with large windows for streams may tell of neither for long.
const (
	// shareAmong is the multiple while other streams may send: a stream that stalls takes four fifths of the window. That is
	// above three quarters, since there are peers that give nothing back before so much was used.
	shareAmong = 4
	// shareAlone is the multiple for a stream that is alone. It leaves room for those that come next: once all is gone, nothing can
	// be done for them on this connection.
	shareAlone = 8
	// shareStep is the least that is taken of a share, if more is to be sent, lest a tight window be cut into crumbs.
	shareStep = 1 << 10
	// scarcePart: a connection is short of window when less than this part of it is left, which is when streams have had their
	// multiple. Then that is turned over: a stream that comes and stalls takes a fifth.
	scarcePart = shareAmong + 1
	// tightAfter is for how long it must have been that short, with nothing given back, to count as tight.
	tightAfter = int64(500 * time.Millisecond)
)

// shareLeastLocked is what every stream may have under way, however little that leaves. Go's server gives nothing back for less
// than 4 KiB.
func (c *Conn) shareLeastLocked() int64 { return min(max(c.sendPeak/64, 4<<10), 64<<10) }

// shareLocked is how much the stream may send of what is left of the connection's window. It is not bounded by that, and can
// be below zero.
func (c *Conn) shareLocked(s *Stream) int64 {
	s.unacked = min(s.unacked, c.unacked)
	var share int64
	switch {
	case c.senders > 1 && c.shortLocked():
		share = (c.sendWin - shareAmong*s.unacked) / (shareAmong + 1)
	case c.senders > 1:
		share = (shareAmong*c.sendWin - s.unacked) / (shareAmong + 1)
	default:
		share = (shareAlone*c.sendWin - s.unacked) / (shareAlone + 1)
	}
	if least := c.shareLeastLocked(); s.unacked < least {
		share = max(share, least-s.unacked, shareStep) // a step in any case, or the stream might not get as far
	}
	return share
}

// shortLocked tells whether little is left of the window.
func (c *Conn) shortLocked() bool { return c.sendWin < c.sendPeak/scarcePart }

// shareOfLocked bounds what is to be taken next of left bytes that are to be sent.
func (s *Stream) shareOfLocked(room int64, left int) int64 {
	if s.unacked+room <= s.c.shareLeastLocked() {
		return room
	}
	share := s.c.shareLocked(s)
	if share < min(int64(left), shareStep) {
		return 0
	}
	return min(room, share)
}

// sentLocked counts DATA that was appended.
func (s *Stream) sentLocked(n int64) {
	c := s.c
	s.sendWin -= n
	c.sendWin -= n
	s.unacked += n
	c.unacked += n
	if c.lowAt == 0 && c.shortLocked() {
		c.lowLocked(c.nano())
	}
}

func (c *Conn) lowLocked(now int64) {
	c.lowAt = now
	c.armLocked(now + tightAfter)
}

// grantedLocked counts what the peer has given to the connection.
func (c *Conn) grantedLocked(n int64) {
	c.sendWin += n
	c.unacked = max(0, c.unacked-n)
	c.sendPeak = max(c.sendPeak, c.sendWin)
	c.lowAt = 0
	if c.shortLocked() {
		c.lowLocked(c.lastRead.Load())
	}
	c.loosenLocked()
	c.uncapLocked()
}

// loosenLocked notes that the window is not tight any more.
func (c *Conn) loosenLocked() {
	if !c.tight.Load() {
		return
	}
	c.tight.Store(false)
	if c.client {
		c.events |= evCapacity
	}
}

// tightenLocked runs when the window has been short for long.
func (c *Conn) tightenLocked() {
	c.lowAt = 0
	c.tight.Store(true)
	if c.client {
		c.events |= evNearlyFull
	}
}

// Short tells whether most of the peer's window of the connection is used up now, be it for a moment only: what is sent there shares
// what is left.
func (c *Conn) Short() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.shortLocked()
}

// Tight tells whether most of the peer's window of the connection has been used up for half a second, and nothing of it given
// back: readers of some streams have stopped. There is something left for others, but a connection without such streams
// suits them better. When hardly anything is left, no streams can be opened (see Available).
func (c *Conn) Tight() bool { return c.tight.Load() }

// shortLocked tells whether the stream's share is in the way of what it wants to send.
func (s *Stream) shortLocked() bool {
	return s.c.shareLocked(s) < int64(s.wants)
}

// uncapLocked lets those who have a share again queue for the connection. They are not among those who wait for it all the
// time, since these are called as soon as there is any room.
func (c *Conn) uncapLocked() {
	for s := c.capped.first; s != nil; {
		next := s.after
		if !s.shortLocked() {
			c.capped.remove(s)
			c.waiters.add(s)
		}
		s = next
	}
}

// fewerSendersLocked notes that a stream will send nothing more.
func (c *Conn) fewerSendersLocked() {
	if c.senders--; c.senders == 1 {
		c.aloneLocked()
	}
}

// aloneLocked gives a stream that is left alone its larger share.
func (c *Conn) aloneLocked() {
	if c.capped.first == nil || c.senders > 1 || c.over != nil || c.writeErr != nil {
		return
	}
	c.uncapLocked()
	if c.waiters.first != nil && !c.flushing {
		c.flushing = true
		go c.writeLoop()
	}
}
