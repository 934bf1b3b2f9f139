package cluster

import (
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// sweepLaterLocked sees to it that endpoints which drain are looked at.
func (c *Cluster) sweepLaterLocked() {
	if c.sweeping {
		return // a list that changes all the time must not put it off
	}
	c.sweeping = true
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
	c.sweeping = false
	now := time.Now()
	var overdue, gone []*member
	cut := false
	c.draining = slices.DeleteFunc(c.draining, func(m *member) bool {
		away := now.Sub(m.removed)
		if away >= c.cfg.DrainTimeout && !m.cut {
			m.cut = true
			cut = true
			if !c.isLiveLocked(m.end) {
				overdue = append(overdue, m)
			}
		}
		if away < memoryTime || m.info.State.Active() > 0 && !m.cut {
			return false
		}
		gone = append(gone, m)
		delete(c.members, m.key)
		return true
	})
	if cut {
		c.publishLocked() // first, so that no call comes after
	}
	if len(gone) > 0 {
		c.changeLocked(false, false)
	}
	if len(c.draining) > 0 {
		c.sweepLaterLocked()
	}
	c.mu.Unlock()

	for _, m := range overdue { // without mu: ending calls takes their locks
		c.cut(m)
	}
	for _, m := range gone {
		m.abandon()
		m.lease.Release()
	}
}

// isLiveLocked tells whether the endpoint is in the list, if under another name.
func (c *Cluster) isLiveLocked(end *transport.Endpoint) bool {
	return slices.ContainsFunc(c.live, func(m *member) bool { return m.end == end })
}

func (c *Cluster) cut(m *member) {
	if n := c.cfg.Cut(m.end); n > 0 {
		c.cfg.Logger.Warn("ended the calls on an upstream that was removed (drain_timeout)", zap.String("upstream", m.info.Address), zap.Int("calls", n), zap.Duration("drain_timeout", c.cfg.DrainTimeout))
	}
}

// lingerLocked keeps an endpoint that drains for the rest of its time when the cluster is closed. If it has calls that is
// the rest of theirs as well, unless somebody uses the endpoint by then.
func (c *Cluster) lingerLocked(m *member) {
	away := time.Since(m.removed)
	if m.cut || m.info.State.Active() == 0 || c.isLiveLocked(m.end) {
		time.AfterFunc(max(0, memoryTime-away), m.lease.Release)
		return
	}
	time.AfterFunc(max(0, memoryTime-away, c.cfg.DrainTimeout-away), func() {
		if !m.lease.Shared() {
			c.cut(m)
		}
		m.lease.Release()
	})
}
