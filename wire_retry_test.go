package grpcproxy_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// pattern is a message whose bytes tell their place.
func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return wiretest.Message(p)
}

// answerOK answers the call where it is and makes sure that the client gets one whole answer, as if nothing had happened.
func (c *rpc) answerOK() {
	c.r.t.Helper()
	c.head("x-lead", "1")
	c.message("response")
	c.trailers()
	h := c.ok()
	if got := dataOnce(h); strings.TrimSuffix(got, " RST_STREAM(NO_ERROR)") != "HEADERS DATA HEADERS+END_STREAM" {
		c.r.t.Errorf("frames %s", got)
	}
	sameFields(c.r.t, h.Head, wiretest.Head("x-lead", "1"))
	if string(h.Data) != string(wiretest.Message([]byte("response"))) {
		c.r.t.Errorf("got %q", h.Data)
	}
}

// got waits for n bytes of the request at the upstream, and END_STREAM if end is set.
func (c *rpc) got(n int, end bool) []byte {
	c.r.t.Helper()
	var p []byte
	for {
		if len(p) >= n && !end {
			return p
		}
		f := c.up.ExpectOn(c.sid, http2.FrameData)
		p = append(p, f.Data...)
		if f.EndStream() {
			if !end || len(p) != n {
				c.r.t.Errorf("the request ended after %d bytes", len(p))
			}
			return p
		}
	}
}

// RFC 9113 section 6.8: "streams with identifiers higher than the last stream identifier … were not or will not be
// processed". Semantics 3.2: "GOAWAY with last-id below the stream → transparently retriable". The client sees one answer.
func TestWireGoAwayReplay(t *testing.T) {
	body := append(pattern(3000), pattern(40000)...)
	for _, tt := range []struct {
		name      string
		upstreams int
	}{{"to a new connection", 1}, {"to another upstream", 2}} {
		r := newRig(t, rigOptions{Upstreams: tt.upstreams, Block: "lb_policy first"})
		last := tt.upstreams - 1
		goAway := func(c *rpc) {
			c.up.WriteGoAway(0, http2.ErrCodeNo, "")
			r.ups[0].drop()
			first := c.req
			c.take(last)
			sameFields(t, c.req.Fields, first.Fields)
		}
		r.run(tt.name+"/request sent whole", func(t *testing.T, r *rig) {
			c := r.open("x-many", "b", "x-many", "a")
			if _, err := c.client.SendData(t.Context(), c.id, body, true); err != nil {
				t.Fatal(err)
			}
			c.take(0)
			c.got(len(body), true)
			goAway(c)
			if got := c.got(len(body), true); !bytes.Equal(got, body) {
				t.Errorf("the replayed request has %d bytes and differs from the original", len(got))
			}
			c.answerOK()
		})
		r.ups[last].drop()
		if last != 0 {
			return
		}
		r = newRig(t, rigOptions{Upstreams: tt.upstreams, Block: "lb_policy first"})
		r.run(tt.name+"/request open", func(t *testing.T, r *rig) {
			c := r.open()
			if _, err := c.client.SendData(t.Context(), c.id, body, false); err != nil {
				t.Fatal(err)
			}
			c.take(0)
			c.got(len(body), false)
			goAway(c)
			if got := c.got(len(body), false); !bytes.Equal(got, body) {
				t.Errorf("the replayed request differs from the original")
			}
			more := pattern(500)
			c.client.WriteData(c.id, more, true)
			if got := c.got(len(more), true); !bytes.Equal(got, more) {
				t.Errorf("after the replay came %q", got)
			}
			c.answerOK()
		})
		r.ups[last].drop()
	}
}

// Streams up to GOAWAY's last identifier go on to their end; later calls use a new connection.
func TestWireGoAwayGraceful(t *testing.T) {
	r := newRig(t, rigOptions{})
	c := r.unary()
	c.up.WriteGoAway(1<<31-1, http2.ErrCodeNo, "")
	c.up.Barrier()
	r.ups[0].drop()
	r.complete()
	c.up.WriteGoAway(c.sid, http2.ErrCodeNo, "")
	c.answerOK()
	if n := r.ups[0].Accepted(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
}

// RFC 9113 section 8.7: REFUSED_STREAM "guarantees that a request has not been processed"; gRFC A6: such a call is sent
// again, once, at once.
func TestWireRefused(t *testing.T) {
	body := pattern(2000)
	send := func(t *testing.T, r *rig) *rpc {
		c := r.open("grpc-timeout", "4S")
		c.client.WriteData(c.id, body, true)
		c.take(0)
		if got := c.got(len(body), true); !bytes.Equal(got, body) {
			t.Error("the request differs from what was sent")
		}
		return c
	}
	r := newRig(t, rigOptions{Upstreams: 2, Block: "lb_policy first"})
	r.run("retried elsewhere", func(t *testing.T, r *rig) {
		c := send(t, r)
		first := c.req.Get("grpc-timeout")
		c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
		c.take(1)
		if got := c.got(len(body), true); !bytes.Equal(got, body) {
			t.Error("the replayed request differs")
		}
		// gRFC A6: "grpc-previous-rpc-attempts" does not count transparent retries.
		if got := wiretest.Values(c.req.Fields, "grpc-previous-rpc-attempts"); got != nil {
			t.Errorf("grpc-previous-rpc-attempts: %q", got)
		}
		// "Upstream header = remaining time, recomputed per attempt."
		was, err1 := grpcwire.ParseTimeout(first)
		now, err2 := grpcwire.ParseTimeout(c.req.Get("grpc-timeout"))
		if err1 != nil || err2 != nil || now > was || now <= 0 {
			t.Errorf("grpc-timeout %q and then %q", first, c.req.Get("grpc-timeout"))
		}
		c.answerOK()
	})
	r.run("refused by all", func(t *testing.T, r *rig) {
		c := send(t, r)
		c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
		// "An upstream that refuses the stream before processing it is skipped within the same RPC."
		c.take(1)
		c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
		// That was the once more. A fleet that refuses is not to get more calls for that.
		r.checkFailure(c.result(), failure{
			code: codes.Unavailable, reason: "UPSTREAM_STREAM_RESET", attempts: 2,
			says: []string{"all 2 attempts failed", "REFUSED_STREAM", "did not process the call"},
		})
	})
	many := newRig(t, rigOptions{Upstreams: 5, Block: "lb_policy first"})
	many.run("refused by two of many", func(t *testing.T, r *rig) {
		c := send(t, r)
		c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
		c.take(1)
		c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
		r.checkFailure(c.result(), failure{
			code: codes.Unavailable, reason: "UPSTREAM_STREAM_RESET", attempts: 2,
			says: []string{"all 2 attempts failed", "REFUSED_STREAM"},
		})
	})
	many.run("shut out by all but the last", func(t *testing.T, r *rig) {
		c := send(t, r)
		for i := range 4 {
			c.up.WriteGoAway(0, http2.ErrCodeNo, "")
			r.ups[i].drop()
			c.take(i + 1)
			if got := c.got(len(body), true); !bytes.Equal(got, body) {
				t.Error("the replayed request differs")
			}
		}
		c.answerOK()
	})
	one := newRig(t, rigOptions{})
	one.run("one upstream, again", func(t *testing.T, r *rig) {
		c := send(t, r)
		c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
		c.take(0)
		if got := c.got(len(body), true); !bytes.Equal(got, body) {
			t.Error("the replayed request differs")
		}
		c.answerOK()
	})
	one.run("one upstream, again and again", func(t *testing.T, r *rig) {
		c := send(t, r)
		c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
		c.take(0)
		c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
		r.checkFailure(c.result(), failure{
			code: codes.Unavailable, reason: "UPSTREAM_STREAM_RESET", attempts: 2, says: []string{"REFUSED_STREAM"},
		})
	})
}

// The replay buffer holds 64 KiB; "a larger body is not replayed but fails UNAVAILABLE".
func TestWireReplayLimit(t *testing.T) {
	for _, tt := range []struct {
		name   string
		size   int
		replay bool
	}{
		{"less than 64 KiB", 64<<10 - 5 - 1, true},
		{"more than 64 KiB", 64<<10 - 5 + 1, false},
		{"200 KiB", 200 << 10, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, rigOptions{Upstreams: 2, Block: "lb_policy first"})
			body := pattern(tt.size)
			c := r.open()
			sent := make(chan error, 1)
			go func() {
				_, err := c.client.SendData(t.Context(), c.id, body, false)
				sent <- err
			}()
			c.take(0)
			if got := c.got(len(body), false); !bytes.Equal(got, body) {
				t.Error("the request differs from what was sent")
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
			if tt.replay {
				c.take(1)
				if got := c.got(len(body), false); !bytes.Equal(got, body) {
					t.Error("the replayed request differs")
				}
				c.answerOK()
				return
			}
			r.checkFailure(c.result(), failure{
				code: codes.Unavailable, reason: "UPSTREAM_STREAM_RESET", says: []string{"REFUSED_STREAM"},
			})
			if n := r.ups[1].Accepted(); n != 0 {
				t.Error("the call was sent again, though its beginning was gone")
			}
		})
	}
}

// A replay meets flow control like any request. What the next upstream does, or the client, counts at once all the same.
func TestWireReplayBlocked(t *testing.T) {
	small := wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 100}}, HoldWindows: true}
	r := newRig(t, rigOptions{Upstreams: 2, Block: "lb_policy first", Up: small})
	body := pattern(2000)
	blocked := func(r *rig, end bool, metadata ...string) *rpc {
		c := r.open(metadata...)
		c.client.WriteData(c.id, body, end)
		c.take(0)
		c.got(100, false)
		c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
		c.take(1)
		c.got(100, false)
		return c
	}
	for _, end := range []bool{true, false} {
		name := fmt.Sprintf("/request ended %v", end)
		r.run("window comes"+name, func(t *testing.T, r *rig) {
			c := blocked(r, end)
			c.up.WriteWindowUpdate(c.sid, 10000)
			c.got(len(body)-100, end)
			c.answerOK()
		})
		r.run("answered early"+name, func(_ *testing.T, r *rig) {
			c := blocked(r, end)
			c.answerOK()
			if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeNo {
				t.Errorf("RST_STREAM(%v), want NO_ERROR", code)
			}
		})
		r.run("client cancels"+name, func(_ *testing.T, r *rig) {
			c := blocked(r, end)
			c.client.WriteReset(c.id, http2.ErrCodeCancel)
			if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
				t.Errorf("RST_STREAM(%v), want CANCEL", code)
			}
		})
		r.run("deadline"+name, func(_ *testing.T, r *rig) {
			c := blocked(r, end, "grpc-timeout", "300m")
			r.checkFailure(c.result(), failure{code: codes.DeadlineExceeded, reason: "DEADLINE_AT_PROXY", attempts: 2})
			if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
				t.Errorf("RST_STREAM(%v), want CANCEL", code)
			}
		})
		r.run("reset"+name, func(_ *testing.T, r *rig) {
			c := blocked(r, end)
			c.up.WriteReset(c.sid, http2.ErrCodeInternal)
			r.checkFailure(c.result(), failure{code: codes.Internal, reason: "UPSTREAM_STREAM_RESET", attempts: 2})
		})
	}
}

// gRFC A6: "the RPC is committed when the client receives Response-Headers". Nothing is sent again from then on.
func TestWireCommitted(t *testing.T) {
	r := newRig(t, rigOptions{Upstreams: 2, Block: "lb_policy first"})
	r.run("refused after the head", func(_ *testing.T, r *rig) {
		c := r.streaming()
		c.head()
		c.gotHead()
		c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
		r.checkTrailers(c.result(), "HEADERS+END_STREAM RST_STREAM(NO_ERROR)", failure{
			code: codes.Unavailable, reason: "UPSTREAM_STREAM_RESET", says: []string{"REFUSED_STREAM"},
		})
	})
	r.run("shut out by GOAWAY after the head", func(_ *testing.T, r *rig) {
		c := r.streaming()
		c.head()
		c.gotHead()
		c.up.WriteGoAway(0, http2.ErrCodeNo, "")
		r.ups[0].drop()
		r.checkTrailers(c.result(), "HEADERS+END_STREAM RST_STREAM(NO_ERROR)", failure{
			code: codes.Unavailable, reason: "UPSTREAM_GOAWAY", says: []string{"shutting down", "did not process"},
		})
	})
	if n := r.ups[1].Accepted(); n != 0 {
		t.Error("a committed call was sent again")
	}
}
