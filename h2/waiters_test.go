package h2

import (
	"strconv"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// waiting counts the streams that wait for what all streams of a connection share.
func waiting(c *Conn) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := c.waiters.first; s != nil; s = s.after {
		n++
	}
	return n
}

// A stream that waits for the connection's window is forgotten when it is over, though the peer never opens the window.
func TestWaitersAreForgotten(t *testing.T) {
	t.Run("client", func(t *testing.T) {
		c, _ := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true})
		<-c.Ready()
		useUp(t, c)
		before := waiting(c)
		const n = 100
		var open []*Stream
		for range n {
			s := mustOpen(t, c, false, newRecorderOf(t, 4))
			if k, err := s.TryWrite([]byte("x"), true); err != nil || k != 0 {
				t.Fatal(k, err)
			}
			open = append(open, s)
		}
		if got := waiting(c) - before; got != n {
			t.Fatalf("%d streams wait, want %d", got, n)
		}
		for i := range n / 4 { // from the start, from the end, from the middle
			open[i].Reset(Cancel)
			open[n-1-i].Reset(Cancel)
			open[n/4+2*i].Reset(Cancel)
		}
		for _, s := range open { // what is left ends its side
			if _, err := s.TryWrite(nil, true); (err != nil) != s.Closed() {
				t.Fatal(err)
			}
		}
		if got := waiting(c) - before; got != 0 {
			t.Errorf("%d streams wait, want none", got)
		}
	})
	t.Run("server", func(t *testing.T) {
		body := make([]byte, protocolWindow)
		c, p := serverAgainst(t, Config{}, func(s *Stream, f []Field, _ bool) Receiver {
			size, err := strconv.Atoi(strings.Trim(f[2].Value, "/"))
			if err != nil {
				t.Error(err)
			}
			_ = s.WriteHeaders([]Field{{Name: ":status", Value: "200"}}, false)
			_, _ = s.TryWrite(body[:size], true)
			return &sink{}
		}, wiretest.Options{HoldWindows: true, DiscardData: true})
		const few, most = 15, 4096
		for range few { // these use up the connection's window
			p.Open(p.Request("/"+strconv.Itoa(most)), true)
		}
		p.Open(p.Request("/"+strconv.Itoa(protocolWindow-few*most)), true)
		const n = 1000
		for i := range n {
			id := p.Open(p.Request("/65535"), true)
			if i%100 == 99 {
				until(t, "streams", func() bool { return c.Stats().Opened == uint64(few+i+2) })
			}
			p.WriteReset(id, http2.ErrCodeCancel)
		}
		p.Barrier()
		if err := c.Err(); err != nil {
			t.Fatal(err)
		}
		if streams, got := c.Streams(), waiting(c); streams != 0 || got != 0 {
			t.Errorf("%d streams are open and %d wait, want none", streams, got)
		}
	})
}

// Who waits is served in the order of coming, those who left in between or not.
func TestWaitersAreServedInOrder(t *testing.T) {
	c, p := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true})
	<-c.Ready()
	useUp(t, c)
	order := make(chan uint32, 10)
	var open []*Stream
	for range 5 {
		s := mustOpen(t, c, false, &readyOrder{order: order})
		if k, err := s.TryWrite([]byte("x"), false); err != nil || k != 0 {
			t.Fatal(k, err)
		}
		open = append(open, s)
	}
	open[0].Reset(Cancel)
	open[2].Reset(Cancel)
	open[4].Reset(Cancel)
	c.Flush()
	p.WriteWindowUpdate(0, 100)
	p.Barrier()
	if len(order) != 2 {
		t.Fatalf("%d streams were served, want 2", len(order))
	}
	if a, b := <-order, <-order; a != open[1].ID() || b != open[3].ID() {
		t.Errorf("%d and %d were served, want %d and %d", a, b, open[1].ID(), open[3].ID())
	}
}

// readyOrder tells which stream can write.
type readyOrder struct {
	sink
	order chan uint32
}

func (r *readyOrder) RecvWriteReady(s *Stream) { r.order <- s.ID() }
