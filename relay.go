package grpcproxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/direct"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/listen"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/route"
)

func init() { caddy.RegisterModule(new(Relay)) }

// Relay reads the HTTP/2 connections of a server's clients itself, in place of Go's HTTP server. Calls whose route leads straight to a
// `grpc_proxy` go there, past the server. Every other stream is carried on to the server, over a connection in the same process, and every
// other connection (HTTP/1.1, say) is the server's as it comes. What handlers and clients see is the same.
//
// Connections of clients outlast a reload of the configuration: their next stream is served by the new one.
type Relay struct {
	// How old a client's connection gets, ± 10 %. Then the client is told to make another one (GOAWAY), and what runs on this one goes on. So
	// long-lived clients spread over proxies that have come later. Default: off.
	MaxConnectionAge caddy.Duration `json:"max_connection_age,omitempty"`

	// How long streams may go on on a connection that has reached `max_connection_age`; then they end with it. Default: as long as they like.
	MaxConnectionAgeGrace caddy.Duration `json:"max_connection_age_grace,omitempty"`

	// How long a client's connection may have no stream before the client is told to go. Default: the server's `idle_timeout`.
	MaxConnectionIdle caddy.Duration `json:"max_connection_idle,omitempty"`

	// Asks a client for a sign of life (PING) when nothing has come from it for so long, whether it has streams or not. Default: off.
	KeepaliveInterval caddy.Duration `json:"keepalive_interval,omitempty"`

	// How long the client may take to give one; then its connection ends, with its streams. Default: `20s`.
	KeepaliveTimeout caddy.Duration `json:"keepalive_timeout,omitempty"`

	ctx    caddy.Context
	server *caddyhttp.Server
	logger *zap.Logger
	terms  string
	start  sync.Once
	table  *route.Table

	mu        sync.Mutex // LOCKS: guards listeners
	listeners []*listen.Listener
}

// CaddyModule returns the Caddy module information.
func (*Relay) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.listeners.grpc_relay", New: func() caddy.Module { return new(Relay) }}
}

// UnmarshalCaddyfile reads the wrapper from the Caddyfile:
//
//	grpc_relay {
//		max_connection_age       <duration>
//		max_connection_age_grace <duration>
//		max_connection_idle      <duration>
//		keepalive_interval       <duration>
//		keepalive_timeout        <duration>
//	}
func (r *Relay) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	durations := make(map[string]*caddy.Duration)
	for _, o := range r.durations() {
		durations[o.name] = o.value
	}
	for d.NextBlock(0) {
		name := d.Val()
		value, ok := durations[name]
		if !ok {
			return d.Errf("grpc_relay has no option %q; it has %s", name, strings.Join(slices.Sorted(maps.Keys(durations)), ", "))
		}
		if !d.NextArg() {
			return d.ArgErr()
		}
		v, err := caddy.ParseDuration(d.Val())
		if err != nil {
			return d.Errf("%s is %q, which is not a duration: write 30m, for example", name, d.Val())
		}
		if *value = caddy.Duration(v); d.NextArg() {
			return d.ArgErr()
		}
		if err := r.Validate(); err != nil {
			return d.WrapErr(err)
		}
	}
	return nil
}

// duration is one of the options.
type duration struct {
	name  string
	value *caddy.Duration
}

func (r *Relay) durations() []duration {
	return []duration{
		{"max_connection_age", &r.MaxConnectionAge},
		{"max_connection_age_grace", &r.MaxConnectionAgeGrace},
		{"max_connection_idle", &r.MaxConnectionIdle},
		{"keepalive_interval", &r.KeepaliveInterval},
		{"keepalive_timeout", &r.KeepaliveTimeout},
	}
}

// Validate implements [caddy.Validator].
func (r *Relay) Validate() error {
	for _, o := range r.durations() {
		if d := time.Duration(*o.value); d < 0 || d > 0 && d < time.Second {
			return fmt.Errorf("%s is %v; it must be at least a second (leave it out for the default)", o.name, d)
		}
	}
	return nil
}

// Provision implements [caddy.Provisioner].
func (r *Relay) Provision(ctx caddy.Context) error {
	srv, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok {
		return errors.New("grpc_relay wraps the listeners of HTTP servers only: write it in listener_wrappers of a server")
	}
	if err := r.checkOrder(srv.ListenerWrappersRaw); err != nil {
		return err
	}
	r.ctx, r.server, r.logger = ctx, srv, ctx.Logger()
	relayed.Store(srv, true)
	var err error
	if r.terms, err = termsOf(srv); err != nil { // now, since what is provisioned loses its configuration
		return err
	}
	srv.RegisterOnStop(func(ctx context.Context) error {
		r.each((*listen.Listener).Leave) // their configuration is taken apart next, whether Caddy has closed them yet or not
		if caddy.Exiting() {
			r.each(func(l *listen.Listener) { l.Drain(ctx, partingTime, r.busy) })
		}
		return nil
	})
	return nil
}

// relayed are the servers whose clients a Relay reads. A server has its wrappers before its handlers.
var relayed sync.Map

// Cleanup implements [caddy.CleanerUpper].
func (r *Relay) Cleanup() error {
	relayed.Delete(r.server)
	return nil
}

// partingTime is how long clients have, when Caddy exits and their last streams have ended, to take leave.
const partingTime = time.Second

// busy tells whether calls run that grpc_proxy ends itself when their time is over.
func (r *Relay) busy() bool {
	if outlasting.Load() > 0 {
		return true
	}
	app, err := r.ctx.AppIfConfigured(appName)
	if err != nil {
		return false
	}
	running.mu.Lock()
	proxies := app.(*App).proxies
	running.mu.Unlock()
	return slices.ContainsFunc(proxies, func(h *Handler) bool { return h.proxy.Running() > 0 })
}

// checkOrder refuses the wrapper in front of TLS, where it could read nothing.
func (*Relay) checkOrder(wrappers []json.RawMessage) error {
	seen := false
	for _, raw := range wrappers {
		var w struct {
			Wrapper string `json:"wrapper"`
		}
		if err := json.Unmarshal(raw, &w); err != nil {
			return err
		}
		switch w.Wrapper {
		case "grpc_relay":
			if seen {
				return errors.New("grpc_relay stands twice in listener_wrappers: write it once")
			}
			seen = true
		case "tls":
			if seen {
				return errors.New("grpc_relay stands before tls in listener_wrappers, where connections are still encrypted: write it behind tls")
			}
		}
	}
	return nil
}

func (r *Relay) each(do func(*listen.Listener)) {
	r.mu.Lock()
	listeners := slices.Clone(r.listeners)
	r.mu.Unlock()
	for _, l := range listeners {
		do(l)
	}
}

// WrapListener implements [caddy.ListenerWrapper].
func (r *Relay) WrapListener(inner net.Listener) net.Listener {
	app := r.app()
	r.start.Do(func() { r.table = route.New(r.server, app == nil || app.Metrics != nil) }) // only now are the routes provisioned
	protocols := r.protocols(inner.Addr())
	l := listen.Wrap(inner, listen.Config{
		Plaintext: slices.Contains(protocols, "h2") || slices.Contains(protocols, "h2c"),
		Route:     r.route,
		Limits:    r.limits,
		Terms:     fmt.Sprint(r.terms, protocols, httpPort(app)),
		Logger:    r.logger,
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listeners = append(r.listeners, l)
	return l
}

// app is the HTTP app, nil if it cannot be had.
func (r *Relay) app() *caddyhttp.App {
	app, err := r.ctx.App("http")
	if err != nil {
		return nil
	}
	a, _ := app.(*caddyhttp.App)
	return a
}

// httpPort is the port that is without TLS whatever the policies are.
func httpPort(app *caddyhttp.App) int {
	if app == nil {
		return 0
	}
	return app.HTTPPort
}

// protocols are those of an address.
func (r *Relay) protocols(addr net.Addr) []string {
	srv := r.server
	for i, own := range srv.ListenProtocols {
		if own == nil || i >= len(srv.Listen) {
			continue
		}
		if na, err := caddy.ParseNetworkAddress(srv.Listen[i]); err == nil && listensOn(na, addr) {
			return own
		}
	}
	return srv.Protocols
}

// listensOn tells whether an address of the configuration includes that of a listener.
func listensOn(na caddy.NetworkAddress, addr net.Addr) bool {
	if na.IsUnixNetwork() {
		return addr.String() == na.Host
	}
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return false
	}
	port := uint(tcp.Port)
	return port >= na.StartPort && port <= na.EndPort && (na.Host == "" || net.ParseIP(na.Host) == nil || net.ParseIP(na.Host).Equal(tcp.IP))
}

// limits are those of Caddy's server, which does not see the connections.
func (r *Relay) limits() listen.Limits {
	srv := r.server
	preface := time.Duration(srv.ReadHeaderTimeout)
	if preface <= 0 {
		preface = time.Duration(srv.ReadTimeout)
	}
	handshake := time.Duration(0) // as net/http has it: the shortest of all
	for _, d := range []caddy.Duration{srv.ReadHeaderTimeout, srv.ReadTimeout, srv.WriteTimeout} {
		if d := time.Duration(d); d > 0 && (handshake == 0 || d < handshake) {
			handshake = d
		}
	}
	most := srv.MaxHeaderBytes
	if most <= 0 {
		most = 1 << 20
	}
	idle := max(0, time.Duration(srv.IdleTimeout))
	if d := time.Duration(r.MaxConnectionIdle); d > 0 {
		idle = d
	}
	return listen.Limits{
		Handshake: handshake,
		Preface:   preface,
		Age:       time.Duration(r.MaxConnectionAge),
		AgeGrace:  time.Duration(r.MaxConnectionAgeGrace),
		Connection: h2.Config{
			MaxHeaderListSize: uint32(most) + 320, // Go's server allows ten fields' overhead on top
			IdleTimeout:       idle,
			PingInterval:      time.Duration(r.KeepaliveInterval), PingWithoutStreams: true,
			PingTimeout:   time.Duration(r.KeepaliveTimeout),
			OnOversized:   direct.Oversized,
			InitialWindow: 256 << 10, InitialConnWindow: clientConnWindow, MaxConnWindow: clientConnWindow,
		},
	}
}

var (
	_ caddy.Provisioner     = (*Relay)(nil)
	_ caddy.CleanerUpper    = (*Relay)(nil)
	_ caddy.Validator       = (*Relay)(nil)
	_ caddy.ListenerWrapper = (*Relay)(nil)
	_ caddyfile.Unmarshaler = (*Relay)(nil)
)
