// Package web is the client's side of calls that come through Caddy's HTTP server, whatever the version of HTTP: a request and its
// http.ResponseWriter are a [proxy.Downstream].
package web

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
)

// Handler serves gRPC requests.
type Handler struct {
	// Proxy carries the calls.
	Proxy *proxy.Proxy
	// Trusted are proxies in front whose X-Forwarded-* fields are believed, besides those that the server trusts.
	Trusted []netip.Prefix
	Logger  *zap.Logger
}

// IsGRPC tells gRPC requests from others. gRPC over HTTP/2: requests are POST, and "Content-Type: application/grpc [("+proto" /
// "+json" / {custom})]".
func IsGRPC(r *http.Request) bool {
	ct := r.Header["Content-Type"]
	return len(ct) == 1 && grpcwire.ContentKind(ct[0]) == grpcwire.GRPC && r.Method == http.MethodPost
}

// Serve carries one gRPC request. It returns when the call is over, and panics with http.ErrAbortHandler where the answer cannot be
// ended properly: that makes the server reset the stream, whatever the version of HTTP.
func (h *Handler) Serve(w http.ResponseWriter, r *http.Request) {
	x := &exchange{h: h, w: w, r: r, body: r.Body, notify: make(chan struct{}, 1)}
	x.describe() //nolint:contextcheck // the request has it, here and below
	defer x.logFields()
	defer x.liftIdleTimeouts()() //nolint:contextcheck // ditto
	x.run()                      //nolint:contextcheck // ditto
	if x.aborted {
		panic(http.ErrAbortHandler)
	}
}

// describe fills in what is known of the call. It reads the request and changes nothing.
func (x *exchange) describe() {
	r, c := x.r, &x.Call
	if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		c.Placeholders = repl
		repl.Map(x.placeholder)
	}
	c.Start = time.Now()
	c.Path = r.URL.Path
	c.URI = r.URL.RequestURI()
	c.Authority = r.Host
	c.Metadata = headerMetadata(r.Header)
	c.TLS = r.TLS
	c.Peer, _ = netip.ParseAddrPort(r.RemoteAddr)
	c.ClientIP = c.Peer.Addr()
	if ip, ok := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string); ok {
		if addr, err := netip.ParseAddr(ip); err == nil {
			c.ClientIP = addr
		}
	}
	if d, ok := r.Context().Deadline(); ok { // a handler in front may have bounded the request
		c.Deadline = d
	}
	x.Request.Path, x.Request.Fields = proxy.LegalPath(r.URL.RequestURI()), x.h.fields(r, c.Peer)
	if _, _, ok := grpcwire.SplitMethod(c.Path); !ok {
		x.Request.PathHint = pathHint(r)
	}
	if err := r.Context().Err(); errors.Is(err, context.Canceled) { // a client that is gone already costs no upstream anything
		x.Request.Refusal = x.gone(err)
	}
	if r.ContentLength == 0 && strings.Trim(r.Header.Get("Content-Length"), "0") != "" {
		x.Request.Refusal = proxy.RequestLength(bodyShorter) // the server has not looked at it
	}
}

// fields are the request's that travel on, with what the next hop is told about the client.
func (h *Handler) fields(r *http.Request, peer netip.AddrPort) []h2.Field {
	header := r.Header
	options := connectionOptions(header)
	fields := make([]h2.Field, 0, len(header)+6)
	fwd := h.forwarded(r, peer)
	for name, values := range header {
		switch {
		case name == "Content-Type" || name == "Grpc-Timeout": // also where a client of HTTP/1 lists them in Connection
		case isForwardedName(name):
			for _, v := range values {
				fwd.Take(lowerOf[name], fieldText(v))
			}
			continue
		case slices.Contains(options, name):
			continue
		}
		fields = appendField(fields, name, values)
	}
	fields = fwd.AppendTo(fields)
	sortFields(fields)
	return fields
}

// maxQuoted is how much of a path goes into a message.
const maxQuoted = 200

// pathHint says what the path was before a handler in front has rewritten it: logs show what the client sent.
func pathHint(r *http.Request) string {
	orig, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	if !ok || orig.URL == nil || orig.URL.Path == r.URL.Path {
		return ""
	}
	return fmt.Sprintf(", to which a handler in front (try_files, rewrite, handle_path, uri) has changed %.*q; give gRPC a route of its own",
		maxQuoted, orig.URL.Path)
}

// noLimit stands for "never" where zero would mean "at once".
const noLimit = 100 * 365 * 24 * time.Hour

// liftIdleTimeouts takes Caddy's limits for silent request bodies and stalled answers off this call: they are meant
// for web pages, and a stream may be silent, or its reader slow, for as long as it likes. The returned function puts
// them back.
func (x *exchange) liftIdleTimeouts() (restore func()) {
	rd, wr := caddyhttp.IdleTimeoutsFromContext(x.r.Context())
	if rd != nil {
		undo := rd.Override(noLimit, 0)
		restore = undo
		if x.body == rd && rd.Deadline.HardDeadline.IsZero() {
			x.body = rd.ReadCloser // sparing two timer changes per read
		}
	}
	if wr != nil {
		undo, before := wr.Override(noLimit, 0, 0), restore
		restore = func() {
			undo()
			if before != nil {
				before()
			}
		}
		x.deadlines = wr.Ctrl
		if x.w == wr && wr.Deadline.HardDeadline.IsZero() {
			x.w = wr.ResponseWriterWrapper.ResponseWriter
		}
	}
	if restore == nil {
		restore = func() {}
	}
	if x.deadlines == nil {
		x.deadlines = http.NewResponseController(x.w)
	}
	x.flusher = http.NewResponseController(x.w)
	return restore
}

// gone is why a client is not there any more: it went away, or the server's limit for a whole answer has ended the request, which
// looks the same.
func (x *exchange) gone(err error) *proxy.Failure {
	why := proxy.ClientGone()
	if limit, over := x.writeTimeoutOver(); over {
		why = writeTimeout(limit)
	}
	why.Err = err
	return why
}

// writeTimeout: the server's limit for a whole answer has passed. Its code is what a client makes of the reset (gRPC's
// PROTOCOL-HTTP2.md: INTERNAL_ERROR is INTERNAL).
func writeTimeout(limit time.Duration) *proxy.Failure {
	return proxy.Fail(grpcwire.Internal, proxy.ReasonWriteTimeout, fmt.Sprintf("the server's write timeout (%v) ended the call", limit))
}

// writeTimeoutSlack is how much earlier the server may have begun to count than is known here: it does so when it reads the
// request's head. A client that goes away in that time is taken for the server's limit.
const writeTimeoutSlack = 250 * time.Millisecond

// writeTimeoutOver tells whether the server's limit for a whole answer (`write`) has passed. In HTTP/2 the server then
// resets the stream, in others its writes fail; either looks like a client that is gone.
func (x *exchange) writeTimeoutOver() (limit time.Duration, over bool) {
	ctx := x.r.Context()
	srv, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok || srv == nil || srv.WriteTimeout <= 0 {
		return 0, false
	}
	limit = time.Duration(srv.WriteTimeout)
	start, ok := caddyhttp.GetVar(ctx, "start_time").(time.Time)
	if !ok {
		start = x.Call.Start
	}
	return limit, time.Since(start) >= limit-min(writeTimeoutSlack, limit/4)
}

const (
	bodyShorter = "request body shorter than its content-length"
	bodyLonger  = "request body longer than its content-length"
)

// unreadable maps an error in reading the client's request.
func (x *exchange) unreadable(err error) *proxy.Failure {
	var (
		tooLarge *http.MaxBytesError
		why      *proxy.Failure
	)
	switch {
	case errors.As(err, &tooLarge):
		why = proxy.Fail(grpcwire.ResourceExhausted, proxy.ReasonRequestTooLarge,
			fmt.Sprintf("the request is larger than the %d bytes the proxy allows", tooLarge.Limit))
	case isTimeout(err):
		why = proxy.Fail(grpcwire.Unavailable, proxy.ReasonRequestUnreadable, "the server's read timeout ended the request")
	default:
		if text := wrongLength(x.r, err); text != "" {
			why = proxy.RequestLength(text)
		} else {
			why = x.gone(err)
		}
	}
	why.Err = err
	return why
}

// wrongLength tells such a request by what reading its body says. Go's HTTP/2 and HTTP/3 servers have no types for it.
func wrongLength(r *http.Request, err error) string {
	text := err.Error()
	switch {
	case r.ContentLength < 0:
		return ""
	case errors.Is(err, io.ErrUnexpectedEOF), strings.HasPrefix(text, "request declared a Content-Length of"):
		return bodyShorter
	case strings.HasPrefix(text, "sender tried to send more than declared Content-Length"), strings.Contains(text, "peer sent too much data"):
		return bodyLonger
	}
	return ""
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

var _ call.Metadata = headerMetadata(nil)
