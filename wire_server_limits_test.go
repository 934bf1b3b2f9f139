package grpcproxy_test

import (
	"fmt"
	"io"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// "write": the server's limit for a whole answer cuts streams, too. It is not the client that ends them.
func TestWireWriteTimeout(t *testing.T) {
	limited := func(t *testing.T, limit string) *rig {
		t.Helper()
		return newRig(t, rigOptions{Caddy: proxytest.Options{AccessLog: true, Servers: "timeouts {\nwrite " + limit + "\n}"}})
	}
	check := func(t *testing.T, r *rig, n int, status, reason, endedBy string) {
		t.Helper()
		got := r.accessLog(n)
		for k, want := range map[string]any{"grpc_status": status, "grpc_reason": reason, "grpc_ended_by": endedBy} {
			if got[k] != want {
				t.Errorf("%s is %v, want %v", k, got[k], want)
			}
		}
	}
	t.Run("HTTP/2", func(t *testing.T) {
		r := limited(t, "900ms")
		r.complete()            // now there is a connection
		before := r.streaming() // nothing was answered
		c := r.streaming()
		c.head()
		c.message("one")
		for _, c := range []*rpc{before, c} {
			if code := c.client.ExpectReset(c.id); code != http2.ErrCodeInternal {
				t.Errorf("the client got RST_STREAM(%v)", code)
			}
			c.cancelled()
		}
		check(t, r, 3, "INTERNAL", "SERVER_WRITE_TIMEOUT", "proxy")
	})
	t.Run("HTTP/1", func(t *testing.T) {
		const limit = 300 * time.Millisecond
		r := limited(t, limit.String())
		nc := wiretest.DialRaw(t, r.H2C)
		message := wiretest.Message([]byte("request"))
		if _, err := fmt.Fprintf(nc, "POST %s HTTP/1.1\r\nHost: api.example.com\r\nContent-Type: application/grpc\r\nContent-Length: %d\r\n\r\n%s",
			wirePath, len(message), message); err != nil {
			t.Fatal(err)
		}
		c := &rpc{r: r}
		c.take(0)
		c.got(len(message), true)
		<-time.After(limit)
		c.head()
		c.message("late")
		c.trailers()
		_ = nc.SetReadDeadline(time.Now().Add(timeout))
		if _, err := io.ReadAll(nc); err != nil {
			t.Error(err)
		}
		check(t, r, 1, "INTERNAL", "SERVER_WRITE_TIMEOUT", "proxy")
	})
	t.Run("client cancels", func(t *testing.T) {
		r := limited(t, "1m")
		c := r.streaming()
		c.client.WriteReset(c.id, http2.ErrCodeCancel)
		c.cancelled()
		check(t, r, 1, "CANCELLED", "CLIENT_GONE", "client")
	})
}
