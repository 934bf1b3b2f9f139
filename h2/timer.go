package h2

import "time"

// One timer serves everything on a connection that depends on time. It is set for the earliest instant of interest and,
// when it fires, looks at all of them; an instant that moves away does not touch it.

// armLocked makes sure that the timer fires at the instant (see nano), or earlier.
func (c *Conn) armLocked(at int64) {
	if c.over != nil || c.timerAt != 0 && c.timerAt <= at {
		return
	}
	c.timerAt = at
	c.timer.Reset(time.Duration(max(0, at-c.nano())))
}

// onTimer runs on a goroutine of its own.
func (c *Conn) onTimer() {
	c.mu.Lock()
	now := c.nano()
	c.timerAt = 0
	if c.over != nil {
		c.unlock()
		return
	}
	var next int64
	want := func(at int64) {
		if next == 0 || at < next {
			next = at
		}
	}
	late := func(at int64) bool {
		if at > now {
			want(at)
			return false
		}
		return true
	}
	cfg := &c.cfg
	var over *Error
	// A server that is late with its acknowledgement harms nobody: it goes by the protocol's own values meanwhile, which
	// firstWindowLocked allows it.
	if !c.peerReady || !c.settingsAcked && !c.client {
		if late(c.settingsSentAt + int64(cfg.SettingsTimeout)) {
			over = &Error{Kind: KindTimeout, Code: SettingsTimeout, Debug: "no SETTINGS from the peer"}
			if c.peerReady {
				over.Debug = "the peer does not acknowledge SETTINGS"
			}
		}
	}
	if c.blockAt != 0 && late(c.blockAt+int64(cfg.SettingsTimeout)) {
		over = &Error{Kind: KindTimeout, Code: EnhanceYourCalm, Debug: "unfinished header block"}
	}
	if c.lowAt != 0 && late(c.lowAt+tightAfter) {
		c.tightenLocked()
	}
	if c.drainAt != 0 && late(c.drainAt) {
		c.drainLocked()
	}
	if cfg.PingInterval > 0 {
		if e := c.keepaliveLocked(late, want, now); e != nil {
			over = e
		}
	}
	if cfg.IdleTimeout > 0 && c.idleAt != 0 && late(c.idleAt+int64(cfg.IdleTimeout)) {
		c.idleAt = 0
		c.shutdownLocked() // at once: no stream may be opened in between
	}
	if over != nil {
		c.endLocked(over, true)
	}
	if next != 0 {
		c.armLocked(next)
	}
	c.flushLocked()
}

// idleSinceLocked starts the idle timeout.
func (c *Conn) idleSinceLocked(at int64) {
	if c.cfg.IdleTimeout > 0 {
		c.idleAt = at
		c.armLocked(at + int64(c.cfg.IdleTimeout))
	}
}

// keepaliveLocked sends a PING when nothing was read for the interval, and ends the connection when nothing is read
// for the timeout after it.
func (c *Conn) keepaliveLocked(late func(int64) bool, want func(int64), now int64) *Error {
	cfg := &c.cfg
	read := c.lastRead.Load()
	if c.kaSentAt != 0 {
		if read > c.kaSentAt {
			c.kaSentAt = 0
		} else if late(c.kaSentAt + int64(cfg.PingTimeout)) {
			return &Error{Kind: KindTimeout, Debug: "no answer to a keepalive PING"}
		} else {
			want(now + int64(cfg.PingInterval)) // it may be answered by then, and silence counts again
			return nil
		}
	}
	if len(c.streams) == 0 && !cfg.PingWithoutStreams {
		want(now + int64(cfg.PingInterval))
		return nil
	}
	if late(read + int64(cfg.PingInterval)) {
		c.kaSentAt = now
		c.appendPing(false, keepalivePing)
		want(now + int64(min(cfg.PingTimeout, cfg.PingInterval)))
	}
	return nil
}
