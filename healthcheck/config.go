package healthcheck

import (
	"fmt"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Config says how upstreams' health is found out, and what follows from it. All methods may be called on nil, which is the
// configuration without any health checks.
type Config struct {
	// Asks the upstreams. Default: off.
	Active *Active `json:"active,omitempty"`

	// Judges them by how RPCs go. Default: off.
	Passive *Passive `json:"passive,omitempty"`

	// Gives upstreams that have just become usable less than their share at first. Default: off.
	SlowStart *SlowStart `json:"slow_start,omitempty"`

	// When less than so many percent of the upstreams are usable, RPCs are balanced over all of them, whatever their
	// health, but for those that drain. 0 turns that off. Default: `0`.
	PanicThreshold float64 `json:"panic_threshold,omitempty"`

	monitor Monitor
}

// Provision loads and checks what is configured.
func (c *Config) Provision(ctx caddy.Context) error {
	if c == nil {
		return nil
	}
	if c.PanicThreshold < 0 || c.PanicThreshold > 100 {
		return fmt.Errorf("health checks: panic_threshold is %g; it must be between 0 (off) and 100 percent", c.PanicThreshold)
	}
	if c.Active != nil {
		if err := c.Active.Provision(ctx); err != nil {
			return err
		}
	}
	if c.Passive != nil {
		if err := c.Passive.Provision(ctx); err != nil {
			return err
		}
	}
	if c.SlowStart != nil {
		return c.SlowStart.Provision(ctx)
	}
	return nil
}

// Runtime is what only the handler knows.
type Runtime struct {
	// Transport says how an endpoint is reached; it is what cluster.Config has.
	Transport func(*upstream.Endpoint) transport.Config
	Logger    *zap.Logger
	// OnChange is told of events; see Monitor.
	OnChange func(Transition)
	// Hung notes how far the calls on an endpoint are when a check of it begins. end ends those that are no farther. It is
	// called only for Active.EndHungCalls. Nil: no calls are ended.
	Hung func(*transport.Endpoint) (end func())
}

// Start must be called once, after Provision and before Attend.
func (c *Config) Start(r Runtime) {
	if c == nil {
		return
	}
	c.monitor = Monitor{Logger: r.Logger, OnChange: r.OnChange}
	if c.Active != nil {
		c.Active.Start(r.Transport, r.Logger)
		c.Active.hung = r.Hung
	}
	if c.Passive != nil {
		c.Passive.Start(r.Logger)
	}
}

// Attend looks after an endpoint from now on until stop is called. It is a cluster.Companion.
func (c *Config) Attend(info *upstream.Endpoint, end *transport.Endpoint) (stop func()) {
	if c == nil {
		return func() {}
	}
	stops := []func(){c.monitor.Attend(info, end)}
	if s := c.SlowStart; s != nil {
		info.State.SetWarmUp(time.Duration(s.Window))
	} else {
		info.State.SetWarmUp(0) // an earlier configuration may have had it
	}
	if c.Passive != nil {
		stops = append(stops, c.Passive.Attend(info, end))
	}
	if c.Active != nil {
		stops = append(stops, c.Active.Attend(info, end))
	}
	return func() {
		for _, stop := range stops {
			stop()
		}
	}
}

// Observe takes how an attempt on the endpoint went, once, at its end. trial is what State.TryBegin returned for it.
func (c *Config) Observe(s *upstream.State, a *call.Attempt, trial upstream.Trial) {
	switch {
	case c != nil && c.Passive != nil:
		c.Passive.Observe(s, a, trial)
	default:
		s.EndTrial(trial)
	}
}

// Responded takes that the answer to a call on trial has begun.
func (c *Config) Responded(s *upstream.State, trial upstream.Trial) {
	if c != nil && c.Passive != nil {
		c.Passive.Responded(s, trial)
	}
}

// Observes tells whether Observe is to be called at all, and with a latency.
func (c *Config) Observes() (attempts, latency bool) {
	if c == nil || c.Passive == nil {
		return false, false
	}
	return true, c.Passive.NeedsLatency()
}

// Services are the services that endpoints are asked about.
func (c *Config) Services() []string {
	if c == nil || c.Active == nil {
		return nil
	}
	return c.Active.services()
}

// Identity tells apart handlers that must not share an endpoint's state, since what one means by its health is not what
// the other does. It is cluster.Config.Health. Times and thresholds are not part of it.
func (c *Config) Identity() string {
	if c == nil {
		return ""
	}
	id := c.Active.Identity()
	if p := c.Passive; p != nil {
		id += fmt.Sprintf(" passive %t %t %t", p.FailDuration > 0, p.UnhealthyRequestCount > 0, p.OutlierDetection != nil)
	}
	return id
}
