package grpcproxy_test

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// Semantics 3.2: "Early end by server: trailers, then RST_STREAM(NO_ERROR), is success of that status." The proxy is on both
// sides of that rule: it takes such an end from the upstream, and makes one towards the client.
func TestWireEarlyEnd(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, reset := range []bool{false, true} {
		for _, status := range []string{"0", "8"} {
			name := fmt.Sprintf("/status %s, reset by the upstream %v", status, reset)
			r.run("trailers"+name, func(t *testing.T, r *rig) {
				c := r.streaming()
				c.client.WriteData(c.id, wiretest.Message([]byte("first")), false)
				c.got(10, false)
				c.up.Batch(func() {
					c.head()
					c.message("response")
					c.trailers("grpc-status", status, "x-trail", "1")
					if reset {
						c.up.WriteReset(c.sid, http2.ErrCodeNo)
					}
				})
				h := c.result()
				if h.Sequence() != "HEADERS DATA HEADERS+END_STREAM RST_STREAM(NO_ERROR)" {
					t.Errorf("frames %s", h.Sequence())
				}
				sameFields(t, h.Trailers, wiretest.Fields("grpc-status", status, "x-trail", "1"))
				if !reset {
					// "It does not need the rest of the request": not CANCEL, which would say that the call had failed.
					if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeNo {
						t.Errorf("the upstream got RST_STREAM(%v), want NO_ERROR", code)
					}
				}
			})
			r.run("Trailers-Only"+name, func(t *testing.T, r *rig) {
				c := r.streaming()
				c.up.Batch(func() {
					c.up.WriteHeaders(c.sid, wiretest.Head("grpc-status", status), true)
					if reset {
						c.up.WriteReset(c.sid, http2.ErrCodeNo)
					}
				})
				h := c.result()
				if h.Sequence() != "HEADERS+END_STREAM RST_STREAM(NO_ERROR)" {
					t.Errorf("frames %s", h.Sequence())
				}
				sameFields(t, h.Head, wiretest.Head("grpc-status", status))
			})
		}
	}
	// Whatever comes after the end of the answer changes nothing, a reset with an error code neither.
	r.run("trailers, then a reset with an error", func(t *testing.T, r *rig) {
		c := r.streaming()
		c.up.Batch(func() {
			c.head()
			c.trailers("grpc-status", "0")
			c.up.WriteReset(c.sid, http2.ErrCodeInternal)
		})
		if got := c.result().Get("grpc-status"); got != "0" {
			t.Errorf("grpc-status %q", got)
		}
	})
	r.complete()
}

// The upstream ends the call while the client is still sending, more than anybody reads: both sides are freed.
func TestWireEarlyEndWhileSending(t *testing.T) {
	r := newRig(t, rigOptions{Up: wiretest.Options{HoldWindows: true}})
	c := r.open()
	sent := make(chan error, 1)
	go func() {
		_, err := c.client.SendData(t.Context(), c.id, pattern(8<<20), true)
		sent <- err
	}()
	c.take(0)
	c.got(50<<10, false) // what it may take of the window is used up soon
	c.head()
	c.trailers("grpc-status", "8", "grpc-message", "enough")
	h := c.result()
	// What the client sent before it had read the reset is answered by one more; it has its status by then.
	if !strings.HasPrefix(h.Sequence(), "HEADERS HEADERS+END_STREAM RST_STREAM(NO_ERROR)") || h.Get("grpc-status") != "8" {
		t.Errorf("frames %s, %v", h.Sequence(), h.Trailers)
	}
	if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeNo {
		t.Errorf("the upstream got RST_STREAM(%v), want NO_ERROR", code)
	}
	if err := <-sent; err == nil {
		t.Error("the client could send it all")
	}
	r.ups[0].conn.HoldWindows(false)
	r.ups[0].conn.WriteWindowUpdate(0, 1<<20)
	r.complete()
}

// A client that ends its half without any message, and an answer without any: all that gRPC's framing allows.
func TestWireEmptyCall(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, onHead := range []bool{true, false} {
		r.run(fmt.Sprintf("END_STREAM on HEADERS %v", onHead), func(t *testing.T, r *rig) {
			c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(wirePath), onHead)}
			if !onHead {
				c.client.WriteData(c.id, nil, true)
			}
			c.take(0)
			if h := c.up.Collect(c.sid); !c.req.EndStream() && !h.Ended || len(h.Data) != 0 {
				t.Errorf("the upstream got %v %s", c.req, h.Sequence())
			}
			c.head()
			c.trailers()
			if got := c.result().Sequence(); got != "HEADERS HEADERS+END_STREAM" {
				t.Errorf("frames %s", got)
			}
		})
	}
}
