package h2

import (
	"encoding/binary"

	"golang.org/x/net/http2"
)

// appendSettingsLocked appends our SETTINGS: what differs from the protocol's initial values.
func (c *Conn) appendSettingsLocked() {
	o := c.frame(0, http2.FrameSettings, 0, 0)
	at := len(o.b)
	put := func(id http2.SettingID, v uint32) {
		o.b = binary.BigEndian.AppendUint16(o.b, uint16(id))
		o.b = binary.BigEndian.AppendUint32(o.b, v)
	}
	if c.client {
		put(http2.SettingEnablePush, 0)
	} else {
		put(http2.SettingMaxConcurrentStreams, c.cfg.MaxStreams)
	}
	if c.cfg.InitialWindow != protocolWindow {
		put(http2.SettingInitialWindowSize, c.cfg.InitialWindow)
	}
	if c.cfg.MaxFrameSize != protocolFrameSize {
		put(http2.SettingMaxFrameSize, c.cfg.MaxFrameSize)
	}
	put(http2.SettingMaxHeaderListSize, c.cfg.MaxHeaderListSize)
	setLength(o.b[at-headerLen:], len(o.b)-at)
}

// onSettings: RFC 9113 section 6.5.
func (c *Conn) onSettings(f frameHeader, p []byte) *Error {
	if f.id != 0 {
		return violation(ProtocolError, "SETTINGS on a stream")
	}
	if f.flags.Has(http2.FlagSettingsAck) {
		if len(p) != 0 {
			return violation(FrameSizeError, "SETTINGS acknowledgement with a payload")
		}
		c.mu.Lock()
		c.ackedLocked()
		c.unlock()
		return nil
	}
	if len(p)%6 != 0 {
		return violation(FrameSizeError, "SETTINGS of a size that is no multiple of 6")
	}
	c.mu.Lock()
	c.stats.SettingsIn++
	if !c.lim.take(&c.lim.settings, c.lastRead.Load()) {
		c.unlock()
		return violation(EnhanceYourCalm, "SETTINGS flood")
	}
	before, window := c.availableLocked(), c.peerInitWindow
	if !c.peerReady && c.client {
		// A server that announces no limit has none (RFC 9113 section 6.5.2: initially unlimited).
		c.peerMaxStreams = maxStreamID
	}
	initial, highest := c.peerInitWindow, c.peerInitWindow
	for ; len(p) > 0; p = p[6:] {
		id, v := http2.SettingID(binary.BigEndian.Uint16(p)), be32(p[2:])
		if id == http2.SettingInitialWindowSize {
			initial = int64(v)
			highest = max(highest, initial)
			continue
		}
		if err := c.applyLocked(id, v); err != nil {
			c.unlock()
			return err
		}
	}
	if err := c.applyWindowLocked(initial, highest); err != nil {
		c.unlock()
		return err
	}
	c.frame(0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	c.control()
	if !c.peerReady && len(c.streams) == 0 {
		c.idleSinceLocked(c.lastRead.Load()) // until now the connection was being made
	}
	c.peerReady = true
	if c.availableLocked() > before {
		c.events |= evCapacity
	}
	if c.peerInitWindow > window {
		// After the acknowledgement: what goes by the new values comes behind it.
		var waiting []*Stream
		for _, s := range c.streams {
			if s.waiting && s.sendWin > 0 {
				waiting = append(waiting, s)
			}
		}
		for _, s := range waiting {
			c.openedLocked(s)
		}
	}
	c.unlock()
	if c.cfg.OnSettings != nil {
		c.cfg.OnSettings(c)
	}
	return nil
}

// applyLocked applies one setting; unknown ones are ignored.
func (c *Conn) applyLocked(id http2.SettingID, v uint32) *Error {
	switch id {
	case http2.SettingHeaderTableSize:
		if min(v, headerTableSize) != c.enc.max {
			c.sealLocked() // what was appended before the acknowledgement goes by the old size
			c.enc.setPeerMax(v)
		}
	case http2.SettingEnablePush:
		if v > 1 || v == 1 && c.client {
			return violation(ProtocolError, "invalid ENABLE_PUSH")
		}
	case http2.SettingMaxConcurrentStreams:
		c.peerMaxStreams = v
	case http2.SettingMaxFrameSize:
		if v < protocolFrameSize || v > maxFrameSizeLimit {
			return violation(ProtocolError, "invalid MAX_FRAME_SIZE")
		}
		if int(v) != c.peerMaxFrame {
			c.sealLocked()
			c.peerMaxFrame = int(v)
		}
	case http2.SettingMaxHeaderListSize:
		c.peerMaxHeaderList = v
	}
	return nil
}

// applyWindowLocked changes the send windows of all streams by the difference, possibly below zero (RFC 9113 section
// 6.9.2). One frame can name the initial window thousands of times. "The values in the SETTINGS frame MUST be processed in
// the order they appear" (section 6.5.3), but only two can be told afterwards: the last, which stays, and the highest, which made a
// window too large if any did.
func (c *Conn) applyWindowLocked(last, highest int64) *Error {
	if highest > maxWindowLimit {
		return violation(FlowControlError, "INITIAL_WINDOW_SIZE above 2^31-1")
	}
	before := c.peerInitWindow
	if highest == before && last == before {
		return nil
	}
	c.peerInitWindow = last
	for _, s := range c.streams {
		if s.sendWin+highest-before > maxWindowLimit {
			return violation(FlowControlError, "INITIAL_WINDOW_SIZE makes a window larger than 2^31-1")
		}
		s.sendWin += last - before
	}
	return nil
}

// ackedLocked notes that the peer goes by our SETTINGS from now on.
func (c *Conn) ackedLocked() {
	if c.settingsAcked {
		return
	}
	c.settingsAcked = true
	c.rtt = c.nano() - c.settingsSentAt
	if less := protocolWindow - int64(c.cfg.InitialWindow); less > 0 {
		for _, s := range c.streams {
			s.recvWin -= less
		}
	}
}
