package grpcproxy_test

import (
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// Semantics 3.4: "Upstream header = remaining time", in whatever unit; never more than what the client gave.
func TestWireTimeoutForwarded(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, v := range []string{"5S", "5000m", "5000000u", "99999999u", "10M", "1H", "48H", "99999999H", "00000005S"} {
		r.run(v, func(t *testing.T, r *rig) {
			c := r.unary("grpc-timeout", v)
			all := wiretest.Values(c.req.Fields, "grpc-timeout")
			if len(all) != 1 {
				t.Fatalf("grpc-timeout %q", all)
			}
			was, err := grpcwire.ParseTimeout(v)
			if err != nil {
				t.Fatal(err)
			}
			left, err := grpcwire.ParseTimeout(all[0])
			if err != nil {
				t.Fatal(err)
			}
			if left > was || was-left > 2*time.Second {
				t.Errorf("grpc-timeout %s was sent on as %s", v, all[0])
			}
			c.answerOK()
		})
	}
	r.run("none", func(t *testing.T, r *rig) {
		c := r.unary()
		if got := wiretest.Values(c.req.Fields, "grpc-timeout"); got != nil {
			t.Errorf("grpc-timeout %q out of nowhere", got)
		}
		c.answerOK()
	})
}

// What a call waits in the queue for a stream comes off the time that the upstream is given.
func TestWireTimeoutAfterQueue(t *testing.T) {
	r := newRig(t, rigOptions{
		Block: "max_conns 1", Up: wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}},
	})
	first := r.unary()
	waiting := r.open("grpc-timeout", "10S")
	waiting.client.WriteData(waiting.id, wiretest.Message([]byte("request")), true)
	waiting.client.Barrier()
	arrived := time.Now()
	eventually(t, "a second passes", func() bool { return time.Since(arrived) > time.Second })
	first.answerOK()
	waiting.take(0)
	left, err := grpcwire.ParseTimeout(waiting.req.Get("grpc-timeout"))
	if err != nil || left > 9500*time.Millisecond {
		t.Errorf("after a second in the queue, %v are left of 10s (%v)", left, err)
	}
	waiting.answerOK()
}

// gRFC A31: "Effective deadline = min(client's, route's max_timeout)".
func TestWireMaxTimeout(t *testing.T) {
	r := newRig(t, rigOptions{Block: "max_timeout 3s"})
	for _, tt := range []struct {
		name string
		sent []string
		want time.Duration
	}{
		{"adds", nil, 3 * time.Second},
		{"caps", []string{"grpc-timeout", "1H"}, 3 * time.Second},
		{"leaves what is shorter", []string{"grpc-timeout", "2S"}, 2 * time.Second},
	} {
		r.run(tt.name, func(t *testing.T, r *rig) {
			c := r.unary(tt.sent...)
			left, err := grpcwire.ParseTimeout(c.req.Get("grpc-timeout"))
			if err != nil || left > tt.want || tt.want-left > time.Second {
				t.Errorf("grpc-timeout %q (%v), want a little less than %v", c.req.Get("grpc-timeout"), err, tt.want)
			}
			c.answerOK()
		})
	}
	short := newRig(t, rigOptions{Block: "max_timeout 150ms"})
	short.run("is enforced", func(_ *testing.T, r *rig) {
		c := r.unary()
		r.checkFailure(c.result(), failure{code: codes.DeadlineExceeded, reason: "DEADLINE_AT_PROXY", says: []string{"deadline"}})
		c.cancelled()
	})
}

// cancelled waits for RST_STREAM(CANCEL) at the upstream and returns the time it came.
func (c *rpc) cancelled() time.Time {
	c.r.t.Helper()
	f := c.up.ExpectOn(c.sid, http2.FrameRSTStream)
	if f.Code != http2.ErrCodeCancel {
		c.r.t.Errorf("the upstream got RST_STREAM(%v), want CANCEL", f.Code)
	}
	return f.Time
}

// "Malformed: grpc-go's server answers with grpc-status 13, "malformed grpc-timeout"; do the same with HTTP 200."
func TestWireTimeoutMalformed(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, v := range []string{"", "5", "S", "-1S", "1.5S", "123456789S", "5x", "5s", "5 S", "0x5S", "5SS", "٥S"} {
		r.run(fmt.Sprintf("%q", v), func(_ *testing.T, r *rig) {
			r.fails(failure{code: codes.Internal, reason: "MALFORMED_TIMEOUT", attempts: -1, says: []string{"malformed grpc-timeout"}}, "grpc-timeout", v)
		})
	}
	if n := r.ups[0].Accepted(); n != 0 {
		t.Error("the upstream was connected to")
	}
}

const (
	shortTimeout = 250 * time.Millisecond
	shortHeader  = "250m"
)

// inTime makes sure that something happened at the deadline, not before it and not long after.
func inTime(t *testing.T, start, at time.Time) {
	t.Helper()
	took := at.Sub(start)
	t.Logf("ended after %v of %v", took, shortTimeout)
	if took < shortTimeout || took > shortTimeout+2*time.Second {
		t.Errorf("ended after %v, the deadline was %v", took, shortTimeout)
	}
}

// "At expiry: DEADLINE_EXCEEDED downstream, RST CANCEL upstream", wherever the call is.
func TestWireDeadline(t *testing.T) {
	want := failure{code: codes.DeadlineExceeded, reason: "DEADLINE_AT_PROXY", says: []string{"the deadline ran out at the proxy"}}
	r := newRig(t, rigOptions{})
	last := func(h *wiretest.Half) time.Time { return h.Frames[len(h.Frames)-1].Time }
	r.run("before the head, unary", func(t *testing.T, r *rig) {
		start := time.Now()
		c := r.unary("grpc-timeout", shortHeader)
		h := c.result()
		r.checkFailure(h, want)
		inTime(t, start, last(h))
		c.cancelled()
	})
	r.run("before the head, request open", func(t *testing.T, r *rig) {
		start := time.Now()
		c := r.streaming("grpc-timeout", shortHeader)
		h := c.result()
		r.checkFailure(h, want)
		inTime(t, start, last(h))
		c.cancelled()
	})
	r.run("after the head", func(t *testing.T, r *rig) {
		start := time.Now()
		c := r.unary("grpc-timeout", shortHeader)
		c.head()
		c.gotHead()
		h := c.result()
		r.checkTrailers(h, "HEADERS+END_STREAM", want)
		inTime(t, start, last(h))
		c.cancelled()
	})
	r.run("after a message", func(t *testing.T, r *rig) {
		start := time.Now()
		c := r.streaming("grpc-timeout", shortHeader)
		c.head()
		c.message("response")
		h := c.result()
		r.checkTrailers(h, "HEADERS DATA HEADERS+END_STREAM RST_STREAM(NO_ERROR)", want)
		inTime(t, start, last(h))
		c.cancelled()
	})
	r.run("inside a message", func(t *testing.T, r *rig) {
		start := time.Now()
		c := r.unary("grpc-timeout", shortHeader)
		c.head()
		c.up.WriteData(c.sid, wiretest.Message([]byte("response"))[:8], false)
		h := c.result()
		if h.Sequence() != "HEADERS DATA RST_STREAM(INTERNAL_ERROR)" {
			t.Errorf("frames %s", h.Sequence())
		}
		inTime(t, start, last(h))
		c.cancelled()
	})
	r.run("no time at all", func(_ *testing.T, r *rig) {
		c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(wirePath, "grpc-timeout", "0n"), true)}
		h := c.result()
		if got := h.Get("grpc-status"); got != "4" || !trailersOnly(h) {
			r.t.Errorf("grpc-status %q, %s", got, h.Sequence())
		}
	})
}

func TestWireDeadlineWaiting(t *testing.T) {
	want := failure{code: codes.DeadlineExceeded, reason: "DEADLINE_AT_PROXY", says: []string{"deadline"}}
	call := func(t *testing.T, r *rig) {
		t.Helper()
		start := time.Now()
		c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(wirePath, "grpc-timeout", shortHeader), true)}
		h := c.result()
		r.checkFailure(h, want)
		inTime(t, start, h.Frames[0].Time)
	}
	t.Run("for a connection", func(t *testing.T) {
		addr := rawUpstream(t, func(nc net.Conn) { _, _ = io.Copy(io.Discard, nc) })
		r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "grpc_proxy " + addr}})
		for range 4 { // it is a race between two timers that may not be lost
			call(t, r)
		}
	})
	t.Run("for a stream", func(t *testing.T) {
		r := newRig(t, rigOptions{
			Block: "max_conns 1", Up: wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}},
		})
		busy := r.streaming()
		for range 4 {
			call(t, r)
		}
		busy.answerOK()
		r.complete() // nothing is left in the queue
	})
	t.Run("for another round of trying", func(t *testing.T) {
		r := newRig(t, rigOptions{Block: "lb_try_duration 1m\nlb_try_interval 10s"})
		r.ups[0].Close()
		start := time.Now()
		c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(wirePath, "grpc-timeout", shortHeader), true)}
		h := c.result()
		if got := h.Get("grpc-status"); got != "4" || !trailersOnly(h) {
			t.Errorf("grpc-status %q (%s), %s", got, h.Get("grpc-message"), h.Sequence())
		}
		inTime(t, start, h.Frames[0].Time)
	})
}

// Neither side's windows can hold a deadline up.
func TestWireDeadlineBlocked(t *testing.T) {
	t.Run("the client does not read", func(t *testing.T) {
		r := newRig(t, rigOptions{Client: wiretest.Options{HoldWindows: true}})
		data := pattern(4 << 20) // made before the clock starts: the race detector takes its time for it
		start := time.Now()
		c := r.unary("grpc-timeout", shortHeader)
		c.head()
		_, _ = c.up.SendData(t.Context(), c.sid, data, false) // returns when the stream is reset
		inTime(t, start, c.cancelled())
		// No window, so no status could be put behind the data: the stream ends by a reset, and the connection lives.
		h := c.result()
		if !h.Reset || h.Ended {
			t.Errorf("frames %s, want a reset", dataOnce(h))
		}
		t.Logf("the client got %s", dataOnce(h))
		r.client.HoldWindows(false)
		r.client.WriteWindowUpdate(0, 1<<20)
		r.complete()
	})
	t.Run("the upstream does not read", func(t *testing.T) {
		r := newRig(t, rigOptions{Up: wiretest.Options{HoldWindows: true}})
		data := pattern(8 << 20)
		start := time.Now()
		c := r.open("grpc-timeout", shortHeader)
		sent := make(chan error, 1)
		go func() {
			_, err := c.client.SendData(t.Context(), c.id, data, true)
			sent <- err
		}()
		c.take(0)
		h := c.result()
		if h.Get("grpc-status") != "4" {
			t.Errorf("%v", h.Head)
		}
		i := slices.IndexFunc(h.Frames, func(f wiretest.Frame) bool { return f.Type == http2.FrameHeaders })
		inTime(t, start, h.Frames[i].Time)
		c.cancelled()
		if err := <-sent; err == nil {
			t.Error("all of the request was taken")
		}
	})
}

// "If own deadline has passed DEADLINE_EXCEEDED": an upstream that counts the same deadline cancels at the same moment. Who
// is first makes no difference to the client.
func TestWireDeadlineRace(t *testing.T) {
	r := newRig(t, rigOptions{})
	for i := range 20 {
		timeout := time.Duration(20+i) * time.Millisecond
		c := r.unary("grpc-timeout", fmt.Sprintf("%dm", timeout.Milliseconds()))
		if i%2 == 0 {
			c.head()
		}
		left, err := grpcwire.ParseTimeout(c.req.Get("grpc-timeout"))
		if err != nil {
			t.Fatal(err)
		}
		<-time.After(left)
		c.up.WriteReset(c.sid, http2.ErrCodeCancel)
		h := c.result()
		if got := h.Get("grpc-status"); got != "4" {
			t.Errorf("grpc-status %q %q", got, h.Get("grpc-message"))
		}
	}
	// Before the deadline it is a cancellation, and the upstream's own.
	c := r.unary("grpc-timeout", "10S")
	c.up.WriteReset(c.sid, http2.ErrCodeCancel)
	r.checkFailure(c.result(), failure{code: codes.Canceled, reason: "UPSTREAM_STREAM_RESET", says: []string{"CANCEL"}})
	// The upstream's own word counts as it is.
	c = r.unary("grpc-timeout", "10S")
	c.up.WriteHeaders(c.sid, wiretest.Head("grpc-status", "4", "grpc-message", "too%20slow"), true)
	sameFields(t, c.result().Head, wiretest.Head("grpc-status", "4", "grpc-message", "too%20slow"))
}
