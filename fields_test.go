package grpcproxy_test

import (
	"net"
	"strings"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// What a handler in front, or header_up, makes of the client's words cannot break the upstream's connection: RFC 9113 section
// 8.2.1 calls such fields malformed, and some servers close the connection for them, with all calls on it.
func TestMadeFieldsAreValid(t *testing.T) {
	r := newRig(t, rigOptions{Block: "header_up X-Path {http.request.uri.path}\n\theader_up X-Blank \" {http.request.header.x-word} \"\n\theader_up X-{http.request.header.x-word} 1"})
	c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request("/test.Service/%0d%0aM%00%7f", "x-word", "a b", "x-outer", " blanks\t"), true)}
	c.take(0)
	if got := c.req.Get(":path"); got != "/test.Service/%0d%0aM%00%7f" {
		t.Errorf(":path %q", got)
	}
	for name, want := range map[string]string{"x-path": "/test.Service/  M", "x-blank": "a b", "x-outer": "blanks"} {
		if got := c.req.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for _, f := range c.req.Fields {
		if strings.ContainsAny(f.Name, " A") || strings.ContainsAny(f.Value, "\r\n\x00\x7f") || strings.TrimSpace(f.Value) != f.Value {
			t.Errorf("%q: %q", f.Name, f.Value)
		}
	}
}

// RFC 9110 section 7.6.1: what a client lists in Connection is for the proxy alone.
func TestConnectionOptions(t *testing.T) {
	r := newRig(t, rigOptions{})
	conn := wiretest.DialRaw(t, r.H2C)
	_, err := conn.Write([]byte("POST " + wirePath + " HTTP/1.1\r\nHost: api.example.com\r\nContent-Type: application/grpc\r\nContent-Length: 0\r\n" +
		"Connection: TE, x-hop\r\nConnection: X-Other-Hop\r\nTE: trailers\r\nX-Hop: 1\r\nX-Other-Hop: 1\r\nX-End: 1\r\n\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	c := &rpc{r: r, client: r.client}
	c.take(0)
	if c.req.Get("x-hop") != "" || c.req.Get("x-other-hop") != "" || c.req.Get("x-end") != "1" || c.req.Get("te") != "trailers" {
		t.Errorf("%v", c.req.Fields)
	}
}

// RFC 9113 section 8.3.1: ":scheme" is that of the connection, also where tls_except_ports makes it plaintext.
func TestSchemeOfExceptedPort(t *testing.T) {
	ca := wiretest.NewCA(t)
	plain := wiretest.Listen(t)
	secure := wiretest.Listen(t, wiretest.Options{TLS: ca.ServerConfig()})
	_, port, err := net.SplitHostPort(plain.Addr())
	if err != nil {
		t.Fatal(err)
	}
	// A handler each: who waits for the one may be given the other.
	for want, l := range map[string]*wiretest.Listener{"http": plain, "https": secure} {
		t.Run(want, func(t *testing.T) {
			r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "grpc_proxy " + l.Addr() + " {\n\ttls_trust_pool file " + ca.File() + "\n\ttls_except_ports " + port + "\n}"}})
			r.client.Open(r.client.Request(wirePath), true)
			if got := l.Accept().ExpectHeaders().Get(":scheme"); got != want {
				t.Errorf(":scheme %q", got)
			}
		})
	}
}
