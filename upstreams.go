package grpcproxy

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap/zapcore"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/discovery"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/healthcheck"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/direct"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
	"github.com/caddygrpc/caddy-grpc-proxy/orca"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// originStatic is the origin of endpoints that the configuration names.
const originStatic = "static"

// provisionUpstreams makes the cluster of what the configuration says about upstreams.
func (h *Handler) provisionUpstreams(ctx caddy.Context) error {
	if h.Transport == nil {
		h.Transport = new(Transport)
	}
	static, targets, scheme, err := h.staticEndpoints(ctx)
	if err != nil {
		return err
	}
	sources, err := h.sources(ctx)
	if err != nil {
		return err
	}
	sources = append(sources, targets...)
	cfg, err := h.Transport.config(ctx, scheme)
	if err != nil {
		return fmt.Errorf("transport: %w", err)
	}
	if h.queueFull, err = h.Transport.queueFull(); err != nil {
		return err
	}
	if err := h.HealthChecks.Provision(ctx); err != nil {
		return err
	}
	cfg.Logger = h.logger
	reach := func(e *upstream.Endpoint) transport.Config { return h.Transport.forEndpoint(cfg, e) }
	h.HealthChecks.Start(healthcheck.Runtime{Transport: reach, Logger: h.logger, OnChange: h.events.tell, Hung: h.noteCalls})
	c := cluster.Config{
		Static:        static,
		Sources:       sources,
		Policy:        selection.WithPriorities(h.policy),
		Transport:     reach,
		Health:        h.HealthChecks.Identity(),
		Configuration: h.app,
		DrainTimeout:  time.Duration(h.DrainTimeout),
		Cut:           h.cutEndpoint,
		Drained:       h.tellDrained,
		Changed:       running.tell,
		Logger:        h.logger,
	}
	if hc := h.HealthChecks; hc != nil {
		c.Companions = append(c.Companions, hc.Attend)
		c.Hold = hc.Active != nil
		if hc.SlowStart != nil {
			c.Warmth = func(s *upstream.State) float64 { return hc.SlowStart.FactorSince(s.UsableSince(), time.Now()) }
		}
		if t := hc.PanicThreshold; t > 0 {
			c.Panics = func(usable, endpoints int) bool { return healthcheck.Panic(usable, endpoints, t) }
		}
	}
	if r, ok := c.Policy.(selection.LoadReportReceiver); ok && r.ReportInterval() > 0 {
		c.Companions = append(c.Companions, h.askForLoad(r))
	}
	if h.cluster, err = cluster.New(c); err != nil {
		return err
	}
	h.provisionProxy()
	return nil
}

// provisionProxy makes what carries the calls.
func (h *Handler) provisionProxy() {
	lb := h.LoadBalancing
	h.proxy = proxy.New(proxy.Config{
		Cluster: h.cluster, Retries: lb.Retries, TryDuration: time.Duration(lb.TryDuration), TryInterval: time.Duration(lb.TryInterval),
		ConnectTimeout: h.Transport.dialTimeout(), ClientConns: h.Transport.ProxyProtocol != "", QueueFull: h.queueFull,
		MaxTimeout: time.Duration(h.MaxTimeout), StreamTimeout: time.Duration(h.StreamTimeout), StreamIdleTimeout: time.Duration(h.StreamIdleTimeout),
		MaxMetadataBytes: h.MaxMetadataBytes, MaxMetadataFields: h.MaxMetadataFields,
		CancelBudget: max(cmp.Or(h.CancelBudget, defaultCancelBudget), 0), CancelWindow: cmp.Or(time.Duration(h.CancelWindow), defaultCancelWindow),
		ExposeUpstream: h.ExposeUpstream, Rules: newRules(h.Headers), Health: h.HealthChecks, Logger: h.logger, Level: h.logLevel(),
	})
	h.web = web.Handler{Proxy: h.proxy, Trusted: h.trusted, Logger: h.logger}
	h.direct = direct.Handler{Proxy: h.proxy, Trusted: h.trusted}
}

// logLevel is that of failed calls.
func (h *Handler) logLevel() zapcore.Level {
	if h.VerboseLogs {
		return zapcore.InfoLevel
	}
	return zapcore.DebugLevel
}

// askForLoad asks endpoints for load reports for as long as they are there.
func (h *Handler) askForLoad(r selection.LoadReportReceiver) cluster.Companion {
	return func(e *upstream.Endpoint, end *transport.Endpoint) (stop func()) {
		ctx, cancel := context.WithCancel(context.Background())
		s := &orca.Stream{
			Endpoint: end, Authority: e.Authority(), Interval: r.ReportInterval(), Logger: h.logger,
			Receive: func(report []byte) { r.ReceiveLoadReport(e.State, report) },
		}
		go s.Run(ctx)
		return cancel
	}
}

// sources loads the source of dynamic upstreams.
func (h *Handler) sources(ctx caddy.Context) ([]cluster.Source, error) {
	if h.DynamicUpstreamsRaw == nil {
		return nil, nil
	}
	h.dynamic = true
	var raw bytes.Buffer
	if err := json.Compact(&raw, h.DynamicUpstreamsRaw); err != nil {
		return nil, fmt.Errorf("dynamic_upstreams: %w", err)
	}
	mod, err := ctx.LoadModule(h, "DynamicUpstreamsRaw")
	if err != nil {
		return nil, fmt.Errorf("dynamic_upstreams: %w", err)
	}
	src, ok := mod.(discovery.Source)
	if !ok {
		return nil, fmt.Errorf("dynamic_upstreams: module %T is not a source of upstreams", mod)
	}
	name := "dynamic"
	if m, ok := mod.(caddy.Module); ok {
		name += " " + m.CaddyModule().ID.Name()
	}
	return []cluster.Source{{Source: src, Name: name, Key: raw.String(), Preferred: true}}, nil
}

// staticEndpoints resolves and expands the configured upstreams. They share one scheme. Targets become sources.
func (h *Handler) staticEndpoints(ctx caddy.Context) ([]upstream.Endpoint, []cluster.Source, upstream.Scheme, error) {
	var (
		out     []upstream.Endpoint
		targets []cluster.Source
		scheme  upstream.Scheme
		first   string
	)
	for i, u := range h.Upstreams {
		if u == nil {
			return nil, nil, "", fmt.Errorf("upstreams[%d] is null; write {\"dial\": \"host:port\"}", i)
		}
		if err := u.check(); err != nil {
			return nil, nil, "", fmt.Errorf("upstreams[%d] (%s): %w", i, u.Dial, err)
		}
		dial, err := upstream.Resolve(u.Dial)
		if err != nil {
			return nil, nil, "", fmt.Errorf("upstream address %w", err)
		}
		var (
			addrs []upstream.Address
			s     upstream.Scheme
		)
		if isTarget(dial) {
			t, err := h.target(ctx, dial, u)
			if err != nil {
				return nil, nil, "", err
			}
			targets = append(targets, t)
		} else if addrs, s, err = upstream.Parse(dial); err != nil {
			return nil, nil, "", err
		}
		if i == 0 {
			scheme, first = s, u.Dial
		} else if s != scheme {
			return nil, nil, "", schemeConflict(first, u.Dial)
		}
		for _, a := range addrs {
			e := upstream.Endpoint{Network: a.Network, Address: a.Dial, Origin: originStatic}
			u.describe(&e)
			out = append(out, e)
		}
	}
	return out, targets, scheme, nil
}

// describe gives an endpoint what is configured for it.
func (u *Upstream) describe(e *upstream.Endpoint) {
	e.Weight, e.Priority, e.Metadata = uint32(u.Weight), uint32(u.Priority), u.Metadata
	if u.Locality != nil {
		e.Locality = *u.Locality
	}
}

// maxPriority is that of DNS SRV records.
const maxPriority = 65_535

func (u *Upstream) check() error {
	if u.Weight < 0 || u.Weight > upstream.MaxWeight {
		return fmt.Errorf("weight is %d; it must be between 1 and %d (leave it out for 1)", u.Weight, upstream.MaxWeight)
	}
	if u.Priority < 0 || u.Priority > maxPriority {
		return fmt.Errorf("priority is %d; it must be between 0 and %d", u.Priority, maxPriority)
	}
	return nil
}

func schemeConflict(first, other string) error {
	return fmt.Errorf("upstreams %q and %q differ in scheme; all upstreams of one grpc_proxy must be reached in the same way", first, other)
}

// forEndpoint is how one endpoint is reached.
func (t *Transport) forEndpoint(cfg transport.Config, e *upstream.Endpoint) transport.Config {
	if t.plainPort(e) {
		cfg.TLS = nil
	}
	if cfg.TLS != nil && e.Name != "" && cfg.TLS.ServerName == "" {
		// The address was found by a name, and that is what the certificate is for. Endpoints of the same address by
		// other names must not share connections.
		cfg.TLS = withServerName(cfg.TLS, e.Name)
		cfg.Identity += " " + e.Name
	}
	return cfg
}

func withServerName(c *tls.Config, name string) *tls.Config {
	c = c.Clone()
	c.ServerName = name
	return c
}

// cutEndpoint ends the calls that run on an endpoint. It returns how many there were.
func (h *Handler) cutEndpoint(end *transport.Endpoint) int {
	return h.proxy.EndOn(end, proxy.Fail(grpcwire.Unavailable, proxy.ReasonDrained,
		"the upstream was taken out of service, and the time for its last calls is over (drain_timeout)"))
}

// tellDrained makes an event of an endpoint that was removed and has no calls any more.
func (h *Handler) tellDrained(e *upstream.Endpoint, since time.Time, why string) {
	h.events.tell(healthcheck.Transition{
		Endpoint: e, From: e.State.Status(),
		To: upstream.Status{Condition: upstream.ConditionDraining, Text: why, Since: since},
	})
}
