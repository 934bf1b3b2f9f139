package cluster

import (
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const (
	// warmScale is what all weights are multiplied by where endpoints warm up, so that a part of a small weight is a whole
	// number; a tenth or a hundredth of it if the weights are large.
	warmScale = 100
	// warmEvery is how often weights are brought up to date while an endpoint warms up.
	warmEvery = time.Second
)

// warmLocked gives each endpoint that is warming up the part of its weight that it has by now (slow start).
func (c *Cluster) warmLocked(s *upstream.Snapshot) {
	if c.cfg.Warmth == nil {
		return
	}
	scale := c.scaleLocked()
	for _, list := range [][]upstream.Endpoint{s.Endpoints, s.Draining} {
		for i := range list {
			e := &list[i]
			part := 1.0
			if e.State.UsableExcept(upstream.Momentary) {
				part = c.cfg.Warmth(e.State)
			}
			e.Weight = uint32(min(max(float64(e.EffectiveWeight())*scale*part, 1), upstream.MaxWeight))
			if part < 1 {
				c.changeLaterLocked(warmEvery)
			}
		}
	}
}

// scaleLocked is what all weights are multiplied by.
func (c *Cluster) scaleLocked() float64 {
	most := uint32(1)
	for _, m := range c.live {
		most = max(most, m.info.EffectiveWeight())
	}
	scale := float64(warmScale)
	for scale > 1 && float64(most)*scale > upstream.MaxWeight {
		scale /= 10 // in steps, so that weights stay what they are when the heaviest comes or goes, as far as there is room
	}
	return scale
}

// panics tells whether so few of the endpoints in use are healthy that health does not count, and how many there are.
func (c *Cluster) panics(v *View) (yes bool, usable, all int) {
	// Those come and go with each call; and who has not answered yet may well be healthy, or every start were a panic.
	const harmless = upstream.Momentary | upstream.Connecting
	endpoints := v.Snapshot.Endpoints
	for i := range endpoints {
		s := endpoints[i].State
		if s.Has(upstream.Draining) || v.used != nil && !v.used[i] {
			continue // nobody wants it to be used, panic or not
		}
		all++
		if s.UsableExcept(harmless) {
			usable++
		}
	}
	if !c.cfg.Panics(usable, all) {
		return false, usable, all
	}
	carrier, ok := c.cfg.Policy.(selection.Carrier)
	return !ok || !carrier.CarriesAll(endpoints), usable, all
}

// panicLocked judges the view.
func (c *Cluster) panicLocked(v *View) {
	if c.cfg.Panics == nil {
		return
	}
	var usable, all int
	v.Panic, usable, all = c.panics(v)
	if v.Panic == c.panicking {
		return
	}
	c.panicking = v.Panic
	if v.Panic {
		c.cfg.Logger.Warn("so few upstreams are healthy that calls are balanced over all of them (panic_threshold)", zap.Int("healthy", usable), zap.Int("upstreams", all))
	} else {
		c.cfg.Logger.Info("enough upstreams are healthy again (panic_threshold)", zap.Int("healthy", usable), zap.Int("upstreams", all))
	}
}

// reconsider finds out whether there is a panic: views are made some time after health has changed, and calls that wait for an
// endpoint had better not wait for that.
func (c *Cluster) reconsider() {
	v := c.View()
	if v.Panic || c.cfg.Panics == nil {
		return
	}
	if yes, _, _ := c.panics(v); !yes {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.View() != v {
		return
	}
	next := *v // the picker is good for a panic too
	if c.panicLocked(&next); next.Panic {
		c.view.Store(&next)
		c.stir()
		c.tell()
	}
}

// watchesHealth tells whether a view depends on which endpoints were usable when it was made.
func (c *Cluster) watchesHealth() bool {
	if c.cfg.Warmth != nil || c.cfg.Panics != nil {
		return true
	}
	w, ok := c.cfg.Policy.(selection.HealthWatcher)
	return ok && w.WatchesHealth()
}

// Disregard are the reasons not to use an endpoint that mean nothing now, since there is a panic.
func (v *View) Disregard() upstream.Reason {
	if v.Panic {
		return upstream.Unhealthy | upstream.Ejected | upstream.Failing | upstream.Probation | upstream.OnTrial | upstream.Connecting
	}
	return 0
}

// Live are the endpoints that are not draining.
func (v *View) Live() []Endpoint { return v.Endpoints[:len(v.Snapshot.Endpoints)] }
