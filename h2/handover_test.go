package h2

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// wrapped hides what the connection is, so that only the writer goroutine may write to it.
type wrapped struct{ net.Conn }

func pairs(t *testing.T, f func(t *testing.T, client, server net.Conn)) {
	t.Run("plain", func(t *testing.T) { wiretest.CheckLeaks(t); a, b := tcpPair(t); f(t, a, b) })
	t.Run("tls", func(t *testing.T) { wiretest.CheckLeaks(t); a, b := tlsPair(t); f(t, a, b) })
	t.Run("wrapped", func(t *testing.T) { wiretest.CheckLeaks(t); a, b := tcpPair(t); f(t, wrapped{a}, wrapped{b}) })
	t.Run("pipe", func(t *testing.T) { wiretest.CheckLeaks(t); a, b := net.Pipe(); f(t, a, b) })
}

func tcpOf(c net.Conn) *net.TCPConn {
	switch c := c.(type) {
	case *net.TCPConn:
		return c
	case *tls.Conn:
		return c.NetConn().(*net.TCPConn)
	case wrapped:
		return c.Conn.(*net.TCPConn)
	}
	return nil
}

// The socket takes little and its peer reads nothing: Flush and TryWrite must return all the same, the writer takes
// over, and everything arrives once the peer reads.
func TestHandOver(t *testing.T) {
	pairs(t, func(t *testing.T, cn, sn net.Conn) {
		if tc := tcpOf(cn); tc != nil {
			_ = tc.SetWriteBuffer(4 << 10)
			_ = tcpOf(sn).SetReadBuffer(4 << 10)
		}
		client := Client(cn, Config{MaxPending: 64 << 10})
		t.Cleanup(func() { closeAndWait(t, client) })
		// The client's preface is answered by hand, with large windows, and then nothing is read for a while.
		preface := make([]byte, len(clientPreface))
		if _, err := io.ReadFull(sn, preface); err != nil {
			t.Fatal(err)
		}
		settings := []byte{0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0x7f, 0xff, 0xff, 0xff, 0, 0, 4, 8, 0, 0, 0, 0, 0, 0x3f, 0, 0, 0}
		if _, err := sn.Write(settings); err != nil {
			t.Fatal(err)
		}
		r := newRecorder(t)
		var s *Stream
		until(t, "windows", func() bool { st := client.Stats(); return st.SendWindow > 1<<20 && st.PeerSettings })
		s = mustOpen(t, client, false, r)
		sent, full := 0, false
		msg := make([]byte, 16<<10)
		for range 100000 {
			start := time.Now()
			n, err := s.TryWrite(msg, false)
			if err != nil {
				t.Fatal(err)
			}
			client.Flush()
			if took := time.Since(start); took > time.Second {
				t.Fatalf("blocked for %s", took)
			}
			sent += n
			if n < len(msg) {
				full = true
				break
			}
		}
		if !full {
			t.Fatal("the pending buffer has no bound")
		}
		if st := client.Stats(); st.Pending > 64<<10+1000 {
			t.Errorf("pending %d", st.Pending)
		}
		// Now the rest of the peer comes to life.
		got := make(chan int)
		go func() {
			n := 0
			buf := make([]byte, 64<<10)
			for {
				k, err := sn.Read(buf)
				n += k
				if err != nil {
					break
				}
			}
			got <- n
		}()
		r.want("ready")
		if _, err := s.TryWrite(nil, true); err != nil {
			t.Fatal(err)
		}
		client.Flush()
		until(t, "drained", func() bool { return client.Stats().Pending == 0 })
		st := client.Stats()
		if client.sock.canTry && st.HandOvers == 0 {
			t.Errorf("no hand-over: %+v", st)
		}
		closeAndWait(t, client)
		if tcpOf(cn) == nil {
			sn.Close()
		}
		if n := <-got; n < sent {
			t.Errorf("%d bytes arrived of at least %d", n, sent)
		}
		sn.Close()
	})
}

// A blocked socket ends the connection, and with it whatever waits.
func TestWriteTimeout(t *testing.T) {
	pairs(t, func(t *testing.T, cn, sn net.Conn) {
		if tc := tcpOf(cn); tc != nil {
			_ = tc.SetWriteBuffer(4 << 10)
			_ = tcpOf(sn).SetReadBuffer(4 << 10)
		}
		client := Client(cn, Config{WriteTimeout: 100 * time.Millisecond, MaxPending: 8 << 20})
		r := newRecorder(t)
		s := mustOpen(t, client, false, r)
		// Headers are not bounded by windows.
		for range 200 {
			if err := s.WriteHeaders([]Field{{Name: "x", Value: string(make([]byte, 30000)), Sensitive: true}}, false); err != nil {
				break
			}
		}
		client.Flush()
		wait(t, client.Done())
		if e := client.Err(); e.Kind != KindTimeout || e.Debug != "the peer reads nothing" || e.Err == nil {
			t.Errorf("%v", e)
		}
		sn.Close()
	})
}
