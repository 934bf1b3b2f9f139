package healthcheck

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// The defaults of Active.
const (
	DefaultInterval = 10 * time.Second
	DefaultTimeout  = 2 * time.Second
	DefaultPasses   = 1
	DefaultFails    = 2
	DefaultJitter   = 10

	// fastInterval is the default of Active.FastInterval.
	fastInterval = time.Second
	// minInterval is the shortest interval that is accepted.
	minInterval = 10 * time.Millisecond
)

// The values of Active.Initial.
const (
	InitialConnecting = "connecting"
	InitialHealthy    = "healthy"
)

// Active asks the upstreams for their health. What it finds is shared by all handlers with the same settings, and is
// remembered over reloads.
type Active struct {
	// The check. Default: `{"protocol": "grpc"}`, which asks the gRPC health service.
	CheckRaw json.RawMessage `json:"check,omitempty" caddy:"namespace=http.grpc_proxy.health_checks inline_key=protocol"`

	// The port to ask on. Default: the upstream's own, where `grpc` uses the connections of the RPCs.
	Port int `json:"port,omitempty"`

	// How often each upstream is asked. Default: `10s`.
	Interval caddy.Duration `json:"interval,omitempty"`

	// How long an answer may take. Default: `2s`, or the interval if that is shorter.
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// How many good answers in a row make an unhealthy upstream healthy. The first answer of all decides at once, and
	// so does what an upstream tells unasked. Default: `1`.
	Passes int `json:"passes,omitempty"`

	// How many bad answers in a row, or missing ones, make a healthy upstream unhealthy. The first answer of all decides
	// at once, and so does what an upstream tells unasked. Default: `2`.
	Fails int `json:"fails,omitempty"`

	// What an upstream is before its first answer: `connecting`, which gets no RPCs, or `healthy`.
	// Default: `connecting`.
	Initial string `json:"initial,omitempty"`

	// By how many percent, up or down, each interval is varied at random, so that upstreams are not all asked at the same
	// moment. A negative value turns that off. Default: `10`.
	Jitter int `json:"jitter,omitempty"`

	// The interval while a change is being confirmed: after the first of `fails` bad answers, or of `passes` good ones.
	// Default: `1s`, or the interval if that is shorter.
	FastInterval caddy.Duration `json:"fast_interval,omitempty"`

	// The interval for an unhealthy upstream. Default: the interval.
	UnhealthyInterval caddy.Duration `json:"unhealthy_interval,omitempty"`

	// The interval right after an upstream has become unhealthy, once. Default: the unhealthy interval.
	UnhealthyEdgeInterval caddy.Duration `json:"unhealthy_edge_interval,omitempty"`

	// The interval right after an upstream has become healthy, once. Default: the interval.
	HealthyEdgeInterval caddy.Duration `json:"healthy_edge_interval,omitempty"`

	// The interval for a healthy upstream that had no RPC since it was last asked. Default: the interval.
	NoTrafficInterval caddy.Duration `json:"no_traffic_interval,omitempty"`

	// End RPCs on an upstream that hangs: when it has not answered a check in time, and is unhealthy by that, with UNAVAILABLE
	// those of which no byte has moved in either direction since the check began. Default: false, they are left to their
	// deadlines.
	EndHungCalls bool `json:"end_hung_calls,omitempty"`

	prober    Prober
	transport func(*upstream.Endpoint) transport.Config
	logger    *zap.Logger
	hung      func(*transport.Endpoint) (end func()) // see Runtime
	// config is what tells these settings from others; question is the part of it that decides what an answer means.
	config, question string
}

// Provision loads the check.
func (a *Active) Provision(ctx caddy.Context) error {
	if a.CheckRaw == nil {
		a.CheckRaw = json.RawMessage(`{"protocol":"grpc"}`)
	}
	if err := a.setDefaults(); err != nil {
		return err
	}
	a.logger = ctx.Logger()
	mod, err := ctx.LoadModule(a, "CheckRaw") // which takes CheckRaw away
	if err != nil {
		return fmt.Errorf("health check: %w", err)
	}
	p, ok := mod.(Prober)
	if !ok {
		return fmt.Errorf("health check: module %T is not a check (healthcheck.Prober)", mod)
	}
	a.prober = p
	return nil
}

// setDefaults fills in what was left out and names the settings.
func (a *Active) setDefaults() error {
	if err := a.check(); err != nil {
		return err
	}
	defaultTo(&a.Interval, caddy.Duration(DefaultInterval))
	defaultTo(&a.Timeout, min(caddy.Duration(DefaultTimeout), a.Interval))
	defaultTo(&a.Passes, DefaultPasses)
	defaultTo(&a.Fails, DefaultFails)
	defaultTo(&a.Initial, InitialConnecting)
	defaultTo(&a.Jitter, DefaultJitter)
	defaultTo(&a.FastInterval, min(caddy.Duration(fastInterval), a.Interval))
	defaultTo(&a.UnhealthyInterval, a.Interval)
	defaultTo(&a.UnhealthyEdgeInterval, a.UnhealthyInterval)
	defaultTo(&a.HealthyEdgeInterval, a.Interval)
	defaultTo(&a.NoTrafficInterval, a.Interval)
	raw, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("health check: %w", err)
	}
	a.config = string(raw)
	question, err := json.Marshal([]any{a.Port, a.CheckRaw})
	if err != nil {
		return fmt.Errorf("health check: %w", err)
	}
	a.question = string(question)
	return nil
}

func defaultTo[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// check refuses what makes no sense.
func (a *Active) check() error {
	if a.Port < 0 || a.Port > 65535 {
		return fmt.Errorf("health check: port is %d; it must be between 1 and 65535 (leave it out for the upstream's own)", a.Port)
	}
	for _, d := range []struct {
		name  string
		value caddy.Duration
	}{
		{"interval", a.Interval},
		{"timeout", a.Timeout},
		{"fast_interval", a.FastInterval},
		{"unhealthy_interval", a.UnhealthyInterval},
		{"unhealthy_edge_interval", a.UnhealthyEdgeInterval},
		{"healthy_edge_interval", a.HealthyEdgeInterval},
		{"no_traffic_interval", a.NoTrafficInterval},
	} {
		if d.value < 0 || d.value > 0 && time.Duration(d.value) < minInterval {
			return fmt.Errorf("health check: %s is %v; it must be at least %v (leave it out for the default)", d.name, time.Duration(d.value), minInterval)
		}
	}
	if a.Passes < 0 || a.Fails < 0 {
		return errors.New("health check: passes and fails must not be negative (leave them out for the defaults)")
	}
	if a.Jitter > 90 {
		return fmt.Errorf("health check: jitter is %d percent; at most 90 are possible", a.Jitter)
	}
	switch a.Initial {
	case "", InitialConnecting, InitialHealthy:
		return nil
	}
	return fmt.Errorf("health check: initial %q is none of connecting, healthy", a.Initial)
}

// Start gives what Attend needs and only the handler knows: how an endpoint is reached, and where to log. It must be
// called after Provision and before Attend.
func (a *Active) Start(transport func(*upstream.Endpoint) transport.Config, logger *zap.Logger) {
	a.transport, a.logger = transport, logger
}

// Identity names what the verdicts mean. Handlers that ask different questions must not share an endpoint's state: the
// answers would get into each other's way. It is part of Config.Identity.
func (a *Active) Identity() string {
	if a == nil {
		return ""
	}
	return a.question
}

// services are those that endpoints are asked about besides the server as a whole.
func (a *Active) services() []string {
	if p, ok := a.prober.(ServiceProber); ok {
		return p.AskAbout()
	}
	return nil
}

// Attend checks an endpoint from now on until stop is called. Whoever asks the same of the same endpoint shares the
// checks. It is a cluster.Companion.
func (a *Active) Attend(info *upstream.Endpoint, end *transport.Endpoint) (stop func()) {
	r := rosterOf(info.State)
	r.join(a, info, end)
	return func() { r.leave(a) }
}

var _ caddy.Provisioner = (*Active)(nil)
