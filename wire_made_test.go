package grpcproxy_test

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// gRPC over HTTP/2: "Content-Type → "content-type" "application/grpc" [("+proto" / "+json" / {custom})]". A client of
// application/grpc+json takes an answer of any other content-type for no answer at all: connect-go makes it INTERNAL, whatever
// status it has.
func TestWireMadeContentType(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: `route {
		@gone grpc gone.Service
		grpc_respond @gone NOT_FOUND
		@health grpc grpc.health.v1.Health
		grpc_health @health
		grpc_proxy UPSTREAMS {
			header_down -X-Nothing
		}
	}`}})
	r.complete()
	for _, ct := range []string{"application/grpc", "application/grpc+json", "application/grpc+proto", "application/grpc;charset=utf-8"} {
		call := func(r *rig, path string, more ...string) *rpc {
			fields := r.client.Request(path, more...)
			for i := range fields {
				if fields[i].Name == "content-type" {
					fields[i].Value = ct
				}
			}
			c := &rpc{r: r, client: r.client, id: r.client.Open(fields, false)}
			c.client.WriteData(c.id, wiretest.Message(nil), true)
			return c
		}
		for _, tt := range []struct {
			name, path, status string
			more               []string
			answer             func(c *rpc)
		}{
			{name: "bad path", path: "/none", status: "12"},
			{name: "bad timeout", path: wirePath, status: "13", more: []string{"grpc-timeout", "x"}},
			{name: "grpc_respond", path: "/gone.Service/Method", status: "5"},
			{name: "grpc_health", path: "/grpc.health.v1.Health/None", status: "12"},
			{name: "deadline", path: wirePath, status: "4", more: []string{"grpc-timeout", "1m"}},
			{name: "reset", path: wirePath, status: "13", answer: func(c *rpc) { c.up.WriteReset(c.sid, http2.ErrCodeInternal) }},
			{name: "an HTTP status", path: wirePath, status: "14", answer: func(c *rpc) {
				c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "503", "content-type", "text/html"), true)
			}},
			{name: "a status in an answer that is not gRPC", path: wirePath, status: "5", answer: func(c *rpc) {
				c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "200", "content-type", "text/html", "grpc-status", "5"), true)
			}},
		} {
			if onDirect(t) && strings.HasPrefix(tt.name, "grpc_") {
				continue // another handler
			}
			r.run(ct+", "+tt.name, func(t *testing.T, r *rig) {
				c := call(r, tt.path, append(tt.more, "x-case", tt.name)...)
				if tt.answer != nil {
					c.takeCase(tt.name)
					tt.answer(c)
				}
				h := c.result()
				if wiretest.Get(h.Head, "content-type") != ct || h.Get("grpc-status") != tt.status {
					t.Errorf("%v; want content-type %q, status %s", h.Head, ct, tt.status)
				}
			})
		}
		// An upstream's own content-type is the upstream's to choose.
		r.run(ct+", an answer", func(t *testing.T, r *rig) {
			c := call(r, wirePath, "x-case", "own")
			c.takeCase("own")
			c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "200", "content-type", "application/grpc+own", "grpc-status", "5"), true)
			if got := wiretest.Get(c.result().Head, "content-type"); got != "application/grpc+own" {
				t.Errorf("content-type %q", got)
			}
		})
	}
}

// takeCase waits for the call with the value of x-case at the first upstream.
func (c *rpc) takeCase(name string) {
	c.r.t.Helper()
	c.up = c.r.ups[0].current()
	c.req = c.up.Expect("the call "+name, func(f wiretest.Frame) bool { return f.Get("x-case") == name })
	c.sid = c.req.Stream
}

// RFC 9113 section 8.1.1: a request whose DATA does not add up to its content-length is malformed. It is the client that broke
// it, not that gave it up, and the upstream has nothing to do with it.
func TestWireRequestLength(t *testing.T) {
	r := newRig(t, rigOptions{})
	message := wiretest.Message([]byte("request"))
	logged := func(t *testing.T, before int, message string) {
		t.Helper()
		if isOverHop(t) && !strings.HasSuffix(t.Name(), "HTTP/1.1") {
			return // the call is cancelled at the server
		}
		if onDirect(t) {
			message = "the request's data does not add up to its content-length"
		}
		eventually(t, "the log line", func() bool { return len(r.failures()) > before })
		line := r.failures()[before]
		for k, want := range map[string]any{"status": "INTERNAL", "message": message, "reason": "REQUEST_LENGTH_MISMATCH", "ended_by": "client"} {
			if line[k] != want {
				t.Errorf("the log has %s %v, want %v", k, line[k], want)
			}
		}
	}
	// A server "MAY send an HTTP response prior to closing or resetting the stream", or reset it, as a stream error of type
	// PROTOCOL_ERROR: gRPC makes INTERNAL of both.
	refused := func(c *rpc, want failure) {
		r.t.Helper()
		if !onDirect(t) && !isOverHop(t) {
			c.r.checkFailure(c.result(), want)
		} else if code := c.client.ExpectReset(c.id); code != http2.ErrCodeProtocol {
			t.Errorf("RST_STREAM(%v)", code)
		}
	}
	r.complete()
	const shorter, longer = "request body shorter than its content-length", "request body longer than its content-length"
	r.run("shorter", func(t *testing.T, r *rig) {
		before := len(r.failures())
		c := r.open("content-length", fmt.Sprint(len(message)+1))
		c.client.WriteData(c.id, message, true)
		refused(c, failure{code: codes.Internal, reason: "REQUEST_LENGTH_MISMATCH", says: []string{shorter}})
		logged(t, before, shorter)
	})
	r.run("shorter, in pieces", func(t *testing.T, r *rig) {
		before := len(r.failures())
		c := r.open("content-length", "1000", "x-case", "pieces")
		c.client.WriteData(c.id, message, false)
		c.takeCase("pieces")
		c.got(len(message), false)
		c.client.WriteData(c.id, nil, true)
		refused(c, failure{code: codes.Internal, reason: "REQUEST_LENGTH_MISMATCH", says: []string{shorter}})
		if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
			t.Errorf("the upstream got RST_STREAM(%v), want CANCEL", code)
		}
		logged(t, before, shorter)
	})
	r.run("nothing", func(t *testing.T, r *rig) {
		before := len(r.failures())
		c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(wirePath, "content-length", "5"), true)}
		refused(c, failure{code: codes.Internal, reason: "REQUEST_LENGTH_MISMATCH", says: []string{shorter}, attempts: -1})
		if !onDirect(t) { // there it is no call
			logged(t, before, shorter)
		}
	})
	// Go's server resets the stream itself.
	r.run("longer", func(t *testing.T, r *rig) {
		before := len(r.failures())
		c := r.open("content-length", fmt.Sprint(len(message)-1), "x-case", "longer")
		c.takeCase("longer")
		c.client.WriteData(c.id, message, false)
		if code := c.client.ExpectReset(c.id); code != http2.ErrCodeProtocol {
			t.Errorf("RST_STREAM(%v)", code)
		}
		logged(t, before, longer)
	})
	if onDirect(t) {
		return
	}
	r.run("HTTP/1.1", func(t *testing.T, r *rig) {
		before := len(r.failures())
		nc := wiretest.DialRaw(t, r.H2C)
		_ = nc.SetDeadline(time.Now().Add(timeout))
		fmt.Fprintf(nc, "POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nX-Case: http1\r\nContent-Length: 1000\r\n\r\n%s", wirePath, message)
		c := &rpc{r: r}
		c.takeCase("http1")
		c.got(len(message), false)
		_ = nc.(*net.TCPConn).CloseWrite()
		if answer, err := io.ReadAll(nc); err != nil || !strings.Contains(strings.ToLower(string(answer)), "grpc-status: 13") {
			t.Errorf("%q, %v", answer, err)
		}
		logged(t, before, shorter)
	})
}

// The HTTP/3 server takes a request that is shorter than its content-length for a whole one (RFC 9114 section 4.1.2 calls it
// malformed). The upstream must not.
func TestWireRequestLengthOfHTTP3(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "route {\ntest_faulty http3\ngrpc_proxy UPSTREAMS\n}"}})
	c := r.open()
	c.client.WriteData(c.id, wiretest.Message([]byte("request")), false)
	c.take(0)
	c.got(len(wiretest.Message([]byte("request"))), false)
	c.client.WriteData(c.id, nil, true)
	r.checkFailure(c.result(), failure{code: codes.Internal, reason: "REQUEST_LENGTH_MISMATCH", says: []string{"shorter than its content-length"}})
	if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
		t.Errorf("the upstream got RST_STREAM(%v), want CANCEL", code)
	}
}
