package grpcproxy_test

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// "Requests that are not gRPC go to the next handler." What is gRPC says the content-type: "exactly application/grpc, or
// followed by + or ;"; gRPC-Web is not.
func TestWireNotGRPC(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "route {\ngrpc_proxy UPSTREAMS\nrespond \"next\" 299\n}"}})
	for _, tt := range []struct {
		method, contentType string
		grpc                bool
	}{
		{"POST", "application/grpc", true},
		{"POST", "application/grpc+proto", true},
		{"POST", "application/grpc+json", true},
		{"POST", "application/grpc;charset=utf-8", true},
		{"POST", "application/grpc; charset=utf-8", true},
		{"POST", "Application/GRPC", true},
		{"POST", "application/grpc-web", false},
		{"POST", "application/grpc-web+proto", false},
		{"POST", "application/grpc-web-text", false},
		{"POST", "application/grpcx", false},
		{"POST", "application/json", false},
		{"POST", "", false},
		{"POST", "application/grpc|application/grpc", false},
		{"GET", "application/grpc", false},
		{"GET", "", false},
		{"PUT", "application/grpc", false},
	} {
		r.run(tt.method+" "+tt.contentType, func(t *testing.T, r *rig) {
			fields := r.client.Request(wirePath)
			fields[0].Value = tt.method
			fields = slices.DeleteFunc(fields, func(f hpack.HeaderField) bool { return f.Name == "content-type" })
			for ct := range strings.SplitSeq(tt.contentType, "|") {
				if ct != "" {
					fields = append(fields, wiretest.Fields("content-type", ct)...)
				}
			}
			c := &rpc{r: r, client: r.client, id: r.client.Open(fields, true)}
			if !tt.grpc {
				status, body := "299", "next"
				if onDirect(t) { // there is none
					status, body = "415", ""
				}
				h := c.result()
				if wiretest.Get(h.Head, ":status") != status || string(h.Data) != body || wiretest.Values(h.Head, "grpc-status") != nil {
					t.Errorf("got %v %q, want the next handler's answer, or 415", h.Head, h.Data)
				}
				return
			}
			c.take(0)
			if got := c.req.Get("content-type"); got != tt.contentType {
				t.Errorf("content-type %q, want %q", got, tt.contentType)
			}
			c.answerOK()
		})
	}
}

// A path without a second slash names no method, and is answered here: grpc-go's server calls that a "malformed method name".
func TestWireBadPath(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, path := range []string{"/", "/method", "/method?a=/b"} {
		r.run(path, func(_ *testing.T, r *rig) {
			fields := r.client.Request(path)
			c := &rpc{r: r, client: r.client, id: r.client.Open(fields, true)}
			r.checkFailure(c.result(), failure{code: codes.Unimplemented, reason: "MALFORMED_PATH", attempts: -1, says: []string{"path"}})
		})
	}
}

// Every other path is the upstream's to judge, and reaches it as the client sent it. What it is called in the log, and what
// rules are about, is the same for all spellings of a method.
func TestWireOddPaths(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: `route {
		@admin grpc admin.Svc
		grpc_respond @admin PERMISSION_DENIED
		grpc_proxy UPSTREAMS
	}`, AccessLog: true}})
	for _, tt := range []struct{ path, service, method string }{
		{"//pkg.Svc/M", "pkg.Svc", "M"},
		{"/pkg.Svc//M", "pkg.Svc", "M"},
		{"///a/b//M", "a/b", "M"},
		{"/a.B/", "a.B", ""},
		{"//method", "", "method"},
		{"//", "", ""},
		{"/a/b/c/M?x=//y", "a/b/c", "M"},
		{"/xadmin.Svc/M", "xadmin.Svc", "M"},
	} {
		r.run(tt.path, func(t *testing.T, r *rig) {
			before := len(r.Log("http.log.access"))
			if got := r.request(r.client.Request(tt.path)).Get(":path"); got != tt.path {
				t.Errorf(":path %q", got)
			}
			if onDirect(t) {
				return // the access log is the server's
			}
			eventually(t, "the log line", func() bool { return len(r.Log("http.log.access")) > before })
			if line := r.Log("http.log.access")[before]; line["grpc_service"] != tt.service || line["grpc_method"] != tt.method {
				t.Errorf("the log has service %q, method %q", line["grpc_service"], line["grpc_method"])
			}
		})
	}
	if onDirect(t) {
		return // what follows is about a handler in front
	}
	for _, path := range []string{"/admin.Svc/M", "//admin.Svc/M", "/admin.Svc//M", "///admin.Svc///M", "/admin%2eSvc/M"} {
		r.run(path, func(t *testing.T, r *rig) {
			c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(path), true)}
			if got := c.result().Get("grpc-status"); got != "7" {
				t.Errorf("grpc-status %q, want 7: the rule for admin.Svc is passed by", got)
			}
		})
	}
}

// grpc_respond answers a status as gRPC's Trailers-Only, to the frame what a server without that method would send.
func TestWireRespond(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: `
		route {
			@maintenance grpc pkg.Maintenance
			grpc_respond @maintenance UNAVAILABLE "back at 5 pm: 100% sure, Größe {http.request.header.x-id}" {
				metadata x-custom 1 2
				metadata x-id <{http.request.header.x-id}>
			}
			@dynamic grpc pkg.Dynamic
			grpc_respond @dynamic {http.request.header.x-code} {http.request.header.x-text}
			@secret grpc {
				service pkg.Secret pkg.Hidden*
				metadata !authorization
			}
			grpc_respond @secret Unauthenticated
			@write grpc {
				service pkg.Data
				method Write* Delete
				metadata x-role guest *-ro
			}
			grpc_respond @write 7 "read only"
			grpc_respond OK
			respond "web" 200
		}`}})
	for _, tt := range []struct {
		name, path string
		sent       []string
		want       []string
	}{
		{
			"message, metadata, placeholders", "/pkg.Maintenance/Do",
			[]string{"x-id", "7"},
			[]string{"grpc-status", "14", "grpc-message", "back at 5 pm: 100%25 sure, Gr%C3%B6%C3%9Fe 7", "x-custom", "1", "x-custom", "2", "x-id", "<7>"},
		},
		{"code by placeholder", "/pkg.Dynamic/Do", []string{"x-code", "NOT_FOUND", "x-text", "gone"}, []string{"grpc-status", "5", "grpc-message", "gone"}},
		{"no message", "/pkg.Secret/Do", nil, []string{"grpc-status", "16"}},
		{"service by prefix", "/pkg.Hidden.Deep/Do", nil, []string{"grpc-status", "16"}},
		{"metadata key is there", "/pkg.Secret/Do", []string{"authorization", "x"}, []string{"grpc-status", "0"}},
		{"method by prefix", "/pkg.Data/WriteAll", []string{"x-role", "guest"}, []string{"grpc-status", "7", "grpc-message", "read only"}},
		{"metadata by suffix, second value", "/pkg.Data/Delete", []string{"x-role", "x", "x-role", "admin-ro"}, []string{"grpc-status", "7", "grpc-message", "read only"}},
		{"metadata of another value", "/pkg.Data/Delete", []string{"x-role", "admin"}, []string{"grpc-status", "0"}},
		{"another method", "/pkg.Data/Read", []string{"x-role", "guest"}, []string{"grpc-status", "0"}},
	} {
		r.run(tt.name, func(t *testing.T, r *rig) {
			c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(tt.path, tt.sent...), true)}
			h := c.result()
			if h.Sequence() != "HEADERS+END_STREAM" {
				t.Errorf("frames %s", h.Sequence())
			}
			sameFields(t, h.Head, wiretest.Head(tt.want...))
		})
	}
	r.run("code that is none", func(t *testing.T, r *rig) {
		c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request("/pkg.Dynamic/Do", "x-code", "NOPE"), true)}
		h := c.result()
		if h.Sequence() != "HEADERS+END_STREAM" || h.Get("grpc-status") != "13" || !strings.Contains(h.Get("grpc-message"), "NOPE") {
			t.Errorf("%s %v", h.Sequence(), h.Head)
		}
	})
	r.run("request open", func(t *testing.T, r *rig) {
		c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request("/pkg.Secret/Do"), false)}
		h := c.result()
		if h.Sequence() != "HEADERS+END_STREAM RST_STREAM(NO_ERROR)" {
			t.Errorf("frames %s", h.Sequence())
		}
		sameFields(t, h.Head, wiretest.Head("grpc-status", "16"))
	})
	r.run("not gRPC", func(t *testing.T, r *rig) {
		fields := r.client.Request("/pkg.Secret/Do")
		fields[4].Value = "application/json"
		c := &rpc{r: r, client: r.client, id: r.client.Open(fields, true)}
		if h := c.result(); string(h.Data) != "web" || wiretest.Values(h.Head, "grpc-status") != nil {
			t.Errorf("%v %q", h.Head, h.Data)
		}
	})
}

// PROTOCOL-HTTP2: "If Content-Type does not begin with "application/grpc", gRPC servers SHOULD respond with HTTP status of 415".
// It is the answer where nobody behind takes the request, whichever of our handlers it has passed.
func TestWireNobodyTakesIt(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{AccessLog: true, Site: `
		handle_path /respond/* {
			grpc_respond OK
		}
		handle_path /both/* {
			grpc_health
			grpc_proxy UPSTREAMS
			grpc_respond @never OK
			@never grpc pkg.Never
		}
		handle_path /page/* {
			route {
				grpc_proxy UPSTREAMS
				respond "page" 299
			}
		}
		handle /pkg.Health/* {
			grpc_health
		}
		handle {
			grpc_proxy UPSTREAMS
		}
		handle_errors 415 {
			header X-Error {err.status_code}
		}`}})
	n := 0
	for _, tt := range []struct {
		method, path, contentType string
		status, grpc, msg         string
	}{
		{"POST", "/x", "application/json", "415", "", "handled request"},
		{"POST", "/x", "", "415", "", "handled request"},
		{"POST", wirePath, "application/grpc-web", "415", "", "handled request"},
		{"POST", "/respond/x", "text/plain", "415", "", "handled request"},
		{"POST", "/both/x", "text/plain", "415", "", "handled request"},
		{"POST", "/page/x", "text/plain", "299", "", "handled request"},
		{"POST", "/pkg.Health/x", "text/plain", "415", "", "handled request"},
		{"POST", "/pkg.Health/x", "application/grpc", "200", "12", "handled request"},
		{"GET", "/x", "", "200", "", "NOP"},
		{"PUT", "/x", "application/grpc", "200", "", "NOP"},
		{"OPTIONS", "/x", "", "200", "", "NOP"},
	} {
		r.run(tt.method+" "+tt.path+" "+tt.contentType, func(t *testing.T, r *rig) {
			fields := r.client.Request(tt.path)
			fields[0].Value = tt.method
			fields = slices.DeleteFunc(fields, func(f hpack.HeaderField) bool { return f.Name == "content-type" })
			if tt.contentType != "" {
				fields = append(fields, wiretest.Fields("content-type", tt.contentType)...)
			}
			h := r.client.CollectAll(r.client.Open(fields, true))
			if got, status := wiretest.Get(h.Head, ":status"), wiretest.Get(h.Head, "grpc-status"); got != tt.status || status != tt.grpc {
				t.Errorf("HTTP status %q, grpc-status %q; want %q, %q", got, status, tt.status, tt.grpc)
			}
			if got := wiretest.Get(h.Head, "x-error"); (got == "415") != (tt.status == "415") {
				t.Errorf("handle_errors saw %q", got)
			}
			n++
			if line := r.accessLog(n); line["msg"] != tt.msg {
				t.Errorf("the access log says %v, want %s", line["msg"], tt.msg)
			}
		})
	}
}
