package grpcproxy

import (
	"net/http"
	"strconv"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// prepare takes out of the answer's header what the server put there on its own account: in gRPC every field is
// metadata that the application sees. What an earlier handler set on purpose stays.
func prepare(h http.Header) {
	delete(h, "Server")
	delete(h, "Alt-Svc")
	// Present and nil means: do not add one.
	h["Date"] = nil
	h["Content-Length"] = nil
}

// writeHead sends the response head. From here on the call is committed.
func (x *exchange) writeHead(fields []h2.Field) {
	header := x.w.Header()
	prepare(header)
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
	prepare(header)
	copyFields(header, "", fields)
	if grpcwire.ContentKind(header.Get("Content-Type")) != grpcwire.GRPC {
		header["Content-Type"] = []string{"application/grpc"}
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
	switch {
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
	prepare(header)
	header["Content-Type"] = []string{"application/grpc"}
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
	header[prefix+"Grpc-Status-Details-Bin"] = []string{f.details(text, attempts, expose)}
}

// annotate adds what the policy wants the client to know.
func (x *exchange) annotate(header http.Header) {
	a := x.att
	if a.view.Annotator != nil {
		a.view.Annotator.Annotate(&x.call, a.index, header.Add)
	}
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
