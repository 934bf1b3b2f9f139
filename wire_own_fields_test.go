package grpcproxy_test

import (
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// What the server adds to each answer on its own account is no metadata of the call. What a handler in front has set on
// purpose is, and it replaces the upstream's where there can be but one.
func TestWireServersOwnFields(t *testing.T) {
	const date = "Thu, 01 Jan 1970 00:00:00 GMT"
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	for name, tt := range map[string]struct {
		site string
		want map[string][]string
	}{
		"none": {"", map[string][]string{"server": {"up/1"}, "date": {"then"}, "alt-svc": nil}},
		"a handler's": {
			"header Server mine/1\nheader Date \"" + date + "\"\nheader Alt-Svc \"h3=\\\":443\\\"; ma=2592000\"\n",
			map[string][]string{"server": {"mine/1"}, "date": {date}, "alt-svc": {`h3=":443"; ma=2592000`}},
		},
		"a handler's, added": {"header +Alt-Svc \"h2=\\\"x:1\\\"\"\n", map[string][]string{"server": {"up/1"}, "alt-svc": {`h2="x:1"`}}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigOptions{Caddy: proxytest.Options{
				CertFile: cert, KeyFile: key, Site: tt.site + "@status grpc test.Status\ngrpc_respond @status UNAVAILABLE\ngrpc_proxy UPSTREAMS",
			}})
			r.client = wiretest.Dial(t, r.TLS, ca.ClientConfig())
			check := func(what string, fields []hpack.HeaderField, ours bool) {
				t.Helper()
				for name, want := range tt.want {
					if ours && !strings.HasPrefix(tt.site, "header Server") && name != "alt-svc" {
						want = nil
					}
					if got := wiretest.Values(fields, name); strings.Join(got, "|") != strings.Join(want, "|") {
						t.Errorf("%s: %s %q, want %q", what, name, got, want)
					}
				}
			}
			c := r.unary()
			c.head("server", "up/1", "date", "then", "alt-svc", "up")
			c.trailers()
			check("head", c.ok().Head, false)
			c = r.unary()
			c.up.WriteHeaders(c.sid, wiretest.Head("server", "up/1", "date", "then", "grpc-status", "5"), true)
			check("Trailers-Only", c.result().Head, false)
			c = r.open("grpc-timeout", "x")
			check("failure", c.result().Head, true)
			id := r.client.Open(r.client.Request("/test.Status/M"), true)
			check("grpc_respond", r.client.CollectAll(id).Head, true)
		})
	}
}

// The access log shows what the answer had: no empty lists. A handler in front that holds the head back makes no
// difference on the wire.
func TestWireAccessLogHeader(t *testing.T) {
	for _, front := range []string{"", "encode gzip\n", "header {\ndefer\nX-Any 1\n}\n"} {
		t.Run(strings.SplitN(front+" ", " ", 2)[0], func(t *testing.T) {
			r := newRig(t, rigOptions{Caddy: proxytest.Options{
				AccessLog: true, Site: front + "@status grpc test.Status\ngrpc_respond @status UNAVAILABLE\ngrpc_proxy UPSTREAMS",
			}})
			line := 0
			check := func(what string, h *wiretest.Half, clean bool) {
				t.Helper()
				for _, name := range []string{"date", "content-length"} {
					if got := wiretest.Values(h.Head, name); got != nil {
						t.Errorf("%s: the client got %s %q", what, name, got)
					}
				}
				line++
				header, _ := r.accessLog(line)["resp_headers"].(map[string]any)
				for _, name := range []string{"Date", "Content-Length"} {
					if v, ok := header[name]; ok && clean {
						t.Errorf("%s: the access log has %s %v", what, name, v)
					}
				}
			}
			held := strings.HasPrefix(front, "encode") // only then the server has to be told later
			c := r.unary()
			c.head()
			c.message("response")
			c.trailers()
			check("messages", c.ok(), true)
			c = r.unary()
			c.up.WriteHeaders(c.sid, wiretest.Head("grpc-status", "5"), true)
			check("Trailers-Only", c.result(), !held)
			c = r.open("grpc-timeout", "x")
			check("failure", c.result(), !held)
			check("grpc_respond", r.client.CollectAll(r.client.Open(r.client.Request("/test.Status/M"), true)), !held)
			c = r.unary()
			c.head()
			c.up.WriteData(c.sid, wiretest.Message([]byte("response"))[:6], false)
			c.up.WriteReset(c.sid, 2)
			check("reset inside a message", c.result(), true)
		})
	}
}
