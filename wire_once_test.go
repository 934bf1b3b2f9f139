package grpcproxy_test

import (
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// gRFC A6, transparent retries: a call may be sent again without being asked for only if no server has seen it. The upstream reads
// nothing for a while, so that a call waits in the proxy behind what the socket does not take. Then it breaks a rule, and
// reads on: the call goes to the other upstream, or fails, but is not seen by both.
func TestWireCallIsSeenOnce(t *testing.T) {
	const message = "charge the card"
	r := newRig(t, rigOptions{Upstreams: 2, Block: "lb_policy first", Up: wiretest.Options{HoldWindows: true, DiscardData: true}})
	bulk := r.open()
	bulk.take(0)
	first := bulk.up
	first.Pause()
	_ = first.NetConn().(*net.TCPConn).SetReadBuffer(128 << 10)
	first.WriteWindowUpdate(0, 1<<30)
	first.WriteWindowUpdate(bulk.sid, 1<<30)
	var sent atomic.Int64
	uploading := make(chan struct{})
	go func() { // until the connection is over
		defer close(uploading)
		chunk := make([]byte, 64<<10)
		for range 1000 {
			if _, err := bulk.client.SendData(t.Context(), bulk.id, chunk, false); err != nil {
				return
			}
			sent.Add(int64(len(chunk)))
		}
	}()
	var last int64
	for same := 0; same < 20; time.Sleep(2 * time.Millisecond) { // the upload has come to a halt; if not, the test proves less
		if now := sent.Load(); now != last {
			last, same = now, 0
		} else if same++; now == 0 {
			same = 0
		}
	}
	other := *r
	other.client = wiretest.Dial(t, r.H2C, nil)
	c := other.open()
	c.client.WriteData(c.id, wiretest.Message([]byte(message)), true)
	eventually(t, "the call is at the first upstream", func() bool {
		return upstream.LoadOf(upstream.Address{Network: "tcp", Dial: r.ups[0].Addr()}).Active() == 2
	})
	first.WriteFrame(http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, bulk.sid, []byte{0, 0, 0, 2})
	ended := make(chan *wiretest.Half, 1)
	go func() { ended <- c.client.CollectAll(c.id) }()
	seen := make(chan uint32, 1)
	go r.ups[1].Serve(func(up *wiretest.Conn) {
		f := up.ExpectHeaders()
		up.WriteHeaders(f.Stream, wiretest.Head(), false)
		up.WriteHeaders(f.Stream, wiretest.Fields("grpc-status", "0"), true)
		seen <- f.Stream
	})
	h := <-ended
	first.Resume()
	first.ExpectClosed()
	before := false
	for id := bulk.sid + 2; id < bulk.sid+20; id += 2 {
		before = before || len(first.Untaken(id)) > 0
	}
	status := h.Get("grpc-status")
	t.Logf("grpc-status %s, seen by the first upstream: %t; %d KiB were on their way", status, before, last>>10)
	if status != "0" && status != "14" {
		t.Errorf("grpc-status %q, want OK or UNAVAILABLE", status)
	}
	if status == "0" && before {
		t.Error("both upstreams have seen the call")
	}
	r.client.Close()
	<-uploading
}
