package cluster

import (
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const (
	// warmScale is what all weights are multiplied by where endpoints warm up, so that a part of a small weight is a whole
	// number; less if the weights are large.
	warmScale = 100
	// warmEvery is how often weights are brought up to date while an endpoint warms up.
	warmEvery = time.Second
)

// warmLocked gives an endpoint that is warming up the part of its weight that it has by now (slow start).
func (c *Cluster) warmLocked(e *upstream.Endpoint, scale float64) {
	if c.cfg.Warmth == nil {
		return
	}
	full := float64(e.EffectiveWeight()) * scale
	part := 1.0
	if e.State.Usable() {
		part = c.cfg.Warmth(e.State)
	}
	e.Weight = uint32(min(max(full*part, 1), upstream.MaxWeight))
	if part < 1 {
		c.changeLaterLocked(warmEvery)
	}
}

// scaleLocked is what all weights are multiplied by.
func (c *Cluster) scaleLocked() float64 {
	most := uint32(1)
	for _, m := range c.live {
		most = max(most, m.info.EffectiveWeight())
	}
	return min(warmScale, upstream.MaxWeight/float64(most))
}

// panicLocked finds out whether so few endpoints are healthy that health does not count.
func (c *Cluster) panicLocked(v *View) {
	if c.cfg.Panics == nil {
		return
	}
	usable, all := 0, 0
	for i := range v.Snapshot.Endpoints {
		s := v.Snapshot.Endpoints[i].State
		if s.Has(upstream.Draining) {
			continue // nobody wants it to be used, panic or not
		}
		all++
		if s.UsableExcept(upstream.Full | upstream.OnTrial) { // which come and go with each call
			usable++
		}
	}
	v.Panic = c.cfg.Panics(usable, all)
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

// watchesHealth tells whether a view depends on which endpoints were usable when it was made.
func (c *Cluster) watchesHealth() bool {
	if c.cfg.Warmth != nil || c.cfg.Panics != nil {
		return true
	}
	w, ok := c.cfg.Policy.(selection.HealthWatcher)
	return ok && w.WatchesHealth()
}

// Live are the endpoints that are not draining.
func (v *View) Live() []*transport.Endpoint { return v.Endpoints[:len(v.Snapshot.Endpoints)] }
