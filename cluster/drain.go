package cluster

import (
	"slices"
	"time"

	"go.uber.org/zap"
)

// sweepLaterLocked sees to it that endpoints which drain are looked at.
func (c *Cluster) sweepLaterLocked() {
	if c.sweeper == nil {
		c.sweeper = time.AfterFunc(sweepEvery, c.sweep)
		return
	}
	c.sweeper.Reset(sweepEvery)
}

// sweep lets go of endpoints that have left the list when their calls are over and nobody will ask for them again soon, and
// ends the calls that are still there when their time is over.
func (c *Cluster) sweep() {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return
	}
	now := time.Now()
	var overdue, gone []*member
	c.draining = slices.DeleteFunc(c.draining, func(m *member) bool {
		away := now.Sub(m.removed)
		if away >= c.cfg.DrainTimeout && !m.cut {
			m.cut = true
			overdue = append(overdue, m)
		}
		if away < memoryTime || m.info.State.Active() > 0 && !m.cut {
			return false
		}
		gone = append(gone, m)
		delete(c.members, m.key)
		return true
	})
	if len(gone) > 0 {
		c.changeLocked(false, false)
	}
	if len(c.draining) > 0 {
		c.sweepLaterLocked()
	}
	c.mu.Unlock()

	for _, m := range overdue { // without mu: ending calls takes their locks
		if n := c.cfg.Cut(m.end); n > 0 {
			c.cfg.Logger.Warn("ended the calls on an upstream that was removed (drain_timeout)", zap.String("upstream", m.info.Address), zap.Int("calls", n), zap.Duration("drain_timeout", c.cfg.DrainTimeout))
		}
	}
	for _, m := range gone {
		m.abandon()
		m.lease.Release()
	}
}

// linger keeps the endpoint for the rest of its time after the cluster was closed.
func (m *member) linger() {
	time.AfterFunc(max(0, memoryTime-time.Since(m.removed)), m.lease.Release)
}
