package grpcproxy

import (
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// finish computes the call's result, exactly once, and tells everyone who wants to know.
func (x *exchange) finish() {
	x.stopTimers()
	x.leaveDrain()
	if x.att != nil {
		x.att.end.State.End()
	}
	r := &x.call.Result
	r.Latency = time.Since(x.call.Start)
	r.FirstByte = x.firstByte
	r.SentBytes, r.SentMessages = x.send.counts()
	r.ReceivedMessages = x.framing.Messages()
	if f := x.result; f != nil {
		r.Code, r.Message, r.Reason = f.code, f.message, f.reason
		r.EndedBy, r.Source = f.endedBy, f.source
		x.logFailure(f)
	}
	if x.att != nil {
		x.att.over()
		x.att.tellTime(r.EndedBy == call.EndedByUpstream)
	}
	if x.gaveUp() {
		x.h.cancels.note(x.call.ClientIP, x.call.Start.Add(r.Latency))
	}
	x.logFields()
}

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
	case x.committed:
		tidy(x.w, x.r, x.call.Result.ReceivedBytes > 0)
	}
	c, r := &x.call, &x.call.Result
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

func (h *Handler) logLevel() zapcore.Level {
	if h.VerboseLogs {
		return zap.InfoLevel
	}
	return zap.DebugLevel
}

// logFailure logs a status that the upstream did not send itself.
func (x *exchange) logFailure(f *failure) {
	c := x.h.logger.Check(x.h.logLevel(), "call failed")
	if c == nil {
		return
	}
	c.Write(
		zap.String("path", x.call.Path), zap.String("status", f.code.String()), zap.String("message", f.message),
		zap.String("reason", f.reason), zap.String("ended_by", f.endedBy.String()), zap.String("upstream", x.call.Result.Upstream),
		zap.Int("attempts", x.call.Result.Attempts), zap.Duration("duration", x.call.Result.Latency), zap.Error(f.err),
	)
}

// logAttempt logs an attempt after which another endpoint is tried.
func (x *exchange) logAttempt(err *transport.Error) {
	if c := x.h.logger.Check(x.h.logLevel(), "attempt failed, trying elsewhere"); c != nil {
		c.Write(zap.String("path", x.call.Path), zap.String("upstream", err.Endpoint), zap.Int("attempt", x.call.Result.Attempts), zap.Error(err))
	}
}

// placeholders makes the call's facts available to header operations, log formats and later handlers.
func (x *exchange) placeholders() {
	if x.repl != nil {
		x.repl.Map(x.placeholder)
	}
}

const (
	placeholderPrefix = "http.grpc_proxy."
	// What reverse_proxy calls the upstream: a block written for it keeps working.
	reverseProxyPrefix = "http.reverse_proxy.upstream."
)

// namedVar is set once a request's call has a name.
const namedVar = "grpc_proxy.named"

// nameCall makes known what is called to whatever comes before grpc_proxy. Whoever sees first that the request is gRPC
// does it. The names are those of the path as it then is: a handler in between may change it.
func nameCall(r *http.Request) {
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
	c, r := &x.call, &x.call.Result
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

func (x *exchange) upstreamPlaceholder(name string) (any, bool) {
	addr := x.call.Result.Upstream
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
