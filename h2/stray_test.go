package h2

import (
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// crumbs writes n DATA frames of one byte each.
func crumbs(p *wiretest.Conn, stream uint32, n int) {
	p.Batch(func() {
		for range n {
			p.WriteData(stream, []byte{0}, false)
		}
	})
}

// RFC 9113 section 5.4.2: whoever resets a stream takes what its peer sent before it knew. The windows that were granted
// bound it, not a count of frames: small messages are many.
func TestFramesInFlightAreNoAttack(t *testing.T) {
	const many = 24000 // within the initial window of 65,535 bytes
	t.Run("answers to a cancelled call", func(t *testing.T) {
		c, p := clientAgainst(t, Config{})
		bystander := newRecorder(t)
		mustOpen(t, c, true, bystander)
		s := mustOpen(t, c, true, newRecorder(t))
		c.Flush()
		p.ExpectHeaders()
		p.ExpectHeaders()
		s.Reset(Cancel)
		p.WriteHeaders(s.ID(), wiretest.Head(), false)
		crumbs(p, s.ID(), many)
		p.WriteHeaders(s.ID(), wiretest.Fields("grpc-status", "0"), true)
		p.WriteHeaders(1, wiretest.Head("grpc-status", "0"), true)
		bystander.want("head" + text(wiretest.Head("grpc-status", "0")) + " true")
	})
	t.Run("ends of many cancelled calls", func(t *testing.T) {
		c, p := clientAgainst(t, Config{MaxPending: 64 << 20}) // nothing is flushed for a while
		<-c.Ready()
		var all []*Stream
		for range many / 2 {
			all = append(all, mustOpen(t, c, true, newRecorderOf(t, 2)))
		}
		c.Flush()
		for range all {
			p.ExpectHeaders()
		}
		for _, s := range all {
			s.Reset(Cancel)
		}
		p.Batch(func() {
			for _, s := range all {
				p.WriteHeaders(s.ID(), wiretest.Head(), false)
				p.WriteHeaders(s.ID(), wiretest.Fields("grpc-status", "0"), true)
			}
		})
		p.Barrier()
	})
	t.Run("a request that was answered early", func(t *testing.T) {
		a := newCalls(t)
		c, p := serverAgainst(t, Config{}, a.accept)
		id := p.Open(wiretest.Request("a", "/s/m"), false)
		_, s, _ := a.next()
		_ = s.WriteHeaders(responseHead, true)
		s.Reset(NoError)
		c.Flush()
		p.CollectAll(id)
		crumbs(p, id, many)
		p.Barrier()
	})
	t.Run("a request that was refused", func(t *testing.T) {
		a := newCalls(t)
		_, p := serverAgainst(t, Config{MaxStreams: 1}, a.accept)
		p.Open(wiretest.Request("a", "/s/m"), false)
		id := p.Open(wiretest.Request("a", "/s/m"), false)
		if code := p.ExpectReset(id); code != http2.ErrCodeRefusedStream {
			t.Error(code)
		}
		crumbs(p, id, many)
		p.Barrier()
	})
}

// What goes beyond the windows of streams that were reset is counted.
func TestFloodOnResetStream(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	s := mustOpen(t, c, true, newRecorder(t))
	c.Flush()
	p.ExpectHeaders()
	s.Reset(Cancel)
	c.Flush()
	p.ExpectReset(s.ID())
	st := flood(t, c, p, func(int) { p.WriteData(s.ID(), []byte{0}, false) })
	if st.Ignored < protocolWindow || st.Ignored > protocolWindow+40000 {
		t.Errorf("%d frames before it was stopped", st.Ignored)
	}
}
