package healthcheck

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/rpc"
)

func init() { caddy.RegisterModule(new(GRPC)) }

// The values of GRPC.Mode and GRPC.Unimplemented.
const (
	ModeAuto  = "auto"
	ModeWatch = "watch"
	ModeCheck = "check"

	UnimplementedHealthy   = "healthy"
	UnimplementedUnhealthy = "unhealthy"
)

// DefaultUserAgent is what health checks call themselves.
const DefaultUserAgent = "caddy-grpc-proxy-health"

// GRPC asks an upstream by gRPC's own health service, `grpc.health.v1.Health`, on the connections that its RPCs use.
// SERVING is good; NOT_SERVING, UNKNOWN, an unknown service, any other status, and no answer in time are not.
type GRPC struct {
	// How to ask. `check` calls `Check` at each interval. `watch` calls `Watch` and lets the upstream tell of changes,
	// which take effect at once; a server that hangs is noticed by PINGs of the connection only (`keepalive`). `auto`
	// does both, and `Check` alone where the server has no `Watch`. Default: `auto`.
	Mode string `json:"mode,omitempty"`

	// The services to ask about besides the server as a whole, as the server names them. One that is not serving, or that
	// the server does not know, loses its own RPCs only. Default: none.
	Services []string `json:"services,omitempty"`

	// Refused: name the services instead.
	PerRPC json.RawMessage `json:"per_rpc,omitempty"`

	// What an upstream without the health service is: `healthy` (gRFC A17; the check still proves that it answers) or
	// `unhealthy`. Default: `healthy`.
	Unimplemented string `json:"unimplemented,omitempty"`

	// The `:authority` to ask with. Default: the upstream's host and port.
	Authority string `json:"authority,omitempty"`

	// Metadata to ask with. Global placeholders such as `{env.TOKEN}` are resolved when the configuration is loaded.
	Headers http.Header `json:"headers,omitempty"`

	metadata []h2.Field
}

// CaddyModule returns the Caddy module information.
func (*GRPC) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "grpc", New: func() caddy.Module { return new(GRPC) }}
}

// Provision prepares the metadata.
func (g *GRPC) Provision(caddy.Context) error {
	if g.Mode == "" {
		g.Mode = ModeAuto
	}
	if g.Unimplemented == "" {
		g.Unimplemented = UnimplementedHealthy
	}
	if g.Authority != "" {
		g.Authority = caddy.NewReplacer().ReplaceKnown(g.Authority, "")
	}
	var err error
	g.metadata, err = fieldsOf(g.Headers)
	return err
}

// Validate refuses what is not known.
func (g *GRPC) Validate() error {
	if !slices.Contains([]string{ModeAuto, ModeWatch, ModeCheck}, g.Mode) {
		return fmt.Errorf("health check grpc: mode %q is none of auto, watch, check", g.Mode)
	}
	if g.Unimplemented != UnimplementedHealthy && g.Unimplemented != UnimplementedUnhealthy {
		return fmt.Errorf("health check grpc: unimplemented %q is none of healthy, unhealthy", g.Unimplemented)
	}
	if g.PerRPC != nil {
		return fmt.Errorf(`health check grpc: per_rpc is %s; there is no per_rpc any more: list the services, "services": ["my.pkg.Service"]`, g.PerRPC)
	}
	for i, s := range g.Services {
		if s == "" || strings.ContainsAny(s, "/ \t") {
			return fmt.Errorf("health check grpc: service %q is no name of a service; write it as pkg.Service", s)
		}
		if slices.Contains(g.Services[:i], s) {
			return fmt.Errorf("health check grpc: service %q is named twice", s)
		}
	}
	return nil
}

// fieldsOf makes the fields of configured metadata, sorted by name.
func fieldsOf(h http.Header) ([]h2.Field, error) {
	repl := caddy.NewReplacer()
	fields := make([]h2.Field, 0, len(h))
	for name, values := range h {
		name := strings.ToLower(name)
		if name == "" || strings.HasPrefix(name, ":") || strings.HasPrefix(name, "grpc-") || strings.Trim(name, "0123456789abcdefghijklmnopqrstuvwxyz_-.") != "" ||
			slices.Contains([]string{"te", "content-type", "content-length", "connection", "host", "transfer-encoding", "upgrade", "keep-alive", "proxy-connection"}, name) {
			return nil, fmt.Errorf("health check: header %q is not metadata that can be set", name)
		}
		for _, v := range values {
			v = strings.TrimSpace(repl.ReplaceKnown(v, ""))
			if strings.ContainsAny(v, "\r\n\x00") {
				return nil, fmt.Errorf("health check: the value of header %q has a line break in it", name)
			}
			fields = append(fields, h2.Field{Name: name, Value: v, Sensitive: name == "authorization"})
		}
	}
	slices.SortStableFunc(fields, func(a, b h2.Field) int { return strings.Compare(a.Name, b.Name) })
	return fields, nil
}

// UnmarshalCaddyfile reads the check from the Caddyfile:
//
//	health_check grpc
//
// Its options are words of grpc_proxy's own block.
func (*GRPC) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return parseAlone(d) }

// Probe implements [Prober].
func (g *GRPC) Probe(ctx context.Context, t *Target) Verdict {
	for {
		v, crowded := g.ask(ctx, t)
		if !crowded || ctx.Err() != nil {
			return v
		}
	}
}

// ask is Probe, unless the call is given up for the sake of others on its connection: then crowded is true.
func (g *GRPC) ask(ctx context.Context, t *Target) (_ Verdict, crowded bool) {
	timeout := t.Timeout
	if d, ok := ctx.Deadline(); ok {
		timeout = time.Until(d)
	}
	var (
		conn  *h2.Conn
		began time.Time
		needs <-chan struct{}
	)
	defer func() {
		if conn != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) && conn.Silence() > time.Since(began) {
			t.suspect(conn)
		}
	}()
	c, err := g.call(ctx, t, "/grpc.health.v1.Health/Check", timeout, func(on *h2.Conn, crowded <-chan struct{}) {
		conn, began, needs = on, time.Now(), crowded
	})
	if err != nil {
		return noAnswer(ctx, t, err), false
	}
	defer c.Close()
	wait, cancel := rpc.WhileRoom(ctx, needs)
	defer cancel()
	v, err := g.answer(wait, t, c)
	if err != nil {
		return noAnswer(ctx, t, err), errors.Is(err, rpc.ErrLeaving)
	}
	return v, false
}

// answer waits for the answer.
func (g *GRPC) answer(ctx context.Context, t *Target, c *rpc.Call) (Verdict, error) {
	msg, err := c.Next(ctx)
	if err != nil && !errors.Is(err, io.EOF) {
		return Verdict{}, err
	}
	answered := err == nil
	status, err := end(ctx, c)
	switch {
	case err != nil:
		return Verdict{}, err
	case status.Code == grpcwire.OK && answered:
		return g.verdict(t, msg), nil
	case status.Code == grpcwire.OK:
		return Verdict{NoAnswer, "the server's answer to the health check has no message"}, nil
	case status.Code == grpcwire.Unimplemented:
		return g.unimplemented(t, status), nil
	case status.Code == grpcwire.NotFound:
		return g.unknown(t, fmt.Sprintf("the server does not know the service %q", t.Service)), nil
	}
	return Verdict{NoAnswer, "the health check was answered with " + status.String()}, nil
}

// unimplemented is the verdict on a server without the health service, which gRFC A17 wants to be taken as healthy.
func (g *GRPC) unimplemented(t *Target, status rpc.Status) Verdict {
	if g.Unimplemented == UnimplementedUnhealthy {
		return Verdict{NotServing, "the server has no health service: " + status.String()}
	}
	t.noService(status.String())
	return Verdict{Answer: Serving}
}

// unknown is the verdict on a server that does not know what it was asked about. One that is to be asked about services
// need not know the empty name.
func (g *GRPC) unknown(t *Target, said string) Verdict {
	if t.Service == "" && len(g.Services) > 0 {
		return Verdict{Answer: Serving}
	}
	return Verdict{NotServing, said}
}

// noAnswer says what went wrong.
func noAnswer(ctx context.Context, t *Target, err error) Verdict {
	d, ok := ctx.Deadline()
	// The server, which was told the deadline, may be the first to notice.
	if errors.Is(ctx.Err(), context.DeadlineExceeded) || ok && time.Until(d) < t.Timeout/20 {
		return Verdict{NoAnswer, fmt.Sprintf("no answer to the health check within %v", t.Timeout)}
	}
	return Verdict{NoAnswer, err.Error()}
}

// AskAbout implements [ServiceProber].
func (g *GRPC) AskAbout() []string { return g.Services }

// WatchMode implements [Watcher].
func (g *GRPC) WatchMode() WatchMode {
	switch g.Mode {
	case ModeWatch:
		return WatchOnly
	case ModeCheck:
		return NoWatch
	}
	return WatchAndProbe
}

// Watch implements [Watcher].
func (g *GRPC) Watch(ctx context.Context, t *Target, report func(Verdict)) error {
	// The first message comes at once or the server hangs: "The server will immediately send back a message
	// indicating the current serving status" (grpc/health/v1/health.proto). The stream itself ends with its connection's
	// service only.
	timeout := fmt.Errorf("no answer to the health watch within %v", t.Timeout)
	begin, cancel := context.WithTimeoutCause(ctx, t.Timeout, timeout)
	defer cancel()
	var crowded <-chan struct{}
	c, err := g.call(begin, t, "/grpc.health.v1.Health/Watch", 0, func(_ *h2.Conn, needs <-chan struct{}) { crowded = needs })
	if err != nil {
		return lostBy(err)
	}
	defer c.Close()
	ctx, cancel = c.WhileServing(ctx, crowded)
	defer cancel()
	wait, cancel := context.WithTimeoutCause(ctx, t.Timeout, timeout)
	defer cancel()
	for {
		msg, err := c.Next(wait)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return lostBy(err)
		}
		report(g.verdict(t, msg))
		wait = ctx
	}
	status, err := c.Status()
	if err != nil {
		return lostBy(err)
	}
	if status.Code == grpcwire.Unimplemented {
		if g.Mode == ModeWatch {
			report(g.unimplemented(t, status))
		}
		return ErrCannotWatch
	}
	if status.Code == grpcwire.OK {
		return ErrInOrder
	}
	return errors.New("the server ended it with " + status.String())
}

var (
	_ caddy.Provisioner     = (*GRPC)(nil)
	_ caddy.Validator       = (*GRPC)(nil)
	_ caddyfile.Unmarshaler = (*GRPC)(nil)
	_ ServiceProber         = (*GRPC)(nil)
	_ Watcher               = (*GRPC)(nil)
)
