package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// fieldCalls are faults of requests, answers and statuses.
var fieldCalls = []fieldCase{
	{
		name:   "what a client sends closes no shared connection",
		origin: "request trailers were passed on, and grpc-go, nginx and HAProxy closed the connection of all clients; gRPC over HTTP/2, \"Requests\"",
		run:    illegalRequests,
	},
	{
		name:   "one client's cancels cost others nothing",
		origin: "rapid resets of one connection became 43,000 calls in 4 s; nginx and Netty closed the connection that all clients share; CVE-2023-44487",
		run:    rapidResets,
	},
	{
		name:   "one client's metadata costs others nothing",
		origin: "nginx closes the connection for a field of 8 KiB, HAProxy for 15 KiB in all and for 200 fields",
		run:    largeMetadata,
	},
	{
		name:   "an answer that is not gRPC is not OK",
		origin: "an answer without content-type, with a message and OK, reached the client as OK without the message; http-grpc-status-mapping.md",
		run:    falseOK,
	},
}

// illegalRequests: whatever one client sends, another one's stream on the same connection to a real server lives on.
func illegalRequests(t *testing.T) {
	realUpstreams(t, func(t *testing.T, s *shared) {
		p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + s.addr})
		other := standBy(within(t, time.Minute), t, p.H2C)
		path := kinds[0].path()
		message := wiretest.Message(nil)
		attack := func(what string, send func(c *wiretest.Conn, fields []hpack.HeaderField) (id uint32), more ...string) {
			t.Helper()
			c := wiretest.Dial(t, p.H2C, nil)
			fields := c.Request(path)
			for i := 0; i < len(more); i += 2 {
				if strings.HasPrefix(more[i], ":") {
					for j := range fields {
						if fields[j].Name == more[i] {
							fields[j].Value = more[i+1]
						}
					}
					continue
				}
				fields = append(fields, hpack.HeaderField{Name: more[i], Value: more[i+1]})
			}
			id := send(c, fields)
			c.Expect("an answer, or the end", func(f wiretest.Frame) bool {
				return f.Type == http2.FrameGoAway || f.Stream == id && (f.EndStream() || f.Type == http2.FrameRSTStream)
			})
			other.check(what)
		}
		trailers := func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteData(id, message, false)
			c.WriteHeaders(id, wiretest.Fields("x-sum", "1"), true)
			return id
		}
		whole := func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteData(id, message, true)
			return id
		}
		for range 6 {
			attack("trailers", trailers)
		}
		attack("trailers that were announced", trailers, "trailer", "x-sum")
		attack("an empty :authority", whole, ":authority", "")
		attack("a query of anything", whole, ":path", path+"?\xff <>#%|")
		attack("a path of anything", whole, ":path", "//a b/\xff")
		attack("names of one connection", whole, "proxy-authorization", "Basic x", "alt-svc", "clear", "trailer", "te")
		attack("bytes in a value", whole, "x-latin", "\xff\xfe\t\xe9")
		attack("every character of names", whole, "x!#$%&'*+.^_`|~9", "1")
		attack("a content-length that is too large", whole, "content-length", "1000")
		attack("a content-length that is too small", whole, "content-length", "1")
		attack("crumbs of cookies", whole, "cookie", "a=1", "cookie", "b=2")
		attack("two user agents", whole, "user-agent", "a", "user-agent", "b")
		attack("an odd content-type", whole, "content-type", "application/grpc")
		attack("a malformed timeout", whole, "grpc-timeout", "5 S")
		attack("bytes that are no message", func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteData(id, []byte{9, 9}, true)
			return id
		})

		nc := wiretest.DialRaw(t, p.H2C)
		_ = nc.SetDeadline(time.Now().Add(timeout))
		fmt.Fprintf(nc, "POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nConnection: close, content-type\r\n"+
			"Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n5\r\n%s\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n", path, message)
		if answer, err := io.ReadAll(nc); err != nil || !strings.Contains(string(answer), "200 OK") {
			t.Errorf("HTTP/1.1 got %q, %v", answer, err)
		}
		other.check("trailers of HTTP/1.1")
		if made, closed := s.made.Load(), s.closed.Load(); made != 1 || closed != 0 {
			t.Errorf("%d connections to the upstream, %d closed by it; want 1 and none", made, closed)
		}
	})
}

// falseOK: an upstream that forgets the content-type has answered nothing that a client could read.
func falseOK(t *testing.T) {
	up := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header()["Content-Type"] = nil
		_, _ = w.Write(wiretest.Message(nil))
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
	}))
	up.Config.Protocols = new(http.Protocols)
	up.Config.Protocols.SetUnencryptedHTTP2(true)
	up.Start()
	t.Cleanup(up.Close)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + up.Listener.Addr().String()})
	c := client(t, p.H2C)
	_, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty))
	if status.Code(err) != codes.Unknown || !strings.Contains(err.Error(), `content-type ""`) {
		t.Errorf("a unary call: %v, want UNKNOWN that names the content-type", err)
	}
	s, err := c.FullDuplexCall(within(t, timeout))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Unknown {
		t.Errorf("a stream: %v, want UNKNOWN", err)
	}
}

// apartServers lets a test be several clients, and lets large metadata in.
const apartServers = "trusted_proxies static 127.0.0.0/8\nmax_header_size 128KiB"

// rapidResets: one client opens streams and resets them at once, as fast as it can; the streams of others on the connection that
// all shared live on.
func rapidResets(t *testing.T) {
	realUpstreams(t, func(t *testing.T, s *shared) {
		p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + s.addr, Servers: apartServers})
		ctx := metadata.AppendToOutgoingContext(within(t, time.Minute), "x-forwarded-for", "192.0.2.2")
		other := standBy(ctx, t, p.H2C)
		wave := func(n int, wait bool) {
			c := wiretest.Dial(t, p.H2C, nil)
			fields := c.Request("/"+backendtest.Service+"/FullDuplexCall", "x-forwarded-for", "192.0.2.1")
			ids := make([]uint32, n)
			c.Batch(func() {
				for i := range ids {
					ids[i] = c.Open(fields, false)
					if !wait {
						c.WriteReset(ids[i], http2.ErrCodeCancel)
					}
				}
			})
			if wait {
				c.Barrier() // the calls have begun
				c.Batch(func() {
					for _, id := range ids {
						c.WriteReset(id, http2.ErrCodeCancel)
					}
				})
			}
			c.Barrier()
			other.check("during resets")
		}
		for range 6 {
			wave(20, true)
		}
		for range 4 {
			wave(40, false)
		}
		eventually(t, "the client has a connection of its own", func() bool {
			wave(1, true)
			return s.made.Load() > 1
		})
	})
}

// largeMetadata: calls with metadata for which nginx and HAProxy close the connection have one that nobody else's stream is on.
func largeMetadata(t *testing.T) {
	realUpstreams(t, func(t *testing.T, s *shared) {
		p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + s.addr, Servers: apartServers})
		other := standBy(within(t, time.Minute), t, p.H2C)
		var many []string
		for i := range 300 {
			many = append(many, fmt.Sprintf("x-%d", i), "v")
		}
		for what, more := range map[string][]string{
			"a path":      {":path", "/" + strings.Repeat("p", 20<<10) + "/M"},
			"a field":     {"x-large", strings.Repeat("!", 20<<10)},
			"many fields": many,
			"all of it":   slices.Concat(many, []string{"x-large", strings.Repeat("!", 40<<10)}),
		} {
			c := wiretest.Dial(t, p.H2C, nil)
			fields := c.Request(kinds[0].path())
			for i := 0; i < len(more); i += 2 {
				if more[i] == ":path" {
					fields[2].Value = more[i+1]
					continue
				}
				fields = append(fields, hpack.HeaderField{Name: more[i], Value: more[i+1]})
			}
			if h := c.Collect(c.Open(fields, true)); h.Get("grpc-status") == "" {
				t.Errorf("%s: %s %v", what, h.Sequence(), h.Head)
			}
			other.check(what)
		}
	})
	t.Run("limits", func(t *testing.T) {
		b := backendtest.Start(t, backendtest.Options{})
		p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + " {\nmax_metadata_bytes 4KiB\n}"})
		ctx := metadata.AppendToOutgoingContext(within(t, timeout), "x-large", strings.Repeat("v", 4<<10))
		_, err := client(t, p.H2C).EmptyCall(ctx, new(testgrpc.Empty))
		if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "max_metadata_bytes is 4096") {
			t.Errorf("%v, want RESOURCE_EXHAUSTED that names the limit", err)
		}
		if n := b.Calls().Total(); n != 0 {
			t.Errorf("the upstream has %d calls", n)
		}
	})
}
