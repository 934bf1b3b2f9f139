package grpcproxy_test

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// "stream_idle_timeout ends one with a gRPC status": UNAVAILABLE, as trailers where the answer has begun.
func TestWireStreamIdleTimeout(t *testing.T) {
	const limit = 300 * time.Millisecond
	want := failure{code: codes.Unavailable, reason: "STREAM_IDLE_TIMEOUT", says: []string{"nothing moved on the stream for 300ms", "stream_idle_timeout"}}
	r := newRig(t, rigOptions{Block: "stream_idle_timeout 300ms"})
	took := func(t *testing.T, start time.Time, h *wiretest.Half) {
		t.Helper()
		d := h.Frames[len(h.Frames)-1].Time.Sub(start)
		t.Logf("ended after %v of silence, the limit is %v", d, limit)
		if d < limit || d > limit+2*time.Second {
			t.Errorf("ended after %v of silence", d)
		}
	}
	r.run("nothing at all", func(t *testing.T, r *rig) {
		start := time.Now()
		c := r.streaming()
		h := c.result()
		r.checkFailure(h, want)
		took(t, start, h)
		c.cancelled()
	})
	r.run("after messages", func(t *testing.T, r *rig) {
		c := r.streaming()
		c.head()
		c.gotHead()
		// Traffic in one direction is traffic: the stream lives well beyond the limit.
		for range 8 {
			<-time.After(limit / 4)
			c.message("response")
			c.gotMessage("response")
		}
		for range 8 {
			<-time.After(limit / 4)
			c.client.WriteData(c.id, wiretest.Message([]byte("request")), false)
			c.got(12, false)
		}
		start := time.Now()
		h := c.result()
		r.checkTrailers(h, "HEADERS+END_STREAM RST_STREAM(NO_ERROR)", want)
		took(t, start, h)
		c.cancelled()
	})
}

// "stream_timeout bounds its whole life", however busy the stream is. The upstream is not told a deadline.
func TestWireStreamTimeout(t *testing.T) {
	r := newRig(t, rigOptions{Block: "stream_timeout 300ms"})
	start := time.Now()
	c := r.streaming()
	if got := wiretest.Values(c.req.Fields, "grpc-timeout"); got != nil {
		t.Errorf("grpc-timeout %q", got)
	}
	c.head()
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
				c.message("response")
			}
		}
	}()
	h := c.client.Collect(c.id)
	took := time.Since(start)
	close(stop)
	<-done
	r.checkStatus(h.Trailers, failure{code: codes.Unavailable, reason: "STREAM_TIMEOUT", says: []string{"lasted longer", "stream_timeout 300ms"}})
	if took < 300*time.Millisecond || took > 2*time.Second {
		t.Errorf("took %v", took)
	}
	if len(h.Data)%13 != 0 || len(h.Data) == 0 {
		t.Errorf("the client got %d bytes: half a message", len(h.Data))
	}
	c.cancelled()
}

// "A silent stream lives for ever, and so does one whose client reads slowly: Caddy's idle cuts (read and write) are lifted
// per RPC" (semantics 3.16).
func TestWireSilentStream(t *testing.T) {
	const silence = 1800 * time.Millisecond // the server's limits are 1 s
	servers := "timeouts {\nread_body_idle 1s\nwrite_idle 1s\n}"
	t.Run("both silent", func(t *testing.T) {
		r := newRig(t, rigOptions{Caddy: proxytest.Options{Servers: servers}})
		c := r.streaming()
		before := r.streaming() // without a head so far
		c.head()
		c.message("one")
		c.gotHead()
		c.gotMessage("one")
		<-time.After(silence)
		c.client.WriteData(c.id, wiretest.Message([]byte("request")), false)
		c.got(12, false)
		c.message("two")
		c.gotMessage("two")
		c.client.WriteData(c.id, nil, true)
		c.got(0, true)
		c.trailers()
		c.ok()
		before.answerOK()
	})
	t.Run("client does not read", func(t *testing.T) {
		r := newRig(t, rigOptions{Caddy: proxytest.Options{Servers: servers}, Client: wiretest.Options{HoldWindows: true}})
		c := r.unary()
		c.head()
		body := pattern(300 << 10)
		sent := make(chan error, 1)
		go func() {
			_, err := c.up.SendData(t.Context(), c.sid, body, false)
			sent <- err
		}()
		c.gotHead()
		<-time.After(silence)
		r.client.HoldWindows(false)
		r.client.WriteWindowUpdate(0, 1<<20)
		r.client.WriteWindowUpdate(c.id, 1<<20)
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		c.trailers()
		if h := c.ok(); len(h.Data) != len(body) {
			t.Errorf("the client got %d bytes of %d", len(h.Data), len(body))
		}
	})
	t.Run("upstream does not read", func(t *testing.T) {
		r := newRig(t, rigOptions{Caddy: proxytest.Options{Servers: servers}, Up: wiretest.Options{HoldWindows: true}})
		c := r.open()
		body := pattern(200 << 10)
		sent := make(chan error, 1)
		go func() {
			_, err := c.client.SendData(t.Context(), c.id, body, true)
			sent <- err
		}()
		c.take(0)
		n := len(c.got(50<<10, false))
		<-time.After(silence)
		c.up.WriteWindowUpdate(0, 1<<20)
		c.up.WriteWindowUpdate(c.sid, 1<<20)
		c.got(len(body)-n, true)
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		c.answerOK()
	})
}
