package h2

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// took is what TryWrite takes of n bytes.
func took(t *testing.T, s *Stream, n int) int {
	t.Helper()
	k, err := s.TryWrite(make([]byte, n), false)
	if err != nil {
		t.Fatal(err)
	}
	s.Conn().Flush()
	return k
}

// A stream that stalls leaves something of the connection's window for the others, and they for the next.
func TestShareOfConnectionWindow(t *testing.T) {
	c, p := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true, Settings: initialWindow(1 << 20).Settings})
	<-c.Ready()
	r := newRecorder(t)
	first, second := mustOpen(t, c, false, r), mustOpen(t, c, false, newRecorder(t))
	if n := took(t, first, 1<<20); n != 65535*4/5 {
		t.Errorf("the first took %d", n)
	}
	if n := took(t, first, 1<<20); n != 0 {
		t.Errorf("the first took %d more", n)
	}
	if n := took(t, second, 1000); n != 1000 {
		t.Errorf("a small message: %d", n)
	}
	if n := took(t, second, 1<<20); n != 4096-1000 {
		t.Errorf("the second took %d", n)
	}
	left := c.Stats().SendWindow
	for range 10 {
		s := mustOpen(t, c, false, newRecorder(t))
		if n := took(t, s, 200); n != 200 {
			t.Errorf("%d of 200, of %d", n, left)
		}
	}
	r.none() // what is left is not the first's
	p.WriteWindowUpdate(0, 1)
	p.Barrier()
	r.none()
	// What the peer has read of it is the first's again.
	p.WriteWindowUpdate(0, 30000)
	p.WriteWindowUpdate(first.ID(), 30000)
	r.want("ready")
	if n := took(t, first, 1<<20); n < 10000 {
		t.Errorf("the first took %d", n)
	}
}

// What is left of a share is not cut into crumbs, and goes if that is all there is to send.
func TestShareWithoutCrumbs(t *testing.T) {
	c, p := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true, Settings: initialWindow(1 << 20).Settings})
	<-c.Ready()
	r := newRecorder(t)
	s := mustOpen(t, c, false, r)
	mustOpen(t, c, false, newRecorder(t))
	took(t, s, 1<<20)
	p.WriteWindowUpdate(0, 700)
	p.Barrier()
	r.none()
	if n := took(t, s, 1<<20); n != 0 {
		t.Errorf("a crumb of %d", n)
	}
	if n := took(t, s, 300); n != 300 {
		t.Errorf("%d of the last 300 bytes", n)
	}
	if n := took(t, s, 700); n != 0 {
		t.Errorf("%d of 700 bytes", n)
	}
	p.WriteWindowUpdate(0, 300)
	r.want("ready")
	if n := took(t, s, 700); n != 700 {
		t.Errorf("%d of the last 700 bytes", n)
	}
}

// A stream gets as far as every stream may, in however many pieces. A peer may give nothing back before it has so much.
func TestLeastShareInPieces(t *testing.T) {
	c, _ := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true, Settings: initialWindow(1 << 20).Settings})
	<-c.Ready()
	first, s := mustOpen(t, c, false, newRecorder(t)), mustOpen(t, c, false, newRecorder(t))
	took(t, first, 1<<20)
	if n := took(t, s, 3500); n != 3500 {
		t.Errorf("took %d", n)
	}
	if n := took(t, s, 5000); n < 4096-3500 {
		t.Errorf("took %d more, with %d left", n, c.Stats().SendWindow)
	}
}

// DATA that waits for the socket and is taken back leaves no window that is tight: the peer has nothing to give back.
func TestWindowTakenBackIsNotTight(t *testing.T) {
	c, _ := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true, Settings: initialWindow(1 << 20).Settings})
	settled(t, c)
	_, release := holdWrite(t, c)
	var wait []*Stream
	for range 2 {
		s := mustOpen(t, c, false, newRecorder(t))
		if n, err := s.TryWrite(make([]byte, 1<<20), false); n == 0 || err != nil {
			t.Fatal(n, err)
		}
		wait = append(wait, s)
	}
	until(t, "tight", c.Tight)
	for _, s := range wait {
		s.Reset(Cancel)
	}
	if n := c.Stats().SendWindow; n != 65535 || c.Tight() {
		t.Errorf("window %d, tight %t", n, c.Tight())
	}
	release()
}

// A stream that is alone leaves a little for who comes next. A window that has been short for long is tight, and one that is used
// up takes no streams any more.
func TestTightWindow(t *testing.T) {
	var nearly, capacity atomic.Int32
	c, p := clientAgainst(t, Config{
		OnNearlyFull: func(*Conn) { nearly.Add(1) }, OnCapacity: func(*Conn) { capacity.Add(1) },
	}, wiretest.Options{HoldWindows: true, Settings: initialWindow(1 << 20).Settings})
	<-c.Ready()
	if c.Short() {
		t.Error("short at once")
	}
	r := newRecorder(t)
	s := mustOpen(t, c, false, r)
	if n := took(t, s, 1<<20); n != 65535*8/9 {
		t.Errorf("took %d", n)
	}
	if !c.Short() || c.Tight() || c.Available() == 0 {
		t.Error("not short, or tight at once")
	}
	until(t, "tight", c.Tight)
	until(t, "told", func() bool { return nearly.Load() == 1 })
	r.none()
	if c.Available() == 0 {
		t.Error("not available, though something is left")
	}
	for c.Available() > 0 {
		if left := c.Stats().SendWindow; left < shareStep {
			t.Fatalf("available, though only %d bytes are left", left)
		}
		took(t, mustOpen(t, c, false, newRecorder(t)), 1<<10)
	}
	if _, err := c.OpenStream(requestHead, false, newRecorder(t)); err == nil || err.Kind != KindNoCapacity || !err.Unprocessed {
		t.Error(err)
	}
	before := capacity.Load()
	p.WriteWindowUpdate(0, 65535)
	r.want("ready")
	until(t, "told", func() bool { return capacity.Load() > before })
	if c.Short() || c.Tight() || c.Available() == 0 {
		t.Error("still tight")
	}
	// A window that is short but moves is not tight.
	took(t, s, 1<<20)
	for end := time.Now().Add(2 * time.Duration(tightAfter)); time.Now().Before(end); {
		p.WriteWindowUpdate(0, 2000)
		r.want("ready")
		took(t, s, 1<<20)
		time.Sleep(5 * time.Millisecond) // or the stream's own window does not last
	}
	if n := nearly.Load(); n > 2 { // a machine may stand still for so long
		t.Errorf("told %d times", n)
	}
}

// Whatever habits a peer has of giving back what it has read, a stream that is read moves, alone and beside others.
func TestBulkAgainstPeersHabits(t *testing.T) {
	for _, tt := range []struct {
		name         string
		stream, conn int64 // windows of stream and connection
		at           int64 // percents of them that must be used before anything is given back
		silent       bool  // nothing is given to streams
	}{
		{"at once", 65535, 65535, 0, false},
		{"half", 65535, 65535, 50, false},
		{"three quarters", 65535, 65535, 75, false},
		{"large streams, half", 1 << 20, 65535, 50, false},
		{"huge streams that are never told", 1 << 30, 65535, 50, true},
		{"small streams", 1000, 65535, 50, false},
		{"large connection", 65535, 1 << 20, 75, false},
	} {
		for _, others := range []int{0, 1, 3} {
			t.Run(tt.name, func(t *testing.T) {
				c, p := clientAgainst(t, Config{}, wiretest.Options{
					HoldWindows: true, Settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: uint32(tt.stream)}},
				})
				<-c.Ready()
				if more := tt.conn - 65535; more > 0 {
					p.WriteWindowUpdate(0, uint32(more))
				}
				for range others {
					took(t, mustOpen(t, c, false, newRecorder(t)), 10)
				}
				p.Barrier()
				s := mustOpen(t, c, false, newRecorder(t))
				done := make(chan *Error, 1)
				const size = 1 << 20
				go func() {
					err := s.Write(make([]byte, size), true)
					c.Flush()
					done <- err
				}()
				var got, owedConn, owedStream int64
				for got < size {
					n := int64(p.ExpectOn(s.ID(), http2.FrameData).Length)
					got, owedConn, owedStream = got+n, owedConn+n, owedStream+n
					if owedConn > tt.conn*tt.at/100 {
						p.WriteWindowUpdate(0, uint32(owedConn))
						owedConn = 0
					}
					if !tt.silent && owedStream > tt.stream*tt.at/100 {
						p.WriteWindowUpdate(s.ID(), uint32(owedStream))
						owedStream = 0
					}
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
				if c.Tight() {
					t.Error("tight")
				}
			})
		}
	}
}

// stallable is a call whose request is read, or not, and answered when it has ended.
type stallable struct {
	sink
	stalled bool
}

func (r *stallable) RecvData(s *Stream, p []byte, end bool) {
	if r.stalled {
		return
	}
	s.Consumed(len(p))
	if end {
		_ = s.WriteHeaders(responseHead, true)
	}
}

// Uploads that nobody reads do not stop other calls on their connection, though together they would like to have all of
// its window.
func TestStalledUploads(t *testing.T) {
	for _, window := range []uint32{65535, 256 << 10} {
		for _, stalled := range []int{2, 3, 5, 10} {
			if window == 65535 && stalled > 2 {
				continue // nothing is left
			}
			t.Run(fmt.Sprintf("%d of %d", stalled, window), func(t *testing.T) {
				t.Parallel()
				stalledUploads(t, Config{InitialConnWindow: window, MaxConnWindow: window}, stalled)
			})
		}
	}
}

func stalledUploads(t *testing.T, cfg Config, stalled int) {
	client, server := pair(t, Config{}, cfg, func(_ *Stream, f []Field, _ bool) Receiver {
		return &stallable{stalled: f[len(f)-1].Value == "stalled"}
	})
	<-client.Ready()
	window := int64(cfg.InitialConnWindow)
	until(t, "the window has come", func() bool { return client.Stats().SendWindow == window })
	open := func(word string, r Receiver) *Stream {
		s, err := client.OpenStream(append(slices.Clip(requestHead), Field{Name: "x", Value: word}), false, r)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	answered := func(s *Stream, b *Blocking, size int) {
		t.Helper()
		wrote := make(chan *Error, 1)
		go func() {
			wrote <- s.Write(make([]byte, size), true)
			client.Flush()
		}()
		if _, err := b.WaitHead(testContext(t)); err != nil {
			server.mu.Lock()
			defer server.mu.Unlock()
			t.Fatalf("%v: %d left, %d held, %d owed", err, client.Stats().SendWindow, server.held, server.owed)
		}
		if err := <-wrote; err != nil {
			t.Fatal(err)
		}
	}
	// One has sent something before, which was read but is not worth a WINDOW_UPDATE yet.
	early := NewBlocking()
	before := open("read", early)
	had := min(window/4-1, 30000)
	took(t, before, int(had))
	for range stalled {
		if n := took(t, open("stalled", newRecorder(t)), 1<<20); n == 0 || int64(n) > window*8/9 {
			t.Fatal(n)
		}
	}
	until(t, "all arrived", func() bool {
		server.mu.Lock()
		defer server.mu.Unlock()
		return server.recvWin == client.Stats().SendWindow && server.held+server.owed+server.recvWin == window
	})
	answered(before, early, 200000)
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 30 {
		b := NewBlocking()
		answered(open("read", b), b, rnd.IntN(20000)+1)
	}
	last := NewBlocking()
	answered(open("read", last), last, 400000)
}
