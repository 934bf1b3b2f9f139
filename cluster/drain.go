package cluster

import (
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
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

// sweep reports of endpoints that have left the list when their calls are over, lets go of them when nobody will ask for
// them again soon, and ends the calls that are still there when their time is over.
func (c *Cluster) sweep() {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return
	}
	c.sweeping = false
	now := time.Now()
	var (
		overdue, gone []*member
		over          []drained
	)
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
		if !m.drained && (m.cut || m.info.State.Active() == 0) {
			m.drained = true
			if !c.isLiveLocked(m.end) {
				over = append(over, drained{m, m.info, m.removed, m.busy})
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

	ended := make(map[*member]int)
	for _, m := range overdue { // without mu: ending calls takes their locks
		ended[m] = c.cut(m)
	}
	for i := range over {
		c.report(&over[i], ended[over[i].member])
	}
	for _, m := range gone {
		m.abandon()
		m.release()
	}
}

// drained is an endpoint that has left the list and has no calls any more.
type drained struct {
	member *member
	// The member's, which may change should it come back.
	info upstream.Endpoint
	left time.Time
	busy bool
}

// report tells that an endpoint may be switched off. ended is how many calls were ended for that.
func (c *Cluster) report(d *drained, ended int) {
	why := "it left the list of upstreams, and no call is left on it"
	if ended > 0 {
		why = "it left the list of upstreams, and its last calls were ended (drain_timeout)"
	}
	level := zap.DebugLevel // "upstreams have changed" has said that it is gone
	if d.busy {
		level = zap.InfoLevel
	}
	c.cfg.Logger.Log(level, "upstream drained", zap.String("upstream", d.info.Address), zap.String("reason", why), zap.Duration("after", time.Since(d.left)))
	if c.cfg.Drained != nil {
		c.cfg.Drained(&d.info, d.left, why)
	}
}

// isLiveLocked tells whether the endpoint is in the list, if under another name.
func (c *Cluster) isLiveLocked(end *transport.Endpoint) bool {
	return slices.ContainsFunc(c.live, func(m *member) bool { return m.end == end })
}

func (c *Cluster) cut(m *member) int {
	n := c.cfg.Cut(m.end)
	if n > 0 {
		c.cfg.Logger.Warn("ended the calls on an upstream that was removed (drain_timeout)", zap.String("upstream", m.info.Address), zap.Int("calls", n), zap.Duration("drain_timeout", c.cfg.DrainTimeout))
	}
	return n
}

// lingerLocked keeps an endpoint that drains for the rest of its time when the cluster is closed. If it has calls that is
// the rest of theirs as well, unless somebody uses the endpoint by then.
func (c *Cluster) lingerLocked(m *member) {
	away := time.Since(m.removed)
	if m.cut || m.info.State.Active() == 0 || c.isLiveLocked(m.end) {
		time.AfterFunc(max(0, memoryTime-away), m.release)
		return
	}
	time.AfterFunc(max(0, memoryTime-away, c.cfg.DrainTimeout-away), func() {
		if !m.conns.Shared() {
			c.cut(m)
		}
		m.release()
	})
}
