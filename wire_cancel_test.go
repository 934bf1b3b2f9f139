package grpcproxy_test

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// cancelBound is what the tests allow; the product's own bound is 100 ms, and the figures are logged.
const cancelBound = time.Second

// "Cancellation: client RST, disconnect or deadline reaches the upstream as RST_STREAM(CANCEL) within 100 ms, and frees
// everything." Which code the client's RST_STREAM has makes no difference (semantics 3.5: "any code").
func TestWireCancel(t *testing.T) {
	r := newRig(t, rigOptions{Block: "max_conns 1"}) // a stalled upload would make another
	stages := []struct {
		name string
		call func(r *rig) *rpc
	}{
		{"before the head, request ended", func(r *rig) *rpc { return r.unary() }},
		{"before the head, request open", func(r *rig) *rpc { return r.streaming() }},
		{"before the head, inside a message of the request", func(r *rig) *rpc {
			c := r.open()
			c.client.WriteData(c.id, wiretest.Message([]byte("request"))[:7], false)
			c.take(0)
			c.got(7, false)
			return c
		}},
		{"after the head", func(r *rig) *rpc {
			c := r.unary()
			c.head()
			c.gotHead()
			return c
		}},
		{"between messages", func(r *rig) *rpc {
			c := r.streaming()
			c.head()
			c.message("response")
			c.gotHead()
			c.gotMessage("response")
			return c
		}},
		{"inside a message of the answer", func(r *rig) *rpc {
			c := r.streaming()
			c.head()
			c.up.WriteData(c.sid, wiretest.Message([]byte("response"))[:7], false)
			c.gotHead()
			c.client.ExpectOn(c.id, http2.FrameData)
			return c
		}},
		{"while the upstream does not read", func(r *rig) *rpc {
			r.ups[0].conn.HoldWindows(true)
			c := r.open()
			c.take(0)
			for range 10 {
				c.client.WriteData(c.id, make([]byte, 10<<10), false)
			}
			c.got(50<<10, false) // most of its window
			r.t.Cleanup(func() {
				c.up.HoldWindows(false)
				c.up.WriteWindowUpdate(0, 65535)
			})
			return c
		}},
		{"while the client does not read", func(r *rig) *rpc {
			r.client.HoldWindows(true)
			c := r.streaming()
			c.head()
			c.up.WriteData(c.sid, pattern(65535 - 5)[:16000], false)
			for range 3 {
				c.up.WriteData(c.sid, make([]byte, 16000), false)
			}
			c.client.ExpectOn(c.id, http2.FrameData)
			return c
		}},
	}
	ends := []struct {
		name string
		do   func(c *rpc)
	}{
		{"connection closed", func(c *rpc) { c.client.Close() }},
		{"connection aborted", func(c *rpc) { c.client.Abort() }},
	}
	for _, code := range []http2.ErrCode{http2.ErrCodeCancel, http2.ErrCodeNo, http2.ErrCodeInternal, http2.ErrCodeRefusedStream, 0x63} {
		ends = append(ends, struct {
			name string
			do   func(c *rpc)
		}{fmt.Sprintf("RST_STREAM(%v)", code), func(c *rpc) { c.client.WriteReset(c.id, code) }})
	}
	r.complete()
	var longest time.Duration
	for _, stage := range stages {
		for _, end := range ends {
			r.run(stage.name+"/"+end.name, func(t *testing.T, r *rig) {
				c := stage.call(r)
				start := time.Now()
				end.do(c)
				took := c.cancelled().Sub(start)
				if took > cancelBound {
					t.Errorf("the upstream heard of it after %v", took)
				}
				longest = max(longest, took)
			})
		}
	}
	t.Logf("the upstream heard of a cancellation after %v at most", longest)
	r.complete()
	if n := r.ups[0].Accepted(); n != 1 {
		t.Errorf("%d connections to the upstream, want 1: cancellations are the streams' business", n)
	}
}

// A client that gives up before the call has a connection leaves nothing behind: no call is sent for it later.
func TestWireCancelWaiting(t *testing.T) {
	var o rigOptions
	addr := rawUpstream(t, func(nc net.Conn) { _, _ = io.Copy(io.Discard, nc) })
	for _, gone := range []bool{false, true} {
		t.Run(fmt.Sprintf("connection closed %v", gone), func(t *testing.T) {
			o.Caddy.Site = "grpc_proxy " + addr + " {\ndial_timeout 30s\n}"
			r := newRig(t, o)
			id := r.client.Open(r.client.Request(wirePath), true)
			r.client.Barrier()
			start := time.Now()
			if gone {
				r.client.Close()
			} else {
				r.client.WriteReset(id, http2.ErrCodeCancel)
			}
			eventually(t, "the call's end is in the log", func() bool { return len(r.failures()) == 1 })
			if took := time.Since(start); took > cancelBound {
				t.Errorf("took %v", took)
			}
			if line := r.failures()[0]; line["status"] != "CANCELLED" || line["ended_by"] != "client" {
				t.Errorf("the log has %v", line)
			}
		})
	}
	t.Run("no call comes to stay", func(t *testing.T) {
		r := newRig(t, rigOptions{
			Block: "max_conns 1", Up: wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}},
		})
		busy := r.streaming()
		id := r.client.Open(r.client.Request("/test.Service/Cancelled"), true)
		r.client.Barrier()
		r.client.WriteReset(id, http2.ErrCodeCancel)
		r.client.Barrier()
		busy.answerOK()
		c := r.open()
		c.client.WriteData(c.id, nil, true)
		c.client.Barrier() // an answer before the server has read the request's end is another sequence of frames
		c.take(0)
		if c.req.Get(":path") != wirePath {
			// The call may have been about to be sent just then. It is followed by its cancellation.
			c.cancelled()
			c.take(0)
		}
		if got := c.req.Get(":path"); got != wirePath {
			t.Errorf("the upstream got the call %s, which was cancelled", got)
		}
		c.answerOK()
	})
}

// Semantics 3.5: "Downstream GOAWAY does not cancel": the client only opens no more streams.
func TestWireClientGoAway(t *testing.T) {
	r := newRig(t, rigOptions{})
	c := r.streaming()
	c.client.WriteGoAway(0, http2.ErrCodeNo, "")
	c.client.Barrier()
	c.head()
	c.gotHead()
	for i := range 3 {
		text := fmt.Sprint(i)
		c.message(text)
		c.gotMessage(text)
		c.client.WriteData(c.id, wiretest.Message([]byte(text)), false)
		c.got(6, false)
	}
	c.trailers()
	if got := c.client.Collect(c.id).Get("grpc-status"); got != "0" {
		t.Errorf("grpc-status %q", got)
	}
}

// A client that resets a stream whose answer it has in full has cancelled nothing.
func TestWireResetAfterEnd(t *testing.T) {
	r := newRig(t, rigOptions{})
	c := r.streaming()
	c.head()
	c.trailers()
	c.client.Collect(c.id)
	c.client.WriteReset(c.id, http2.ErrCodeCancel)
	if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeNo {
		t.Errorf("the upstream got RST_STREAM(%v), want NO_ERROR", code)
	}
	again := r.open("grpc-timeout", "x") // whose line follows
	again.result()
	eventually(t, "a call's end is in the log", func() bool { return len(r.failures()) > 0 })
	if line := r.failures()[0]; line["reason"] != "MALFORMED_TIMEOUT" {
		t.Errorf("the log has %v", line)
	}
}
