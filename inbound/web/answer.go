package web

import (
	"net/http"
	"reflect"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// Prepare takes out of the answer's header what the server put there on its own account: in gRPC every field is
// metadata that the application sees. What an earlier handler set on purpose stays.
func Prepare(h http.Header, r *http.Request) {
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

// Tidy takes out what Prepare put into the header for the server alone: in the access log it would be empty lists. written
// tells that the answer had messages, so that the server has the head.
func Tidy(w http.ResponseWriter, r *http.Request, written bool) {
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

// AnswerType is the content-type of an answer that the proxy makes: the request's. A client that speaks
// application/grpc+json takes application/grpc for the answer of something else, whatever the status (connect-go, say).
func AnswerType(r *http.Request) []string { return slices.Clone(r.Header["Content-Type"]) }
