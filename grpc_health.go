package grpcproxy

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
)

func init() {
	caddy.RegisterModule(new(Health))
	httpcaddyfile.RegisterHandlerDirective("grpc_health", parseHealth)
	// Only Caddy's own directives can be named here; grpc_proxy comes after this one.
	httpcaddyfile.RegisterDirectiveOrder("grpc_health", httpcaddyfile.After, "respond")
}

// Health answers gRPC's own health service, `grpc.health.v1.Health`, for the upstreams of `grpc_proxy` handlers, wherever
// in the same configuration these are: clients, Kubernetes and load balancers in front ask the proxy as they would ask a
// server. Requests of any other service, and those that are not gRPC, go to the next handler.
//
// The empty service name stands for all upstreams that the handler answers for. Any other name is that of a group of
// upstreams or else, where `grpc_proxy` checks services (`health_services`), that of a service.
//
// When Caddy exits, every answer is NOT_SERVING from the first moment of the exit on, a `shutdown_delay` included.
type Health struct {
	// The groups of upstreams to answer for: the names given to `grpc_proxy` handlers as `group`. Default: all upstreams of
	// all handlers, with and without a group.
	Groups []string `json:"groups,omitempty"`

	// How many of the upstreams must take RPCs for an answer to be SERVING: `any` (at least one), `all`, or a percentage such
	// as `50%` (at least so many). Upstreams that drain do not count. Default: `any`.
	ServingIf string `json:"serving_if,omitempty"`

	app     *App
	percent int // 0: one is enough

	mu       sync.Mutex
	names    map[string]*watched
	dirty    bool // what is known about names may be out of date
	looking  bool // a goroutine is bringing it up to date
	shutdown bool // the server is shutting down
	over     chan struct{}
}

// CaddyModule returns the Caddy module information.
func (*Health) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.grpc_health",
		New: func() caddy.Module { return new(Health) },
	}
}

func parseHealth(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	g := new(Health)
	if err := g.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	return g, nil
}

// UnmarshalCaddyfile sets up the handler. Syntax:
//
//	grpc_health [<matcher>] [<groups...>] {
//	    serving_if any|all|<percent>%
//	}
func (h *Health) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	h.Groups = d.RemainingArgs()
	if err := h.checkNames(); err != nil {
		return d.WrapErr(err)
	}
	for d.NextBlock(0) {
		switch d.Val() {
		case "serving_if":
			args := d.RemainingArgs()
			if len(args) != 1 {
				return d.ArgErr()
			}
			h.ServingIf = args[0]
			if _, err := parseServingIf(args[0]); err != nil {
				return d.WrapErr(err)
			}
		default:
			return d.Errf("unrecognized word %q; expected serving_if", d.Val())
		}
	}
	return nil
}

// parseServingIf returns the percentage of upstreams that must be serving, 0 if one is enough.
func parseServingIf(s string) (int, error) {
	switch s {
	case "", "any":
		return 0, nil
	case "all":
		return 100, nil
	}
	digits, isPercent := strings.CutSuffix(s, "%")
	if n, err := strconv.Atoi(digits); isPercent && err == nil && n >= 1 && n <= 100 {
		return n, nil
	}
	return 0, fmt.Errorf("serving_if: %q is none of any, all, and a percentage from 1%% to 100%%", s)
}

// Provision connects the handler to its configuration and its server.
func (h *Health) Provision(ctx caddy.Context) error {
	var err error
	if h.percent, err = parseServingIf(h.ServingIf); err != nil {
		return err
	}
	h.names = make(map[string]*watched)
	h.over = make(chan struct{})
	if h.app, err = appOf(ctx); err != nil {
		return err
	}
	h.app.joinReporter(h)
	if srv, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		srv.RegisterOnShutdown(h.onShutdown)
	}
	return nil
}

// Validate refuses what cannot be the name of a group. Which groups there are is known only at the start: see checkGroups.
func (h *Health) Validate() error { return h.checkNames() }

func (h *Health) checkNames() error {
	for i, g := range h.Groups {
		if g == "" {
			return errors.New("grpc_health: the name of a group is empty; leave it out to answer for all upstreams")
		}
		if err := checkGroup(g); err != nil {
			return err
		}
		if slices.Contains(h.Groups[:i], g) {
			return fmt.Errorf("grpc_health names the group %q twice", g)
		}
	}
	return nil
}

// checkGroups refuses groups that no grpc_proxy of the configuration is.
func (h *Health) checkGroups(proxies []*Handler) error {
	if len(proxies) == 0 {
		return errors.New("grpc_health has no upstreams to answer for: there is no grpc_proxy in the configuration")
	}
	var known []string
	for _, p := range proxies {
		if p.Group != "" && !slices.Contains(known, p.Group) {
			known = append(known, p.Group)
		}
	}
	slices.Sort(known)
	for _, g := range h.Groups {
		if slices.Contains(known, g) {
			continue
		}
		have := "no grpc_proxy has a group; give it one with `group " + g + "` in its block"
		if len(known) > 0 {
			have = "the groups are " + strings.Join(known, ", ")
		}
		return fmt.Errorf("grpc_health: no grpc_proxy in the configuration has the group %q; %s", g, have)
	}
	return nil
}

// ServeHTTP answers a call of the health service.
func (h *Health) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	service, method, ok := grpcwire.SplitMethod(r.URL.Path)
	if !ok || service != grpcwire.HealthService || !web.IsGRPC(r) {
		return passOn(w, r, next)
	}
	c := &healthCall{h: h, w: w, r: r, method: method}
	c.serve()
	return nil
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Health)(nil)
	_ caddy.Validator             = (*Health)(nil)
	_ caddyhttp.MiddlewareHandler = (*Health)(nil)
	_ caddyfile.Unmarshaler       = (*Health)(nil)
)
