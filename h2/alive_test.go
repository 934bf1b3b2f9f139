package h2

import (
	"context"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// A peer that answers nothing is not alive, and is not pinged again before it has said something. Whatever it sends is a sign
// of life. RFC 9113 section 6.7: "Receivers of a PING frame that does not include an ACK flag MUST send a PING frame with the
// ACK flag set".
func TestAlive(t *testing.T) {
	c, p := clientAgainst(t, Config{}, wiretest.Options{NoPingAck: true})
	until(t, "the peer's SETTINGS and acknowledgement", func() bool { st := c.Stats(); return st.PeerSettings && st.SettingsAcked })
	ask := func(until func()) (alive, known bool) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan struct{})
		go func() {
			defer close(done)
			if until != nil {
				until()
				cancel()
			}
		}()
		alive, known = c.Alive(ctx)
		<-done
		return alive, known
	}
	if alive, known := ask(func() { p.ExpectPing() }); alive || !known {
		t.Errorf("no answer: alive %v, known %v", alive, known)
	}
	if alive, known := ask(func() {}); alive || !known || c.pingSeq != 1 {
		t.Errorf("still no answer: alive %v, known %v, after %d PINGs", alive, known, c.pingSeq)
	}
	heard := c.lastRead.Load()
	p.WriteWindowUpdate(0, 1)
	until(t, "the peer's frame", func() bool { return c.lastRead.Load() > heard })
	answer := func() {
		f := p.ExpectPing()
		p.WritePing(true, [8]byte(f.Data))
	}
	ask2 := func() (alive, known bool) {
		go answer()
		return c.Alive(testContext(t))
	}
	if alive, known := ask2(); !alive || !known {
		t.Errorf("answered: alive %v, known %v", alive, known)
	}
	c.Close(NoError, "")
	wait(t, c.Done())
	if _, known := c.Alive(testContext(t)); known {
		t.Error("known of a connection that is over")
	}
}

// gRFC A8: servers of gRPC close connections that ping them more than twice without an answer of theirs in between.
func TestAliveAsksSeldom(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	for range 2 {
		for range maxProbes {
			if alive, known := c.Alive(testContext(t)); !alive || !known {
				t.Errorf("alive %v, known %v", alive, known)
			}
			p.ExpectPing()
		}
		if _, known := c.Alive(testContext(t)); known {
			t.Error("asked too often")
		}
		rec := newRecorder(t)
		s := mustOpen(t, c, true, rec)
		c.Flush()
		p.ExpectHeaders()
		p.WriteHeaders(s.ID(), wiretest.Head("grpc-status", "0"), true)
		rec.want("head :status=200 content-type=application/grpc grpc-status=0 true")
	}
}
