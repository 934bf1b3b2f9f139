package h2

import (
	"context"
	"encoding/binary"
	"time"

	"golang.org/x/net/http2"
)

// Payloads of PINGs that are not a caller's; callers' are numbers from 1.
const (
	drainPing     = 0x6472_6169_6e00_0000
	keepalivePing = 0x616c_6976_6500_0000
)

type pingWait struct {
	sentAt int64
	ch     chan struct{} // closed on the answer, and when the connection is over
	rtt    time.Duration // 0: none came
}

// Ping measures a round trip. It fails when ctx ends or the connection is over.
func (c *Conn) Ping(ctx context.Context) (time.Duration, error) {
	c.mu.Lock()
	if c.over != nil {
		err := c.over
		c.unlock()
		return 0, err
	}
	c.pingSeq++
	id := c.pingSeq
	w := &pingWait{sentAt: c.nano(), ch: make(chan struct{})}
	if c.pings == nil {
		c.pings = make(map[uint64]*pingWait)
	}
	c.pings[id] = w
	c.appendPing(false, id)
	c.flushLocked()
	select {
	case <-w.ch:
		c.mu.Lock()
		defer c.mu.Unlock()
		if w.rtt == 0 {
			return 0, c.over
		}
		return w.rtt, nil
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.pings, id)
		c.mu.Unlock()
		return 0, context.Cause(ctx)
	}
}

// onPing: RFC 9113 section 6.7. The answer queues behind what is pending (MaxPending bounds it) instead of jumping
// ahead: a peer that drains uses it to learn that all streams opened before have arrived.
func (c *Conn) onPing(f frameHeader, p []byte) *Error {
	if len(p) != 8 {
		return violation(FrameSizeError, "PING of a size other than 8")
	}
	if f.id != 0 {
		return violation(ProtocolError, "PING on a stream")
	}
	data := binary.BigEndian.Uint64(p)
	c.mu.Lock()
	defer c.unlock()
	if !f.flags.Has(http2.FlagPingAck) {
		c.stats.PingsIn++
		if !c.lim.take(&c.lim.pings, c.lastRead.Load()) {
			return violation(EnhanceYourCalm, "PING flood")
		}
		c.appendPing(true, data)
		return nil
	}
	switch w := c.pings[data]; {
	case w != nil:
		delete(c.pings, data)
		w.rtt = time.Duration(max(1, c.nano()-w.sentAt))
		c.rtt = int64(w.rtt)
		close(w.ch)
	case data == drainPing:
		c.drainLocked()
	}
	return nil // any frame is a sign of life: keepalive looks at lastRead
}

// onGoAway: RFC 9113 section 6.8.
func (c *Conn) onGoAway(f frameHeader, p []byte) *Error {
	if f.id != 0 {
		return violation(ProtocolError, "GOAWAY on a stream")
	}
	if len(p) < 8 {
		return violation(FrameSizeError, "GOAWAY shorter than 8")
	}
	last := be32(p) & maxStreamID
	e := &Error{Kind: KindGoAway, Code: ErrCode(be32(p[4:])), Remote: true, Debug: string(p[8:min(len(p), 1<<10)])}
	c.mu.Lock()
	if !c.lim.take(&c.lim.settings, c.lastRead.Load()) {
		c.unlock()
		return violation(EnhanceYourCalm, "GOAWAY flood")
	}
	c.goAwayIn = e
	if !c.client {
		c.unlock()
		if c.cfg.OnGoAway != nil {
			c.cfg.OnGoAway(c, e)
		}
		return nil
	}
	c.leaveLocked()
	out := *e
	out.Unprocessed = true
	var shut []*Stream
	for id, s := range c.streams {
		if id > last {
			shut = append(shut, s)
		}
	}
	for _, s := range shut {
		s.err = &out
		s.dropLocked()
	}
	c.unlock()
	for _, s := range shut {
		s.r.RecvReset(s, &out)
	}
	if c.cfg.OnGoAway != nil {
		c.cfg.OnGoAway(c, e)
	}
	c.mu.Lock()
	c.endIfDrainedLocked()
	c.unlock()
	return nil
}
