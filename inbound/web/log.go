package web

import (
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
)

// logFields adds the result to the access log, if the server writes one.
func (x *exchange) logFields() {
	ctx := x.r.Context()
	srv, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok || srv.Logs == nil {
		return
	}
	extra, ok := ctx.Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields)
	if !ok {
		return
	}
	switch {
	case x.aborted:
		dropEmpty(x.w.Header()) // the stream is reset, whatever the head
	case x.headSent:
		Tidy(x.w, x.r, x.Call.Result.ReceivedBytes > 0)
	}
	c, r := &x.Call, &x.Call.Result
	extra.Add(zap.String("grpc_service", c.Service))
	extra.Add(zap.String("grpc_method", c.Method))
	extra.Add(zap.String("grpc_status", r.Code.String()))
	extra.Add(zap.String("grpc_ended_by", r.EndedBy.String()))
	extra.Add(zap.String("grpc_status_source", r.Source.String()))
	if r.Message != "" {
		extra.Add(zap.String("grpc_message", r.Message))
	}
	if r.Reason != "" {
		extra.Add(zap.String("grpc_reason", r.Reason))
	}
	extra.Add(zap.String("upstream", r.Upstream))
	extra.Add(zap.Int("grpc_attempts", r.Attempts))
	extra.Add(zap.Int64("grpc_messages_sent", r.SentMessages))
	extra.Add(zap.Int64("grpc_messages_received", r.ReceivedMessages))
	extra.Add(zap.Int64("grpc_bytes_sent", r.SentBytes))
	extra.Add(zap.Int64("grpc_bytes_received", r.ReceivedBytes))
	extra.Add(zap.Duration("grpc_latency", r.Latency))
	if r.FirstByte > 0 {
		extra.Add(zap.Duration("grpc_first_byte", r.FirstByte))
	}
}

const (
	placeholderPrefix = "http.grpc_proxy."
	// What reverse_proxy calls the upstream: a block written for it keeps working.
	reverseProxyPrefix = "http.reverse_proxy.upstream."
)

// namedVar is set once a request's call has a name.
const namedVar = "grpc_proxy.named"

// NameCall makes known what is called to whatever comes before grpc_proxy. Whoever sees first that the request is gRPC
// does it. The names are those of the path as it then is: a handler in between may change it.
func NameCall(r *http.Request) {
	ctx := r.Context()
	repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return
	}
	if vars, ok := ctx.Value(caddyhttp.VarsCtxKey).(map[string]any); ok {
		if vars[namedVar] != nil {
			return
		}
		vars[namedVar] = true
	}
	repl.Map(func(key string) (any, bool) {
		if key != placeholderPrefix+"service" && key != placeholderPrefix+"method" {
			return nil, false
		}
		service, method, _ := grpcwire.SplitMethod(r.URL.Path)
		if key == placeholderPrefix+"service" {
			return service, true
		}
		return method, true
	})
}

// placeholder makes the call's facts available to header operations, log formats and later handlers.
func (x *exchange) placeholder(key string) (any, bool) {
	if name, ok := strings.CutPrefix(key, reverseProxyPrefix); ok {
		return x.upstreamPlaceholder(name)
	}
	name, ok := strings.CutPrefix(key, placeholderPrefix)
	if !ok {
		return nil, false
	}
	if up, ok := strings.CutPrefix(name, "upstream."); ok {
		return x.upstreamPlaceholder(up)
	}
	c, r := &x.Call, x.resultNow()
	switch name {
	case "service":
		return c.Service, true
	case "method":
		return c.Method, true
	case "status":
		return r.Code.String(), true
	case "status_code":
		return strconv.FormatUint(uint64(r.Code), 10), true
	case "status_source":
		return r.Source.String(), true
	case "ended_by":
		return r.EndedBy.String(), true
	case "reason":
		return r.Reason, true
	case "attempts":
		return r.Attempts, true
	case "latency":
		return r.Latency, true
	}
	return nil, false
}

// resultNow is the result as far as it is known: while there is no answer it is the flight's that asks, for the sake of a rule; afterwards
// the flight may be changing it.
func (x *exchange) resultNow() call.Result {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.noted {
		return x.result
	}
	return x.Flight.Call.Result
}

func (x *exchange) upstreamPlaceholder(name string) (any, bool) {
	addr := x.resultNow().Upstream
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		host = addr // a unix socket
	}
	switch name {
	case "address", "hostport":
		return addr, true
	case "host":
		return host, true
	case "port":
		return port, true
	}
	return nil, false
}
