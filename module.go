package grpcproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/healthcheck"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/direct"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() {
	caddy.RegisterModule(new(Handler))
}

// Handler is a gRPC load balancer. It chooses an upstream for each RPC, whatever connection the client uses, carries
// all kinds of RPC without buffering, and answers every failure as gRPC: with a status the client can read and a
// message that says what failed.
//
// Requests that are not gRPC (content-type `application/grpc`, alone or followed by `+` or `;`) are passed to the next
// handler.
//
// The handler sets these placeholders; the upstream's can be used in `headers`, all in log formats and later handlers:
//
// Placeholder | Description
// ------------|-------------
// `{http.grpc_proxy.service}` | The service of the RPC, `pkg.Service`
// `{http.grpc_proxy.method}` | The method of the RPC
// `{http.grpc_proxy.upstream.address}` | The upstream of the last attempt, as configured
// `{http.grpc_proxy.upstream.hostport}` | Its host and port
// `{http.grpc_proxy.upstream.host}` | Its host
// `{http.grpc_proxy.upstream.port}` | Its port
// `{http.grpc_proxy.status}` | The gRPC status, `UNAVAILABLE`, say
// `{http.grpc_proxy.status_code}` | Its number
// `{http.grpc_proxy.status_source}` | Where the status came from: `wire`, `http` (mapped from an HTTP status) or `proxy`
// `{http.grpc_proxy.ended_by}` | Who ended the RPC: `client`, `upstream`, `proxy` or `deadline`
// `{http.grpc_proxy.reason}` | What failed, where the proxy made the status (`UPSTREAM_CONNECT_FAILED`, …)
// `{http.grpc_proxy.attempts}` | How many upstreams were tried
// `{http.grpc_proxy.latency}` | From the RPC's arrival to its end
type Handler struct {
	// The name of the group that the upstreams are, for `grpc_health`. Handlers of the same name are one group. Default: none.
	Group string `json:"group,omitempty"`

	// The upstreams to balance over. At least one is needed, or a source in `dynamic_upstreams`.
	Upstreams []*Upstream `json:"upstreams,omitempty"`

	// A source that finds upstreams while Caddy runs. If there are `upstreams` as well, they serve only until the source
	// has found some.
	DynamicUpstreamsRaw json.RawMessage `json:"dynamic_upstreams,omitempty" caddy:"namespace=http.grpc_proxy.discovery inline_key=source"`

	// How to choose among the upstreams.
	LoadBalancing *LoadBalancing `json:"load_balancing,omitempty"`

	// How the upstreams' health is found out, and what follows from it. Default: an upstream that cannot be connected to
	// gets no RPCs until it can, and nothing else.
	HealthChecks *healthcheck.Config `json:"health_checks,omitempty"`

	// How to reach the upstreams. All upstreams of a handler are reached in the same way.
	Transport *Transport `json:"transport,omitempty"`

	// Changes to the request metadata sent upstream and the response metadata sent to the client (leading metadata,
	// and the whole of an answer without messages; trailers are never changed).
	Headers *headers.Handler `json:"headers,omitempty"`

	// IP ranges (CIDR) of proxies in front whose `X-Forwarded-*` fields are believed and added to, besides those
	// configured for the whole server.
	TrustedProxies []string `json:"trusted_proxies,omitempty"`

	// The largest request metadata, in bytes as HTTP/2 counts them (names, values and 32 for each field), that is sent to an
	// upstream, with the path and what the proxy adds. RPCs with more get RESOURCE_EXHAUSTED. Default: no limit but the
	// server's own and what upstreams announce; RPCs with more than 8 KiB, for which some servers close the connection,
	// travel on connections of their own.
	MaxMetadataBytes int64 `json:"max_metadata_bytes,omitempty"`

	// How many fields they may be. RPCs with more get RESOURCE_EXHAUSTED. Default: no limit; RPCs with more than 100 fields
	// travel on connections of their own.
	MaxMetadataFields int `json:"max_metadata_fields,omitempty"`

	// How many RPCs one client (an IP address) may cancel within `cancel_window`. One that cancels more gets connections
	// to the upstreams of its own for as long, since servers close connections on which many streams are reset. A negative
	// value turns that off. Default: 100.
	CancelBudget int `json:"cancel_budget,omitempty"`

	// The time that `cancel_budget` is for. Default: `30s`.
	CancelWindow caddy.Duration `json:"cancel_window,omitempty"`

	// The longest time an RPC may take. A client's longer or missing `grpc-timeout` is lowered to it. When it is over,
	// the client gets DEADLINE_EXCEEDED and the upstream a cancellation. Default: no limit of the proxy's own.
	MaxTimeout caddy.Duration `json:"max_timeout,omitempty"`

	// Ends an RPC in which no byte has moved in either direction for so long, with UNAVAILABLE. Default: off; a silent
	// stream lives for ever.
	StreamIdleTimeout caddy.Duration `json:"stream_idle_timeout,omitempty"`

	// Ends an RPC after so long, however busy it is, with UNAVAILABLE. Unlike `max_timeout` it is not told to the
	// upstream as a deadline. Default: off.
	StreamTimeout caddy.Duration `json:"stream_timeout,omitempty"`

	// How long RPCs that are under way when the configuration is reloaded may go on; then they end with UNAVAILABLE.
	// Default: off; they are left alone.
	StreamCloseDelay caddy.Duration `json:"stream_close_delay,omitempty"`

	// How long RPCs may go on on an upstream that the source of `dynamic_upstreams` does not list any more; then they end
	// with UNAVAILABLE. New RPCs go elsewhere at once. Default: `10m`.
	DrainTimeout caddy.Duration `json:"drain_timeout,omitempty"`

	// How long RPCs may go on when Caddy exits and no `grace_period` is configured; then they end with UNAVAILABLE.
	// Default: `4s`, below systemd's usual limit. With a `grace_period`, they end shortly before it does.
	ExitTimeout caddy.Duration `json:"exit_timeout,omitempty"`

	// How many bytes of answers all RPCs of the process may hold together, that is, have got from upstreams and not passed on
	// yet, since their clients read slowly. Near it nobody gets more than the first 64 KiB ahead; above it, the RPCs that hold the
	// most end with RESOURCE_EXHAUSTED. It is one limit for all of them: where several handlers name one, the largest holds.
	// Default: 256 MiB.
	StreamMemoryLimit int64 `json:"stream_memory_limit,omitempty"`

	// Name the upstream's address in status messages and error details sent to clients, with what it said in a GOAWAY.
	// Logs always have both. Default: false.
	ExposeUpstream bool `json:"expose_upstream,omitempty"`

	// Log each failed RPC and attempt at the level INFO instead of DEBUG. Default: false.
	VerboseLogs bool `json:"verbose_logs,omitempty"`

	ctx     caddy.Context
	logger  *zap.Logger
	trusted []netip.Prefix
	policy  selection.Policy
	dynamic bool // there is a source
	cluster *cluster.Cluster
	app     *App
	proxy   *proxy.Proxy
	web     web.Handler
	direct  direct.Handler
	// placeholders is one that calls need a request for.
	placeholders string
	events       events
	// shutdown is done once, when the server shuts down.
	shutdown sync.Once
	// queueFull is the status for calls that find an upstream's queue full.
	queueFull grpcwire.Code
}

// Upstream is one address to balance over.
type Upstream struct {
	// Where to dial: `host:port`, `:port` (this machine), `host:from-to` (a range of ports), `unix//path/to/socket`, or a
	// gRPC target, `dns:///name:port` (each of the name's addresses is an upstream of its own, looked up again and again).
	// Global placeholders such as `{env.BACKEND}` are resolved when the configuration is loaded, and must have a value.
	Dial string `json:"dial,omitempty"`

	// The upstream's share of the RPCs relative to the others', 1 to 65535, for policies that weigh. Default: `1`.
	Weight int `json:"weight,omitempty"`

	// The upstream's level: one of a higher number is used only when those of lower numbers cannot carry the load.
	// Default: `0`.
	Priority int `json:"priority,omitempty"`

	// Where the upstream is, for the policy `locality`.
	Locality *upstream.Locality `json:"locality,omitempty"`

	// What else is known about it, for the policy `subset`. `hash_key` stands for the address in consistent hashing.
	Metadata map[string]string `json:"metadata,omitempty"`
}

// LoadBalancing says how upstreams are chosen and how long one is looked for.
type LoadBalancing struct {
	// The selection policy. Default: `least_request`.
	SelectionPolicyRaw json.RawMessage `json:"selection_policy,omitempty" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`

	// How many further upstreams are tried when one cannot be connected to or refuses the RPC unprocessed. Default:
	// all of them.
	Retries int `json:"retries,omitempty"`

	// How long to go on looking for an upstream that takes the RPC, after all have been tried once, before the client
	// gets UNAVAILABLE. Default: 0.
	TryDuration caddy.Duration `json:"try_duration,omitempty"`

	// How long to wait between two rounds of trying. Default: `250ms`.
	TryInterval caddy.Duration `json:"try_interval,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.grpc_proxy",
		New: func() caddy.Module { return new(Handler) },
	}
}

const (
	defaultExitTimeout  = 4 * time.Second
	defaultDrainTimeout = 10 * time.Minute
	defaultTryInterval  = 250 * time.Millisecond
	defaultPolicy       = "least_request"
	defaultCancelBudget = 100
	defaultCancelWindow = 30 * time.Second
)

// Provision sets the handler up. It dials nothing.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.ctx = ctx
	h.logger = ctx.Logger()
	h.placeholders = placeholderIn(h.LoadBalancing, h.Headers)
	if h.ExitTimeout == 0 {
		h.ExitTimeout = caddy.Duration(defaultExitTimeout)
	}
	if h.DrainTimeout == 0 {
		h.DrainTimeout = caddy.Duration(defaultDrainTimeout)
	}
	if h.LoadBalancing == nil {
		h.LoadBalancing = new(LoadBalancing)
	}
	if h.LoadBalancing.TryInterval == 0 {
		h.LoadBalancing.TryInterval = caddy.Duration(defaultTryInterval)
	}
	if h.LoadBalancing.SelectionPolicyRaw == nil {
		h.LoadBalancing.SelectionPolicyRaw = json.RawMessage(`{"policy":"` + defaultPolicy + `"}`)
	}
	var err error
	if h.policy, err = selection.Load(ctx, h.LoadBalancing, "SelectionPolicyRaw"); err != nil {
		return fmt.Errorf("load_balancing.selection_policy: %w", err)
	}
	if h.trusted, err = parsePrefixes(h.TrustedProxies); err != nil {
		return err
	}
	if h.Headers != nil {
		if err := h.Headers.Provision(ctx); err != nil {
			return fmt.Errorf("headers: %w", err)
		}
	}
	if ctx.Value(caddyhttp.ServerCtxKey) != nil {
		if h.app, err = appOf(ctx); err != nil {
			return err
		}
	}
	if err := h.provisionUpstreams(ctx); err != nil {
		return err
	}
	h.Transport.files.watchExpiry(h.logger)
	h.limitStreamMemory(h.StreamMemoryLimit)
	return h.watchServer(ctx)
}

// watchStart lets the cluster begin once the configuration has started; it may still fail before that.
func (h *Handler) watchStart(ctx caddy.Context) error {
	app, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	h.events.app, h.events.ctx = app.(*caddyevents.App), ctx
	h.app.join(h)
	return nil
}

// Validate refuses what cannot work.
func (h *Handler) Validate() error {
	if len(h.Upstreams) == 0 && !h.dynamic {
		return errors.New("no upstreams; write their addresses after grpc_proxy or in a `to` line, or name a source with `dynamic`")
	}
	for _, d := range []struct {
		name  string
		value caddy.Duration
	}{
		{"max_timeout", h.MaxTimeout},
		{"stream_idle_timeout", h.StreamIdleTimeout},
		{"stream_timeout", h.StreamTimeout},
		{"stream_close_delay", h.StreamCloseDelay},
		{"exit_timeout", h.ExitTimeout},
		{"drain_timeout", h.DrainTimeout},
		{"cancel_window", h.CancelWindow},
		{"load_balancing.try_duration", h.LoadBalancing.TryDuration},
		{"load_balancing.try_interval", h.LoadBalancing.TryInterval},
	} {
		if d.value < 0 {
			return fmt.Errorf("%s is %v; it must not be negative (leave it out for the default)", d.name, time.Duration(d.value))
		}
	}
	if h.LoadBalancing.Retries < 0 {
		return fmt.Errorf("load_balancing.retries is %d; it must not be negative", h.LoadBalancing.Retries)
	}
	if h.MaxMetadataBytes < 0 {
		return fmt.Errorf("max_metadata_bytes is %d; it must not be negative (leave it out for no limit)", h.MaxMetadataBytes)
	}
	if h.MaxMetadataFields < 0 {
		return fmt.Errorf("max_metadata_fields is %d; it must not be negative (leave it out for no limit)", h.MaxMetadataFields)
	}
	if h.Headers != nil {
		if err := h.Headers.Validate(); err != nil {
			return fmt.Errorf("headers: %w", err)
		}
		if err := checkHeaders(h.Headers); err != nil {
			return fmt.Errorf("headers: %w", err)
		}
	}
	if err := checkGroup(h.Group); err != nil {
		return err
	}
	if err := h.validateStreamMemory(); err != nil {
		return err
	}
	return h.Transport.validate()
}

// Cleanup gives back what Provision took. RPCs may still be under way, and go on.
func (h *Handler) Cleanup() error {
	h.app.leave(h)
	if h.Transport != nil {
		h.Transport.files.stop()
	}
	h.limitStreamMemory(0)
	if h.cluster != nil {
		h.cluster.Close()
	}
	return nil
}

// watchServer connects the handler to the server it runs in: to learn of reload and exit, and to tell the user of
// settings there that gRPC needs.
func (h *Handler) watchServer(ctx caddy.Context) error {
	srv, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok {
		return nil
	}
	srv.RegisterOnShutdown(h.onShutdown)
	if len(srv.ExpectedUnderscoreHeaders) == 0 && len(srv.ExpectedDotHeaders) == 0 {
		hintAtMetadataKeys(h.logger)
	}
	if _, ok := relayed.Load(srv); !ok {
		hintAtRelay(h.logger)
	}
	if err := h.watchStart(ctx); err != nil {
		return err
	}
	h.app.grantWindows(srv)
	return nil
}

func parsePrefixes(list []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range list {
		if s == "private_ranges" {
			more, err := parsePrefixes(caddyhttp.PrivateRangesCIDR())
			if err != nil {
				return nil, err
			}
			out = append(out, more...)
			continue
		}
		p, err := caddyhttp.CIDRExpressionToPrefix(s)
		if err != nil {
			return nil, fmt.Errorf("trusted_proxies: %q is neither an IP address nor a CIDR range: %w", s, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.Validator             = (*Handler)(nil)
	_ caddy.CleanerUpper          = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
)
