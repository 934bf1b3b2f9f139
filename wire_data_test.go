package grpcproxy_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// "Data is forwarded as it comes; nothing waits for a full buffer." Each step below happens only because the one before
// came through at once.
func TestWireFullDuplex(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.run("the client speaks first", func(_ *testing.T, r *rig) {
		c := r.open()
		c.client.WriteData(c.id, wiretest.Message([]byte("one")), false)
		c.take(0)
		c.got(8, false) // before END_STREAM, and before any answer
		c.head()
		c.gotHead() // before any message
		for i := range 20 {
			text := fmt.Sprintf("answer %d", i)
			c.message(text)
			c.gotMessage(text)
			c.client.WriteData(c.id, wiretest.Message([]byte(text)), false)
			if got := c.got(5+len(text), false); string(got) != string(wiretest.Message([]byte(text))) {
				r.t.Fatalf("the upstream got %q", got)
			}
		}
		c.client.WriteData(c.id, nil, true)
		c.got(0, true)
		c.trailers()
		c.ok()
	})
	r.run("the server speaks first", func(_ *testing.T, r *rig) {
		c := r.streaming() // the head alone
		c.head()
		c.gotHead()
		c.message("greeting")
		c.gotMessage("greeting")
		c.client.WriteData(c.id, wiretest.Message([]byte("late")), true)
		c.got(9, true)
		c.trailers()
		c.ok()
	})
	r.run("the client has ended long before", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.gotHead()
		for i := range 5 {
			c.message(fmt.Sprint(i))
			c.gotMessage(fmt.Sprint(i))
		}
		c.trailers()
		c.ok()
	})
}

// gRPC over HTTP/2: "DATA frame boundaries have no relation to Length-Prefixed-Message boundaries". Whatever the frames
// are, the bytes arrive, in both directions at once.
func TestWireDataSplits(t *testing.T) {
	r := newRig(t, rigOptions{})
	body := bytes.Join([][]byte{
		wiretest.Message(nil), pattern(1), pattern(20000), wiretest.Message(nil), pattern(300), pattern(70000), wiretest.Message(nil),
	}, nil)
	for _, tt := range []struct {
		name  string
		sizes func() func() int // of one DATA frame after the other
	}{
		{"bytes at the edges", func() func() int {
			n := 0
			return func() int {
				if n++; n < 40 {
					return 1
				}
				return 16384
			}
		}},
		{"random", func() func() int { return func() int { return 50 + rand.IntN(3000) } }},
		{"largest", func() func() int { return func() int { return 16384 } }},
	} {
		for _, padded := range []bool{false, true} {
			r.run(fmt.Sprintf("%s, padding %v", tt.name, padded), func(t *testing.T, r *rig) {
				body := body
				if padded {
					body = body[:5+6+20005+5+305] // padding does not wait for windows
				}
				write := func(conn *wiretest.Conn, id uint32) {
					size := tt.sizes()
					for rest := body; len(rest) > 0; {
						n := min(size(), len(rest), 16000)
						if padded {
							conn.WriteDataPadded(id, rest[:n], false, rand.IntN(50))
						} else {
							if n == 0 {
								conn.WriteData(id, nil, false) // zero-length DATA is allowed, within reason
							}
							_, _ = conn.SendData(t.Context(), id, rest[:n], false)
						}
						rest = rest[n:]
					}
				}
				c := r.streaming()
				c.head()
				done := make(chan struct{})
				go func() {
					defer close(done)
					write(c.client, c.id)
					c.client.WriteData(c.id, nil, true)
				}()
				write(c.up, c.sid)
				if h := c.up.Collect(c.sid); !bytes.Equal(h.Data, body) || !h.Ended {
					t.Errorf("the upstream got %d bytes of %d, %s", len(h.Data), len(body), dataOnce(h))
				}
				<-done
				c.trailers()
				if h := c.ok(); !bytes.Equal(h.Data, body) {
					t.Errorf("the client got %d bytes of %d", len(h.Data), len(body))
				}
			})
		}
	}
}

// Flow control works from end to end: a side that reads nothing holds up its own stream and no other.
func TestWireBackPressure(t *testing.T) {
	t.Run("client does not read", func(t *testing.T) {
		r := newRig(t, rigOptions{Client: wiretest.Options{HoldWindows: true}})
		c := r.streaming()
		c.head()
		sent := make(chan int, 1)
		go func() {
			n, _ := c.up.SendData(t.Context(), c.sid, pattern(8<<20), false)
			sent <- n
		}()
		c.client.ExpectOn(c.id, http2.FrameData)
		// Others go on meanwhile, on another client connection and the same upstream connection.
		other := *r
		other.client = wiretest.Dial(t, r.H2C, nil)
		for range 20 {
			other.complete()
		}
		c.client.WriteReset(c.id, http2.ErrCodeCancel)
		if n := <-sent; n > 4<<20 {
			t.Errorf("the proxy took %d bytes for a client that reads nothing", n)
		}
	})
	t.Run("upstream does not read", func(t *testing.T) {
		r := newRig(t, rigOptions{Block: "max_conns 1"})
		warm := r.unary()
		warm.answerOK()
		c := r.streaming()
		r.ups[0].conn.HoldWindows(true)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		sent := make(chan int, 1)
		go func() {
			n, _ := c.client.SendData(ctx, c.id, pattern(8<<20), false)
			sent <- n
		}()
		c.got(50<<10, false)
		defer crumbs(c.up)()
		// The stream has used up what it may of the upstream's connection window; others go on.
		c2 := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(wirePath), true)}
		c2.take(0)
		c2.head()
		c2.trailers()
		c2.ok()
		c.client.WriteReset(c.id, http2.ErrCodeCancel)
		if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
			t.Errorf("RST_STREAM(%v)", code)
		}
		cancel()
		if n := <-sent; n > 4<<20 {
			t.Errorf("the proxy took %d bytes for an upstream that reads nothing", n)
		}
	})
}

// gRPC over HTTP/2: "Request → Request-Headers *Length-Prefixed-Message EOS". Request trailers are no reason to fail, but
// servers take them for a violation, and close the connection that all clients share: they end here.
func TestWireRequestTrailers(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.run("after a message", func(t *testing.T, r *rig) {
		c := r.open()
		c.client.WriteData(c.id, wiretest.Message([]byte("request")), false)
		c.take(0)
		c.got(len(wiretest.Message([]byte("request"))), false)
		c.client.WriteHeaders(c.id, wiretest.Fields("x-sum", "abc"), true)
		if f := c.up.Next(c.sid); f.Type != http2.FrameData || f.Length != 0 || !f.EndStream() {
			t.Errorf("the upstream got %v, want an empty DATA frame with END_STREAM", f)
		}
		c.answerOK()
	})
	r.run("alone", func(t *testing.T, r *rig) {
		c := r.open()
		c.take(0)
		c.client.WriteHeaders(c.id, wiretest.Fields("x-sum", "abc"), true)
		if h := c.up.Collect(c.sid); h.Sequence() != "DATA+END_STREAM" || len(h.Data) != 0 {
			t.Errorf("the upstream got %s", h.Sequence())
		}
		c.answerOK()
	})
}
