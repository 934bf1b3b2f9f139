package h2

import "time"

// Input flow control. A window is what its owner is granted when nothing is held: credit that receivers have
// consumed is collected and given back when half a window (of a connection's at most maxOwed) is due, so that small calls
// cost no WINDOW_UPDATE at all.
//
// Windows grow with use: when half a window was consumed within about two round trips, the window, not the receiver, is what
// limits the sender, and it is doubled up to its maximum. A receiver that is slow takes longer than that, so its
// window, and what it can make us hold, stays small, and shrinks again where it has grown. An idle stream costs nothing, since
// nothing is timed but grants. Where much is held for slow readers already, on the connection or by all streams of the Budget, no
// stream's window grows: they would add to it when their turn to be slow comes.

// growthFloor stands in for round trips too short, or not measured yet, to be told from scheduling noise.
const growthFloor = int64(2 * time.Millisecond)

// calmHeld is how much a connection may hold before its streams' windows stop growing.
const calmHeld = 4 << 20

// maxOwed is how much of the connection's credit is kept back at most, however large the window: a WINDOW_UPDATE for so many
// bytes costs nothing any more, and what is kept back is missed when slow readers hold the rest.
const maxOwed = 16 << 20

// firstWindowLocked is what the peer may send on a new stream. Before it has acknowledged our SETTINGS it may still
// go by the protocol's initial window.
func (c *Conn) firstWindowLocked() int64 {
	if c.settingsAcked {
		return int64(c.cfg.InitialWindow)
	}
	return max(int64(c.cfg.InitialWindow), protocolWindow)
}

// Consumed gives credit back to the peer: n bytes of DATA have left towards their reader. It may be called from
// anywhere. On a stream that was reset it does nothing: what was held there has been given back already.
func (s *Stream) Consumed(n int) {
	if n <= 0 {
		return
	}
	c := s.c
	c.mu.Lock()
	k := min(int64(n), s.held)
	s.held -= k
	c.held -= k
	s.releasedLocked()
	c.chargeLocked()
	due := c.creditLocked(s, k)
	if due && !c.inBatch && !c.flushing && c.out != nil && c.writeErr == nil {
		// Half a window is due and nobody is about to flush: the sender may be waiting for it.
		c.flushing = true
		go c.writeLoop()
	}
	c.unlock()
}

// creditLocked counts n consumed bytes of a stream, and appends WINDOW_UPDATE frames where they are due.
func (c *Conn) creditLocked(s *Stream, n int64) (due bool) {
	c.owed += n
	due = c.grantConnLocked()
	s.owed += n
	half := (s.window + 1) / 2
	if s.recvEnd || s.closed || s.owed < min(half, c.dueLocked()) {
		return due
	}
	window := s.window
	if s.owed >= half {
		window = c.resizeLocked(s)
	} else if window > int64(c.cfg.InitialWindow) && c.cfg.Budget.near(0) {
		return due
	}
	if grant := s.owed + window - s.window; grant > 0 {
		c.appendWindowUpdate(s.id, uint32(grant))
		s.recvWin += grant
		due = true
	}
	s.setWindowLocked(window)
	s.owed = 0
	return due
}

// slowPace is how many times as long as for growth a reader may take for half a window before that shrinks.
const slowPace = 16

// resizeLocked returns what a stream's window is from now on, given that half of it was consumed. What is held of it, and what
// the peer may send, cannot be taken back: a window shrinks by credit that is withheld.
func (c *Conn) resizeLocked(s *Stream) int64 {
	first, most := int64(c.cfg.InitialWindow), int64(c.cfg.MaxWindow)
	now := c.nano()
	took, pace := now-s.grantAt, 2*c.rtt+growthFloor
	s.grantAt = now
	window := s.window
	switch b := c.cfg.Budget; {
	case window > first && b.near(0):
		window = first
	case took > slowPace*pace:
		window /= 2
	case took <= pace && window < most && c.held <= calmHeld && !b.near(min(window, most-window)):
		window = min(2*window, most)
	}
	return max(window, first, s.window-s.owed)
}

// dueLocked is from how much on credit is given back because of what slow readers hold: half of what they leave of the
// connection's window. If they hold more than half of it, the other half never comes together, and the peer may share what little it
// has left among its streams by what it is given back (see share.go). So it gets that back in small pieces then, as from Go's
// server.
func (c *Conn) dueLocked() int64 {
	left := c.window - c.held
	if 2*c.held <= c.window {
		return (left + 1) / 2
	}
	return max(1, min(left/8, max(c.window/128, 4<<10)))
}

// heldMoreLocked gives back what was not due before slow readers held so much: they will not bring it about, and for the others
// too little may be left.
func (c *Conn) heldMoreLocked() {
	switch {
	case 4*c.held < c.window:
		c.cramped = false
	case 2*c.held <= c.window:
	case c.cramped:
		c.grantConnLocked()
	default:
		c.cramped = true
		for _, s := range c.streams {
			c.creditLocked(s, 0)
		}
	}
}

// grantConnLocked gives the connection's credit back when it is due.
func (c *Conn) grantConnLocked() bool {
	half := min((c.window+1)/2, maxOwed)
	if c.owed < min(half, c.dueLocked()) || c.over != nil {
		return false
	}
	grown := c.window
	if c.owed >= half {
		grown = c.growLocked(c.window, int64(c.cfg.MaxConnWindow), &c.grantAt)
	}
	grant := c.owed + grown - c.window
	c.appendWindowUpdate(0, uint32(grant))
	c.recvWin += grant
	c.window, c.owed = grown, 0
	return true
}

// growLocked returns what a window is from now on, given that half of it was consumed since *at.
func (c *Conn) growLocked(window, most int64, at *int64) int64 {
	now := c.nano()
	took := now - *at
	*at = now
	if took > 2*c.rtt+growthFloor || window >= most {
		return window
	}
	return min(2*window, most)
}

// sentWindowLocked adds to a stream's send window, and tells its writer if that was what it waited for. It may
// release mu meanwhile.
func (c *Conn) openedLocked(s *Stream) {
	if !s.waiting || s.closed || s.sendWin <= 0 {
		return
	}
	if s.shortLocked() {
		c.capped.add(s)
		return
	}
	c.capped.remove(s)
	if c.roomLocked() {
		s.callWaiterLocked()
	} else {
		c.waiters.add(s)
	}
}

// onWindowUpdate: RFC 9113 section 6.9.
func (c *Conn) onWindowUpdate(f frameHeader, p []byte) *Error {
	if len(p) != 4 {
		return violation(FrameSizeError, "WINDOW_UPDATE of a size other than 4")
	}
	n := int64(be32(p) & maxStreamID)
	c.mu.Lock()
	defer c.unlock()
	c.stats.WindowUpdatesIn++
	if !c.lim.take(&c.lim.windowUpdates, c.lastRead.Load()) {
		switch s := c.streams[f.id]; {
		case !c.client || f.id == 0:
		case s != nil:
			return c.streamErrorLocked(s, EnhanceYourCalm, "WINDOW_UPDATE flood")
		default: // what was under way when it was ended
			return c.strayLocked(f.id, 0, "WINDOW_UPDATE")
		}
		return violation(EnhanceYourCalm, "WINDOW_UPDATE flood")
	}
	if f.id == 0 {
		switch {
		case n == 0:
			return violation(ProtocolError, "WINDOW_UPDATE of 0 for the connection")
		case c.sendWin+n > maxWindowLimit:
			return violation(FlowControlError, "window of the connection above 2^31-1")
		}
		c.grantedLocked(n)
		c.serveWaitersLocked()
		return nil
	}
	s := c.streams[f.id]
	switch {
	case s == nil:
		return c.strayLocked(f.id, 0, "WINDOW_UPDATE")
	case n == 0:
		return c.streamErrorLocked(s, ProtocolError, "WINDOW_UPDATE of 0")
	case s.sendWin+n > maxWindowLimit:
		return c.streamErrorLocked(s, FlowControlError, "window of the stream above 2^31-1")
	}
	s.sendWin += n
	s.unacked = max(0, s.unacked-n)
	c.openedLocked(s)
	return nil
}
