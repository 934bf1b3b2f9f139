package grpcproxy

import (
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// prepare takes out of the answer's header what the server put there on its own account: in gRPC every field is
// metadata that the application sees. What an earlier handler set on purpose stays.
func prepare(h http.Header, r *http.Request) {
	if v := h["Server"]; len(v) == 1 && v[0] == caddyhttp.ServerHeader {
		delete(h, "Server")
	}
	if v := h["Alt-Svc"]; len(v) > 0 {
		dropAltSvc(h, r)
	}
	// Present and nil means: do not add one.
	if h["Date"] == nil {
		h["Date"] = nil
	}
	h["Content-Length"] = nil
}

// dropAltSvc takes out what the server says of its HTTP/3.
func dropAltSvc(h http.Header, r *http.Request) {
	srv, ok := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok || srv == nil {
		return
	}
	if h["Alt-Svc"] = slices.DeleteFunc(h["Alt-Svc"], func(v string) bool { return isServersAltSvc(v, srv.Listen) }); len(h["Alt-Svc"]) == 0 {
		delete(h, "Alt-Svc")
	}
}

// isServersAltSvc tells the value that the HTTP/3 server makes, of the ports that it listens on, from one of a handler,
// which often names the port that clients see instead.
func isServersAltSvc(v string, listen []string) bool {
	for part := range strings.SplitSeq(v, ",") {
		port, ok := strings.CutPrefix(part, `h3="`)
		if !ok {
			return false
		}
		port, ok = strings.CutSuffix(port, `"; ma=2592000`)
		if !ok || !slices.ContainsFunc(listen, func(addr string) bool {
			i := strings.LastIndexByte(addr, ':')
			// Port 0 and a range stand for ports that are not known here.
			return i >= 0 && (addr[i:] == port || addr[i:] == ":0" || strings.Contains(addr[i:], "-"))
		}) {
			return false
		}
	}
	return true
}

// tidy takes out what prepare put into the header for the server alone: in the access log it would be empty lists. written
// tells that the answer had messages, so that the server has the head.
func tidy(w http.ResponseWriter, r *http.Request, written bool) {
	if !written && holdsBack(w) {
		return
	}
	if r.ProtoMajor == 3 {
		// quic-go looks at the header again when the handler has returned, unless the head has left by then.
		_ = http.NewResponseController(w).Flush()
	}
	dropEmpty(w.Header())
}

func dropEmpty(h http.Header) {
	for _, name := range [...]string{"Date", "Content-Length"} {
		if v, ok := h[name]; ok && v == nil {
			delete(h, name)
		}
	}
}

// holdsBack tells whether a handler in front may still have the head of an answer without messages, as encode has. It will
// give it to the server later.
func holdsBack(w http.ResponseWriter) bool {
	const caddys = "github.com/caddyserver/caddy/v2/modules/caddyhttp"
	for {
		outer, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return false // the server's own
		}
		t := reflect.TypeOf(w)
		if t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		if p := t.PkgPath(); p != caddys && p != caddys+"/headers" {
			return true
		}
		w = outer.Unwrap()
	}
}

// writeHead sends the response head. From here on the call is committed.
func (x *exchange) writeHead(fields []h2.Field) {
	header := x.w.Header()
	prepare(header, x.r)
	copyFields(header, "", fields)
	x.annotate(header)
	x.headerDown(header)
	x.send.commit()
	x.committed = true
	x.w.WriteHeader(http.StatusOK)
}

// writeTrailersOnly sends an answer that consists of one header block: gRPC's Trailers-Only. It stays one HEADERS frame
// with END_STREAM as long as nothing is written or flushed.
func (x *exchange) writeTrailersOnly(fields []h2.Field) {
	fields = x.att.takeReport(fields)
	header := x.w.Header()
	prepare(header, x.r)
	copyFields(header, "", fields)
	if grpcwire.ContentKind(header.Get("Content-Type")) != grpcwire.GRPC {
		header["Content-Type"] = answerType(x.r)
	}
	x.wireStatus(header, "", fields)
	x.annotate(header)
	x.headerDown(header)
	x.committed = true
	x.w.WriteHeader(http.StatusOK)
}

// writeTrailers sets the trailers; the server sends them when the handler returns. The prefix makes that work without
// announcing them.
func (x *exchange) writeTrailers(fields []h2.Field) {
	fields = x.att.takeReport(fields)
	hintAtTrailers(x.h.logger, fields)
	header := x.w.Header()
	copyFields(header, http.TrailerPrefix, fields)
	x.wireStatus(header, http.TrailerPrefix, fields)
}

// wireStatus reads the upstream's status and repairs one that clients could not read.
func (x *exchange) wireStatus(header http.Header, prefix string, fields []h2.Field) {
	r := &x.call.Result
	value, ok := fieldValue(fields, "grpc-status")
	code, valid := grpcwire.ParseStatus(value)
	switch values := header[prefix+"Grpc-Status"]; {
	case len(values) > 1:
		// Clients differ in which one they read.
		x.repair(header, prefix, reasonBadStatus, "several grpc-status from the upstream: "+strconv.Quote(strings.Join(values, ", ")))
	case !ok:
		x.repair(header, prefix, reasonNoStatus, "the upstream's trailers carry no grpc-status")
	case !valid:
		x.repair(header, prefix, reasonBadStatus, "malformed grpc-status from the upstream: "+strconv.Quote(value))
	default:
		r.Code, r.EndedBy, r.Source = code, call.EndedByUpstream, call.SourceWire
		if m, ok := fieldValue(fields, "grpc-message"); ok {
			r.Message = grpcwire.DecodeMessage(m)
		}
	}
}

// repair gives trailers without a readable status one: UNKNOWN, by gRPC's PROTOCOL-HTTP2.md.
func (x *exchange) repair(header http.Header, prefix, reason, message string) {
	x.result = &failure{
		code: grpcwire.Unknown, reason: reason, message: message,
		endedBy: call.EndedByUpstream, source: call.SourceProxy, endpoint: x.call.Result.Upstream,
	}
	setStatusFields(header, prefix, x.result, x.call.Result.Attempts, x.h.ExposeUpstream)
}

// answer sends a failure as Trailers-Only.
func (x *exchange) answer(f *failure) {
	x.result = f
	header := x.w.Header()
	prepare(header, x.r)
	header["Content-Type"] = answerType(x.r)
	x.setStatus("", f)
	x.committed = true
	x.w.WriteHeader(http.StatusOK) // gRPC over HTTP/2: the HTTP status of a gRPC answer is 200
}

func (x *exchange) setStatus(prefix string, f *failure) {
	setStatusFields(x.w.Header(), prefix, f, x.call.Result.Attempts, x.h.ExposeUpstream)
}

func setStatusFields(header http.Header, prefix string, f *failure, attempts int, expose bool) {
	text := f.text(expose)
	header[prefix+"Grpc-Status"] = []string{strconv.FormatUint(uint64(f.code), 10)}
	header[prefix+"Grpc-Message"] = []string{grpcwire.EncodeMessage(text)}
	if f.hasDetails() {
		header[prefix+"Grpc-Status-Details-Bin"] = []string{f.details(text, attempts, expose)}
	} else {
		delete(header, prefix+"Grpc-Status-Details-Bin") // of a status that is repaired: they would contradict it
	}
}

// answerType is the content-type of an answer that the proxy makes: the request's. A client that speaks
// application/grpc+json takes application/grpc for the answer of something else, whatever the status (connect-go, say).
func answerType(r *http.Request) []string { return slices.Clone(r.Header["Content-Type"]) }

// annotate adds what the policy wants the client to know.
func (x *exchange) annotate(header http.Header) {
	x.att.pick.Annotate(&x.call, header.Add)
}

// headerDown applies the configured changes to the response's leading metadata.
func (x *exchange) headerDown(header http.Header) {
	if x.h.Headers == nil || x.h.Headers.Response == nil {
		return
	}
	ops := x.h.Headers.Response
	if ops.Require == nil || ops.Require.Match(http.StatusOK, header) {
		ops.ApplyTo(header, x.repl)
	}
}
