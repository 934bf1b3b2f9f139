package h2

import (
	"errors"
	"io"
	"net"
	"time"
)

// end records why the connection is over; the first reason stays. The reading goroutine does the rest.
func (c *Conn) end(e *Error, goAway bool) {
	c.mu.Lock()
	c.endLocked(e, goAway)
	c.unlock()
}

func (c *Conn) endLocked(e *Error, goAway bool) {
	if c.over != nil {
		return
	}
	if !e.Connection {
		own := *e
		own.Connection = true
		e = &own
	}
	c.over = e
	c.abandonLocked(e)
	c.leaveLocked()
	c.stop.Store(true)
	if goAway && c.writeErr == nil {
		c.appendGoAway(c.lastProcessedLocked(), e.Code, e.Debug)
	}
	if e.Code == EnhanceYourCalm && !e.Remote && e.Kind == KindProtocol {
		c.stats.FloodsStopped++
	}
	c.cond.Broadcast()
	if err := c.nc.SetReadDeadline(time.Unix(1, 0)); err != nil {
		go c.sock.abort()
	}
}

// leaveLocked notes that the connection takes no new streams.
func (c *Conn) leaveLocked() {
	if !c.draining {
		c.draining = true
		close(c.leaving)
	}
}

// lastProcessedLocked is the last stream identifier for a GOAWAY sent now.
func (c *Conn) lastProcessedLocked() uint32 {
	if c.client {
		return 0
	}
	return min(c.nextID-1, c.goAwayOut)
}

// lossLocked makes the reason from a read error.
func (c *Conn) lossLocked(err error) *Error {
	e := &Error{Kind: KindConnLost, Remote: true, Err: err}
	switch {
	case c.writeErr != nil:
		e.Err = c.writeErr
	case err == nil || errors.Is(err, io.EOF):
		e.Err = io.ErrUnexpectedEOF
		e.Debug = "closed by the peer"
	case errors.Is(err, net.ErrClosed):
		e.Remote = false
	}
	if g := c.goAwayIn; g != nil {
		if len(c.streams) == 0 && g.Code == NoError {
			return g // it left in order
		}
		e.Code = g.Code
		if g.Debug != "" || g.Code != NoError {
			e.Debug = g.Debug
		}
	}
	return e
}

// Close ends the connection now: GOAWAY with the code and debug text goes out as far as the socket takes it within a
// second, and every stream gets RecvReset with KindLocal. It does not wait for that; Done tells.
func (c *Conn) Close(code ErrCode, debug string) {
	c.end(&Error{Kind: KindLocal, Code: code, Debug: debug}, true)
}

// Steps of a server's Shutdown.
const (
	drainNone    = iota
	drainNotice  // GOAWAY with the highest identifier and a PING are out
	drainLimited // GOAWAY with the real identifier is out
)

// drainTimeout is how long a server waits for the PING of its first GOAWAY.
const drainTimeout = 5 * time.Second

// Shutdown ends the connection in order. Client role: no new streams; when the last one has ended the connection
// closes. Server role: GOAWAY with the highest identifier first, and after a PING's round trip, when all streams the client
// opened without knowing have arrived, GOAWAY with the real one (RFC 9113 section 6.8); then it closes after the last
// stream. It does not wait.
func (c *Conn) Shutdown() {
	c.mu.Lock()
	c.shutdownLocked()
	c.flushLocked()
}

func (c *Conn) shutdownLocked() {
	switch {
	case c.over != nil:
	case c.client:
		c.leaveLocked()
		c.endIfDrainedLocked()
	case c.drainStep == drainNone:
		c.drainStep = drainNotice
		c.appendGoAway(maxStreamID, NoError, "")
		c.appendPing(false, drainPing)
		c.drainAt = c.nano() + int64(drainTimeout)
		c.armLocked(c.drainAt)
	}
}

// drainLocked is the second step of a server's Shutdown.
func (c *Conn) drainLocked() {
	if c.drainStep != drainNotice || c.over != nil {
		return
	}
	c.drainStep = drainLimited
	c.drainAt = 0
	c.appendGoAway(c.lastProcessedLocked(), NoError, "")
	c.endIfDrainedLocked()
}

// endIfDrainedLocked closes a connection that was shut down once nothing is left on it.
func (c *Conn) endIfDrainedLocked() {
	if len(c.streams) > 0 || c.over != nil {
		return
	}
	switch {
	case !c.client && c.drainStep == drainLimited:
		c.endLocked(&Error{Kind: KindLocal, Debug: "shut down"}, false)
	case c.client && c.draining:
		e := &Error{Kind: KindLocal, Debug: "shut down"}
		if c.goAwayIn != nil {
			own := *c.goAwayIn
			own.Unprocessed = false
			e = &own
		}
		c.endLocked(e, false)
		if c.writeErr == nil {
			c.appendGoAway(0, NoError, "")
		}
	}
}
