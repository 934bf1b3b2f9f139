package cluster

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/discovery"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// memberKey tells endpoints apart.
type memberKey struct{ network, address, name string }

// member is an endpoint that is in the list, or was not long ago.
type member struct {
	key  memberKey
	info upstream.Endpoint
	end  *transport.Endpoint
	// What is shared with other handlers: connections by address and how it is reached, the State by that and what is meant by
	// health. (The third, the load, by address alone, is had through the State.)
	conns *upstream.Lease[*transport.Endpoint]
	state *upstream.Lease[*upstream.State]
	// ears end the listening to State and connections, leave gives the limits up that are in force, stops end what looks after
	// it, nil while nothing does.
	ears  []func()
	leave func()
	stops []func()

	removed time.Time // when it left the list; zero while it is in
	busy    bool      // there were calls on it then
	drained bool      // it was reported that there are none any more
	cut     bool      // its calls were ended
}

// listLocked makes the members what the configuration and the sources say. The order is theirs: static endpoints first,
// then source by source.
func (c *Cluster) listLocked() error {
	wanted := c.wantedLocked()
	if c.sameLocked(wanted) {
		return nil
	}
	live := make([]*member, 0, len(wanted))
	var added []*member
	for i := range wanted {
		info := &wanted[i]
		key := keyOf(info)
		m := c.members[key]
		if m == nil {
			var err error
			if m, err = c.newMember(key, info); err != nil {
				for _, m := range added {
					delete(c.members, m.key)
					m.release()
				}
				return fmt.Errorf("upstream %s: %w", info.Address, err)
			}
			c.members[key] = m
			added = append(added, m)
		}
		live = append(live, m)
	}
	before := make(map[*member]bool, len(c.live))
	for _, m := range c.live {
		before[m] = true
	}
	listed := make(map[*member]bool, len(live))
	came := 0 // some of them again, within memoryTime
	for i, m := range live {
		listed[m] = true
		if !before[m] {
			came++
		}
		m.removed, m.busy, m.drained, m.cut = time.Time{}, false, false, false
		state := m.info.State
		m.info = wanted[i]
		m.info.State = state
	}
	now := time.Now()
	gone := 0
	c.draining = slices.DeleteFunc(c.draining, func(m *member) bool { return listed[m] })
	for _, m := range c.live {
		if !listed[m] {
			m.removed, m.busy = now, m.info.State.Active() > 0
			c.draining = append(c.draining, m)
			gone++
		}
	}
	c.live = live
	if c.started {
		for _, m := range added {
			c.useLocked(m)
		}
		c.cfg.Logger.Info("upstreams have changed", zap.Int("upstreams", len(live)), zap.Int("added", came), zap.Int("removed", gone))
	}
	if len(c.draining) > 0 {
		c.sweepLaterLocked()
	}
	return nil
}

// wantedLocked is the list as it should be, each endpoint once: those that are named several times get the sum of their
// weights.
func (c *Cluster) wantedLocked() []upstream.Endpoint {
	var all []upstream.Endpoint
	preferred := false
	for _, s := range c.sources {
		preferred = preferred || s.Preferred && s.found
	}
	if !preferred {
		all = append(all, c.cfg.Static...)
	}
	for _, s := range c.sources {
		all = append(all, s.list...)
	}
	places := make(map[memberKey]int, len(all))
	out := make([]upstream.Endpoint, 0, len(all))
	for i := range all {
		key := keyOf(&all[i])
		at, ok := places[key]
		if !ok {
			places[key] = len(out)
			out = append(out, all[i])
			out[len(out)-1].Weight = all[i].EffectiveWeight()
			continue
		}
		out[at].Weight = min(out[at].Weight+all[i].EffectiveWeight(), upstream.MaxWeight)
	}
	if n := len(all) - len(out); n != c.surplus && n > 0 {
		c.cfg.Logger.Warn("upstreams are listed more than once; each is one upstream with the sum of the weights", zap.Int("surplus", n), zap.Int("upstreams", len(out)))
	}
	c.surplus = len(all) - len(out)
	return out
}

func keyOf(e *upstream.Endpoint) memberKey { return memberKey{e.Network, e.Address, e.Name} }

// sameLocked tells whether the members are what is wanted already. DNS servers, for one, answer the same all the time.
func (c *Cluster) sameLocked(wanted []upstream.Endpoint) bool {
	return slices.EqualFunc(c.live, wanted, func(m *member, w upstream.Endpoint) bool {
		a := &m.info
		return a.Network == w.Network && a.Address == w.Address && a.Name == w.Name && a.Weight == w.Weight &&
			a.Priority == w.Priority && a.Locality == w.Locality && a.Origin == w.Origin && maps.Equal(a.Metadata, w.Metadata)
	})
}

func (c *Cluster) newMember(key memberKey, info *upstream.Endpoint) (*member, error) {
	m := &member{key: key, info: *info, conns: transport.Pool.NewLease(), state: upstream.States.NewLease()}
	addr, cfg := upstream.Address{Network: info.Network, Dial: info.Address}, c.cfg.Transport(info)
	var err error
	if m.end, err = transport.Acquire(m.conns, addr, cfg); err == nil {
		m.info.State, err = m.state.Acquire(transport.Key(addr, cfg)+"\n"+c.cfg.Health, func() (*upstream.State, error) {
			return upstream.NewState(upstream.LoadOf(addr)), nil
		})
	}
	if err != nil {
		m.release()
		return nil, err
	}
	// Calls may come before the configuration is in force: they hear of what they wait for, but nobody else does before that.
	m.ears = append(m.ears,
		m.end.Attach(m.info.State),
		m.info.State.Watch(func(ch upstream.Change) {
			c.stir()
			if c.running.Load() {
				c.changed(ch)
			}
		}),
		m.info.State.WatchStatus(func(_, _ upstream.Status) {
			c.stir()
			if c.running.Load() {
				c.statusChanged()
			}
		}))
	return m, nil
}

// release gives back what newMember took.
func (m *member) release() {
	for _, stop := range slices.Backward(m.ears) { // or it hears of its own end
		stop()
	}
	m.state.Release()
	m.conns.Release()
}

// useLocked puts the limits of a member's connections into force, as the configuration is.
func (c *Cluster) useLocked(m *member) {
	cfg := c.cfg.Transport(&m.info)
	other, leave := m.end.Use(cfg, c.cfg.Configuration)
	if other != 0 && !c.differs {
		c.differs = true // once: it may be so with thousands of upstreams
		c.cfg.Logger.Warn("handlers allow different numbers of connections to the same upstream; the largest max_conns holds for all of them",
			zap.String("upstream", m.info.Address), zap.Int("max_conns", cmp.Or(cfg.MaxConns, transport.DefaultMaxConns)), zap.Int("other_max_conns", other))
	}
	m.leave = leave
}

// uses tells which of the snapshot's live endpoints the policy uses, by index. Nil: all.
func (c *Cluster) uses(s *upstream.Snapshot) []bool {
	p, ok := c.cfg.Policy.(selection.Selective)
	if !ok {
		return nil
	}
	list := p.Uses(s)
	if list == nil {
		return nil
	}
	used := make([]bool, len(s.Endpoints))
	for _, i := range list {
		used[i] = true
	}
	return used
}

// attendLocked begins to look after those of the live endpoints that are used, and returns those that are looked after
// without being used any more.
func (c *Cluster) attendLocked(used []bool) (unused []*member) {
	if !c.started {
		return nil
	}
	for i, m := range c.live {
		switch use := used == nil || used[i]; {
		case use && m.stops == nil:
			c.lookAfterLocked(m)
		case !use && m.stops != nil:
			unused = append(unused, m)
		}
	}
	return unused
}

func (c *Cluster) lookAfterLocked(m *member) {
	m.stops = append(m.stops, m.end.Preconnect(c.cfg.Transport(&m.info).MinConns))
	for _, start := range c.cfg.Companions {
		info := m.info // which changes
		m.stops = append(m.stops, start(&info, m.end))
	}
}

// leaveAlone ends what lookAfterLocked began.
func (m *member) leaveAlone() {
	for _, stop := range m.stops {
		stop()
	}
	m.stops = nil
}

// abandon ends everything.
func (m *member) abandon() {
	if m.leave != nil {
		m.leave()
	}
	m.leaveAlone()
}

// changed runs when a member's state does. It is called by whoever changed it, so it must not block for long.
func (c *Cluster) changed(ch upstream.Change) {
	switch ch {
	case upstream.ServicesChanged:
		c.tell()
		return
	case upstream.Stirred:
		return
	case upstream.BecameUsable, upstream.BecameUnusable, upstream.Disconnected:
	}
	if ch != upstream.BecameUsable {
		for _, s := range c.sources {
			if r, ok := s.Source.Source.(discovery.Refresher); ok {
				r.Refresh() // it may have moved
			}
		}
	}
	if ch != upstream.Disconnected {
		c.healthChanged()
	}
}

func (c *Cluster) statusChanged() {
	c.tell()
	if _, selective := c.cfg.Policy.(selection.Selective); selective || c.cfg.Panics != nil {
		c.healthChanged() // for them it makes a difference why an endpoint is of no use
	}
}

// healthChanged makes a new view, if views depend on health.
func (c *Cluster) healthChanged() {
	if !c.watchesHealth() {
		return
	}
	go func() { // whoever changed it may hold locks
		c.mu.Lock()
		defer c.mu.Unlock()
		c.changeLocked(false, false)
	}()
}
