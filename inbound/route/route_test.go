package route_test

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/inbound/route"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
)

func TestMain(m *testing.M) { proxytest.Main(m) }

// server runs a Caddy and returns its server.
func server(t *testing.T, o proxytest.Options) *caddyhttp.Server {
	t.Helper()
	p := proxytest.Start(t, o)
	app, err := caddy.ActiveContext().App("http")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(p.H2C)
	for _, srv := range app.(*caddyhttp.App).Servers {
		if strings.HasSuffix(srv.Listen[0], ":"+port) {
			return srv
		}
	}
	t.Fatal("there is no such server")
	return nil
}

// plainCall is a call that has no metadata.
func plainCall() *http.Request {
	return &http.Request{
		Method: http.MethodPost, Host: "example.com", URL: &url.URL{Path: "/a.B/C"}, Header: http.Header{"Content-Type": {"application/grpc"}},
		ProtoMajor: 2, RemoteAddr: "192.0.2.7:1234",
	}
}

const proxied = "grpc_proxy 127.0.0.1:1"

// Calls are direct where nothing on their way needs a request, and the table says what does where one is not.
func TestDecide(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    proxytest.Options
		why  map[string]string // what the paths of calls are not direct for; empty: they are
	}{
		{"alone", proxytest.Options{Site: proxied}, map[string]string{"/a.B/C": ""}},
		{"vars", proxytest.Options{Site: "vars a b\nroot /srv\n" + proxied}, map[string]string{"/a.B/C": ""}},
		{"vars with a placeholder", proxytest.Options{Site: "vars a {http.request.uri}\n" + proxied}, map[string]string{"/a.B/C": "placeholder"}},
		{
			"handle",
			proxytest.Options{Site: "handle /a.B/* {\n" + proxied + "\n}\nhandle {\nrespond 404\n}"},
			map[string]string{"/a.B/C": "", "/a.BC/D": "static_response", "/A.b/C": ""},
		},
		{
			"route",
			proxytest.Options{Site: "route {\nroute /a.B/* {\n" + proxied + "\n}\nrespond 404\n}"},
			map[string]string{"/a.B/C": "", "/b.B/C": "static_response"},
		},
		{"a matcher of paths", proxytest.Options{Site: "grpc_proxy /a.B/* 127.0.0.1:1"}, map[string]string{"/a.B/C": "", "/b.B/C": "no route"}},
		{"grpc by service", proxytest.Options{Site: "@a grpc a.B\ngrpc_proxy @a 127.0.0.1:1"}, map[string]string{"/a.B/C": "", "/b.B/C": "no route"}},
		{"grpc by metadata", proxytest.Options{Site: "@a grpc {\nmetadata x y\n}\ngrpc_proxy @a 127.0.0.1:1"}, map[string]string{"/a.B/C": "no route"}},
		{
			"a header behind",
			proxytest.Options{Site: "@a path /a.B/*\n@b header x y\nroute {\ngrpc_proxy @a 127.0.0.1:1\nrespond @b 403\n" + proxied + "\n}"},
			map[string]string{"/a.B/C": "", "/b.B/C": ""},
		},
		{"a header before", proxytest.Options{Site: "@b header x y\nroute {\nrespond @b 403\n" + proxied + "\n}"}, map[string]string{"/a.B/C": ""}},
		{"a header with a placeholder", proxytest.Options{Site: "@b header x {http.request.host}\nroute {\nrespond @b 403\n" + proxied + "\n}"}, map[string]string{"/a.B/C": "placeholder"}},
		{"a regular expression", proxytest.Options{Site: "@b header_regexp x y\nroute {\nrespond @b 403\n" + proxied + "\n}"}, map[string]string{"/a.B/C": "the matcher header_regexp"}},
		{
			"many headers",
			proxytest.Options{Site: "@a header a a\n@b header b b\n@c header c c\n@d header d d\n@e header e e\nroute {\nvars @a a a\nvars @b a a\nvars @c a a\nvars @d a a\nvars @e a a\n" + proxied + "\n}"},
			map[string]string{"/a.B/C": "too many matchers"},
		},
		{"not", proxytest.Options{Site: "@b not path /b.B/*\ngrpc_proxy @b 127.0.0.1:1"}, map[string]string{"/a.B/C": "the matcher not"}},
		{"an expression", proxytest.Options{Site: "@b expression true\ngrpc_proxy @b 127.0.0.1:1"}, map[string]string{"/a.B/C": "the matcher expression"}},
		{"a method", proxytest.Options{Site: "@b method POST\ngrpc_proxy @b 127.0.0.1:1"}, map[string]string{"/a.B/C": ""}},
		{"another method", proxytest.Options{Site: "@b method GET\ngrpc_proxy @b 127.0.0.1:1"}, map[string]string{"/a.B/C": "no route"}},
		{"a protocol", proxytest.Options{Site: "@b protocol grpc\ngrpc_proxy @b 127.0.0.1:1"}, map[string]string{"/a.B/C": ""}},
		{"encode", proxytest.Options{Site: "encode gzip\n" + proxied}, map[string]string{"/a.B/C": "the handler encode"}},
		{"header", proxytest.Options{Site: "header x y\n" + proxied}, map[string]string{"/a.B/C": "the handler headers"}},
		{"a respond in front", proxytest.Options{Site: "respond 200\n" + proxied}, map[string]string{"/a.B/C": "static_response"}},
		{"grpc_respond", proxytest.Options{Site: "grpc_respond UNAVAILABLE"}, map[string]string{"/a.B/C": "the handler grpc_respond"}},
		{"header_up", proxytest.Options{Site: proxied + " {\nheader_up x y\n}"}, map[string]string{"/a.B/C": ""}},
		{"header_up with a placeholder", proxytest.Options{Site: proxied + " {\nheader_up x {http.request.host}\n}"}, map[string]string{"/a.B/C": "placeholder"}},
		{"trusted_proxies", proxytest.Options{Site: proxied + " {\ntrusted_proxies 10.0.0.0/8\n}"}, map[string]string{"/a.B/C": "trusted_proxies"}},
		{"an access log", proxytest.Options{Site: proxied, AccessLog: true}, map[string]string{"/a.B/C": "access logs"}},
		{"metrics", proxytest.Options{Site: proxied, Global: "metrics"}, map[string]string{"/a.B/C": "metrics"}},
		{"a timeout", proxytest.Options{Site: proxied, Servers: "timeouts {\nwrite 1m\n}"}, map[string]string{"/a.B/C": "timeouts"}},
		{"odd paths", proxytest.Options{Site: proxied}, map[string]string{
			"/a.B/C?x": "unusual", "/a.B": "unusual", "//a.B/C": "unusual", "/a.B/C/": "unusual", "/a..B/C": "unusual", "/a%2eB/C": "unusual",
			"/a.B/C/D": "unusual", "*": "unusual", "": "unusual", "/": "unusual", "/a.B/": "unusual", "/a.B/C\x00": "unusual",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv := server(t, tt.o)
			table := route.New(srv, tt.o.Global == "metrics")
			for path, why := range tt.why {
				for range 2 { // and as it is remembered
					d := table.Decide("example.com:8080", path, nil, plainCall)
					if direct := why == ""; (d.Handler != nil) != direct || !strings.Contains(d.Why, why) || (d.Why == "") != direct {
						t.Errorf("%s: direct %t, %q, want %q", path, d.Handler != nil, d.Why, why)
					}
				}
			}
		})
	}
}

// Matchers of metadata and of the client's address are asked for each call, and say what they say to a request.
func TestPerCall(t *testing.T) {
	srv := server(t, proxytest.Options{Site: `
		@canary header x-canary yes
		@near remote_ip 10.0.0.0/8
		@paid grpc {
			service a.B
			metadata x-plan paid*
		}
		route {
			handle @canary {
				respond 403
			}
			handle @near {
				grpc_proxy 127.0.0.1:1
			}
			handle @paid {
				grpc_proxy 127.0.0.1:2
			}
			handle {
				grpc_respond UNIMPLEMENTED
			}
		}`})
	table := route.New(srv, false)
	handlers := make(map[any]string)
	for i := range 3 { // and as it is remembered
		for _, tt := range []struct {
			addr, name, value string
			path, want        string
		}{
			{"192.0.2.7:1", "X-Canary", "yes", "/a.B/C", "static_response"},
			{"10.1.2.3:1", "X-Canary", "yes", "/a.B/C", "static_response"},
			{"10.1.2.3:1", "X-Plan", "paid", "/a.B/C", "near"},
			{"10.1.2.3:1", "X-Canary", "no", "/b.B/C", "near"},
			{"192.0.2.7:1", "X-Plan", "paid-more", "/a.B/C", "paid"},
			{"192.0.2.7:1", "X-Plan", "free", "/a.B/C", "grpc_respond"},
			{"192.0.2.7:1", "X-Plan", "paid", "/b.B/C", "grpc_respond"},
		} {
			d := table.Decide("a.example", tt.path, nil, func() *http.Request {
				r := plainCall()
				r.URL.Path, r.RemoteAddr = tt.path, tt.addr
				r.Header.Set(tt.name, tt.value)
				return r
			})
			if d.Handler == nil {
				if !strings.Contains(d.Why, tt.want) {
					t.Errorf("%d: %v: %s", i, tt, d.Why)
				}
				continue
			}
			if name, ok := handlers[d.Handler]; ok && name != tt.want {
				t.Errorf("%d: %v: %s", i, tt, name)
			}
			handlers[d.Handler] = tt.want
		}
	}
	if len(handlers) != 2 {
		t.Errorf("calls went to %d handlers", len(handlers))
	}
}

// Hosts are asked for where routes have them, and hosts that are none are left to the server.
func TestHosts(t *testing.T) {
	srv := server(t, proxytest.Options{Site: "@a host a.example\nroute {\ngrpc_proxy @a 127.0.0.1:1\nrespond 404\n}"})
	table := route.New(srv, false)
	for host, direct := range map[string]bool{
		"a.example": true, "A.example": true, "a.example:443": true, "b.example": false, "": false, "...": false, "a.example/": false, "a@b": false, "a b": false,
	} {
		if d := table.Decide(host, "/a.B/C", nil, nil); (d.Handler != nil) != direct {
			t.Errorf("%q: direct %t, %q", host, d.Handler != nil, d.Why)
		}
	}
}

// What calls have in common is remembered once for all of them, and the rest within bounds, so that junk costs no memory.
func TestMemory(t *testing.T) {
	for _, tt := range []struct {
		name, site string
		most       int
	}{
		{"whatever the path", proxied, 2},
		{"by path", "grpc_proxy /a.B/* 127.0.0.1:1", 4096},
		{"by host", "@a host *.example\ngrpc_proxy @a 127.0.0.1:1", 4096},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := route.New(server(t, proxytest.Options{Site: tt.site}), false)
			for i := range 10_000 {
				for _, state := range []*tls.ConnectionState{nil, {}} {
					if d := table.Decide(fmt.Sprintf("h%d.example", i), fmt.Sprintf("/a.B/M%d", i), state, nil); d.Handler == nil {
						t.Fatal(d.Why)
					}
				}
			}
			if n := table.Size(); n > tt.most {
				t.Errorf("%d decisions are remembered, want at most %d", n, tt.most)
			}
		})
	}
}

func BenchmarkDecide(b *testing.B) {
	proxytest.Start(b, proxytest.Options{Site: "grpc_proxy /a.B/* 127.0.0.1:1"})
	app, err := caddy.ActiveContext().App("http")
	if err != nil {
		b.Fatal(err)
	}
	for _, srv := range app.(*caddyhttp.App).Servers {
		table := route.New(srv, false)
		b.ReportAllocs()
		for b.Loop() {
			if table.Decide("a.example", "/a.B/C", nil, nil).Handler == nil {
				b.Fatal("not direct")
			}
		}
		return
	}
}
