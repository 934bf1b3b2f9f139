package grpcproxy_test

import (
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// The matcher, and grpc_respond, tell handlers in front of grpc_proxy what is called, as the path then is.
func TestWireNamesBeforeTheHandler(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{AccessLog: true, Site: `
		log_append p_service {http.grpc_proxy.service}
		route {
			@never grpc test.Never
			respond @never 500
			vars called {http.grpc_proxy.service}/{http.grpc_proxy.method}
			request_header X-Called {vars.called}
			@old grpc test.Old
			rewrite @old /test.New/{http.grpc_proxy.method}
			@down grpc test.Down
			grpc_respond @down UNAVAILABLE "{http.grpc_proxy.service} is down, {http.grpc_proxy.method} too"
			grpc_proxy UPSTREAMS {
				header_up X-Now {http.grpc_proxy.service}
			}
		}`}})
	call := func(path string) *rpc {
		t.Helper()
		c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(path), true)}
		c.take(0)
		c.head()
		c.trailers()
		c.ok()
		return c
	}
	c := call("/test.Service/Method")
	if got, now := c.req.Get("x-called"), c.req.Get("x-now"); got != "test.Service/Method" || now != "test.Service" {
		t.Errorf("before the handler %q, in it %q", got, now)
	}
	c = call("/test.Old/Get")
	if got, now := c.req.Get("x-called"), c.req.Get("x-now"); got != "test.Old/Get" || now != "test.New" || c.req.Get(":path") != "/test.New/Get" {
		t.Errorf("before the handler %q, in it %q, path %q", got, now, c.req.Get(":path"))
	}
	h := r.client.CollectAll(r.client.Open(r.client.Request("/test.Down/Get"), true))
	if got := wiretest.Get(h.Head, "grpc-message"); got != "test.Down is down, Get too" {
		t.Errorf("grpc_respond says %q", got)
	}
	for n, want := range []string{"test.Service", "test.New", "test.Down"} {
		var lines []map[string]any
		eventually(t, "the call is in the access log", func() bool { lines = r.Log("http.log.access"); return len(lines) > n })
		if got := lines[n]["p_service"]; got != want {
			t.Errorf("line %d of the log has %v, want %s", n, got, want)
		}
	}
}

// grpc_respond knows the names without a matcher, too.
func TestWireNamesInRespond(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: `grpc_respond UNIMPLEMENTED "no {http.grpc_proxy.service} here, nor {http.grpc_proxy.method}"`}})
	h := r.client.CollectAll(r.client.Open(r.client.Request("/test.Service/Method"), true))
	if got := wiretest.Get(h.Head, "grpc-message"); got != "no test.Service here, nor Method" {
		t.Errorf("grpc_respond says %q", got)
	}
}

// The matcher is a function in CEL, with names as on the line of a Caddyfile.
func TestWireMatcherInCEL(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: `
		@a expression ` + "`grpc('test.A', 'test.B/Get*', '/test.C/*') && header({'X-Go': 'yes'})`" + `
		grpc_respond @a UNAVAILABLE a
		@any expression grpc()
		grpc_respond @any UNAVAILABLE any`}})
	for _, tt := range []struct{ path, header, want string }{
		{"/test.A/M", "yes", "a"},
		{"/test.A/M", "no", "any"},
		{"/test.B/GetX", "yes", "a"},
		{"/test.B/Set", "yes", "any"},
		{"/test.C/M", "yes", "a"},
		{"/test.D/M", "yes", "any"},
	} {
		h := r.client.CollectAll(r.client.Open(r.client.Request(tt.path, "x-go", tt.header), true))
		if got := wiretest.Get(h.Head, "grpc-message"); got != tt.want {
			t.Errorf("%s, %s: %q, want %q", tt.path, tt.header, got, tt.want)
		}
	}
	web := r.client.Request("/test.A/M", "x-go", "yes")
	for i := range web {
		if web[i].Name == "content-type" {
			web[i].Value = "application/grpc-web"
		}
	}
	if h := r.client.CollectAll(r.client.Open(web, true)); wiretest.Get(h.Head, "grpc-message") != "" {
		t.Errorf("gRPC-Web matches: %v", h.Head)
	}
}
