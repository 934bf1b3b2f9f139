package grpcproxy

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
)

// ServeHTTP proxies one RPC, or passes a request that is not gRPC to the next handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if !isGRPC(r) {
		return passOn(w, r, next)
	}
	x := newExchange(h, w, r)
	defer x.finish()

	if f := x.classify(); f != nil {
		x.answer(f)
		return nil
	}
	defer x.liftIdleTimeouts()()
	x.startTimers()
	h.drain.enter(x)

	x.run()
	if x.aborted {
		// The answer cannot be ended properly. This makes the server reset the stream, whatever the version of HTTP.
		// finish runs on the way.
		panic(http.ErrAbortHandler)
	}
	return nil
}

// isGRPC: gRPC over HTTP/2: requests are POST, and "Content-Type: application/grpc [("+proto" / "+json" / {custom})]".
func isGRPC(r *http.Request) bool {
	ct := r.Header["Content-Type"]
	return len(ct) == 1 && grpcwire.ContentKind(ct[0]) == grpcwire.GRPC && r.Method == http.MethodPost
}

// newExchange describes the call. It reads the request and changes nothing.
func newExchange(h *Handler, w http.ResponseWriter, r *http.Request) *exchange {
	x := &exchange{h: h, cur: h.cluster.View(), w: w, r: r, body: r.Body}
	c := &x.call
	if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		x.repl, c.Placeholders = repl, repl
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
	x.placeholders()
	return x
}

// classify splits the path and settles the deadline. It refuses what no upstream could make sense of.
func (x *exchange) classify() *failure {
	c := &x.call
	var ok bool
	if c.Service, c.Method, ok = grpcwire.SplitMethod(c.Path); !ok {
		// grpc-go's server: "malformed method name" is UNIMPLEMENTED.
		return proxyFailure(grpcwire.Unimplemented, reasonBadPath, x.badPath())
	}
	if x.r.ContentLength == 0 && strings.Trim(x.r.Header.Get("Content-Length"), "0") != "" {
		return requestLength(bodyShorter) // the server has not looked at it
	}
	if v := x.r.Header["Grpc-Timeout"]; len(v) > 0 {
		d, err := grpcwire.ParseTimeout(v[0])
		if err != nil {
			// grpc-go's server answers a malformed grpc-timeout with INTERNAL.
			return proxyFailure(grpcwire.Internal, reasonBadTimeout, err.Error())
		}
		c.Deadline = c.Start.Add(d)
	}
	// A handler in front may have bounded the request.
	if d, ok := x.r.Context().Deadline(); ok && (c.Deadline.IsZero() || d.Before(c.Deadline)) {
		c.Deadline = d
	}
	// gRFC A31: the effective deadline is the earlier of the client's and the route's.
	if m := time.Duration(x.h.MaxTimeout); m > 0 {
		if cap := c.Start.Add(m); c.Deadline.IsZero() || cap.Before(c.Deadline) {
			c.Deadline = cap
		}
	}
	return nil
}

// maxQuoted is how much of a path goes into a message.
const maxQuoted = 200

// badPath names the path as it is here: a handler in front may have rewritten it, while logs show what the client sent.
func (x *exchange) badPath() string {
	text := fmt.Sprintf("the path is not /Service/Method: %.*q", maxQuoted, x.call.Path)
	orig, ok := x.r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	if ok && orig.URL != nil && orig.URL.Path != x.call.Path {
		text += fmt.Sprintf(", to which a handler in front (try_files, rewrite, handle_path, uri) has changed %.*q; give gRPC a route of its own",
			maxQuoted, orig.URL.Path)
	}
	return text
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
		start = x.call.Start
	}
	return limit, time.Since(start) >= limit-min(writeTimeoutSlack, limit/4)
}

var _ call.Metadata = headerMetadata(nil)
