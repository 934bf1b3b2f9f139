package h2

import (
	"io"
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

func initialWindow(n uint32) wiretest.Options {
	return wiretest.Options{HoldWindows: true, Settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: n}}}
}

func TestSendWindows(t *testing.T) {
	c, p := clientAgainst(t, Config{}, initialWindow(10))
	<-c.Ready()
	r := newRecorder(t)
	s := mustOpen(t, c, false, r)
	write := func(n, want int, end bool) {
		t.Helper()
		if got, err := s.TryWrite(make([]byte, n), end); got != want || err != nil {
			t.Fatalf("TryWrite took %d of %d, want %d (%v)", got, n, want, err)
		}
		c.Flush()
	}
	data := func(n int, end bool) {
		t.Helper()
		if f := p.ExpectOn(1, http2.FrameData); f.Length != n || f.EndStream() != end {
			t.Fatalf("%v of %d, want %d", f, f.Length, n)
		}
	}
	write(15, 10, false)
	data(10, false)
	r.none()
	p.WriteWindowUpdate(1, 3)
	r.want("ready")
	write(5, 3, true)
	data(3, false)
	// RFC 9113 section 6.9.2: a smaller initial window can make windows negative.
	p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 5})
	p.WriteWindowUpdate(1, 5)
	p.Barrier()
	r.none()
	write(2, 0, true)
	p.WriteWindowUpdate(1, 1)
	r.want("ready")
	write(2, 1, true)
	data(1, false)
	p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100})
	r.want("ready")
	write(1, 1, true)
	data(1, true)
}

func TestEmptyEndNeedsNoWindow(t *testing.T) {
	c, p := clientAgainst(t, Config{}, initialWindow(0))
	<-c.Ready()
	a, b := mustOpen(t, c, false, newRecorder(t)), mustOpen(t, c, false, newRecorder(t))
	if n, err := a.TryWrite([]byte("x"), true); n != 0 || err != nil {
		t.Fatal(n, err)
	}
	if _, err := b.TryWrite(nil, true); err != nil {
		t.Fatal(err)
	}
	if err := a.WriteHeaders([]Field{{Name: "a", Value: "b"}}, true); err != nil { // trailers neither
		t.Fatal(err)
	}
	c.Flush()
	if f := p.ExpectOn(3, http2.FrameData); f.Length != 0 || !f.EndStream() {
		t.Error(f)
	}
	p.ExpectOn(1, http2.FrameHeaders)
	if f := p.ExpectOn(1, http2.FrameHeaders); !f.EndStream() {
		t.Error(f)
	}
}

func TestSendFrameSize(t *testing.T) {
	c, p := clientAgainst(t, Config{}, wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxFrameSize, Val: 20000}}})
	<-c.Ready()
	s := mustOpen(t, c, false, newRecorder(t))
	if n, err := s.TryWrite(make([]byte, 50000), false); n != 50000 || err != nil {
		t.Fatal(n, err)
	}
	c.Flush()
	p.ExpectHeaders()
	for _, want := range []int{20000, 20000, 10000} {
		if f := p.ExpectOn(1, http2.FrameData); f.Length != want {
			t.Errorf("frame of %d, want %d", f.Length, want)
		}
	}
}

// What is given back to the connection is shared first come, first served.
func TestConnectionWindow(t *testing.T) {
	c, p := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true, Settings: initialWindow(1 << 20).Settings})
	<-c.Ready()
	useUp(t, c)
	r1, r2, r3 := newRecorder(t), newRecorder(t), newRecorder(t)
	s1, s2, s3 := mustOpen(t, c, false, r1), mustOpen(t, c, false, r2), mustOpen(t, c, false, r3)
	for _, s := range []*Stream{s1, s2, s3} {
		if n, _ := s.TryWrite([]byte("xy"), true); n != 0 {
			t.Fatal(n)
		}
	}
	c.Flush()
	r2.none()
	p.WriteWindowUpdate(0, 1)
	r1.want("ready")
	if n, _ := s1.TryWrite([]byte("xy"), false); n != 1 {
		t.Fatal(n)
	}
	p.WriteWindowUpdate(0, 10000)
	r2.want("ready")
	r3.want("ready")
	r1.want("ready")
}

func TestBlockingWrite(t *testing.T) {
	c, p := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true})
	<-c.Ready()
	s := mustOpen(t, c, false, newRecorder(t))
	done := make(chan *Error, 1)
	go func() { done <- s.Write(make([]byte, 100000), true) }()
	sum := 0
	for sum < 65535*8/9 {
		sum += p.ExpectOn(1, http2.FrameData).Length
	}
	p.WriteWindowUpdate(1, 50000)
	p.WriteWindowUpdate(0, 50000)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	c.Flush()
	for end := false; !end; {
		f := p.ExpectOn(1, http2.FrameData)
		sum += f.Length
		end = f.EndStream()
	}
	if sum != 100000 {
		t.Error(sum)
	}
	first, second := mustOpen(t, c, false, newRecorder(t)), mustOpen(t, c, false, newRecorder(t))
	t.Run("released by Reset", func(t *testing.T) {
		s := first
		go func() { done <- s.Write(make([]byte, 100000), true) }()
		until(t, "blocked", func() bool { return blocked(s) })
		s.Reset(Cancel)
		if err := <-done; err == nil || err.Kind != KindReset || err.Remote {
			t.Error(err)
		}
	})
	t.Run("released by the end of the connection", func(t *testing.T) {
		s := second
		go func() { done <- s.Write(make([]byte, 100000), true) }()
		c.Flush()
		p.ExpectOn(s.ID(), http2.FrameHeaders)
		p.Close()
		if err := <-done; err == nil || err.Kind != KindConnLost {
			t.Error(err)
		}
	})
}

func blocked(s *Stream) bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.waiting
}

// Credit is given when it is consumed, not when it arrives, and never on streams that are over.
func TestCredit(t *testing.T) {
	a := newCalls(t)
	a.hold = true
	c, p := serverAgainst(t, Config{InitialWindow: 20000, MaxWindow: 20000, InitialConnWindow: 65535, MaxConnWindow: 65535}, a.accept)
	p.Barrier()
	id := p.Open(wiretest.Request("a", "/s/m"), false)
	_, s, _ := a.next()
	p.WriteData(id, make([]byte, 16000), false)
	p.WriteData(id, make([]byte, 4000), false)
	p.Barrier()
	if st := c.Stats(); st.Held != 20000 {
		t.Errorf("held %d", st.Held)
	}
	s.Consumed(9000)
	p.Barrier()
	if u := p.Untaken(id); len(u) != 0 {
		t.Errorf("%v", u)
	}
	s.Consumed(1000) // half a window, from a goroutine that flushes nothing
	if f := p.ExpectOn(id, http2.FrameWindowUpdate); f.Increment != 10000 {
		t.Errorf("stream credit %d", f.Increment)
	}
	p.WriteData(id, make([]byte, 10000), true)
	p.Barrier()
	s.Consumed(15000)
	s.Consumed(10000) // more than is owed
	if st := c.Stats(); st.Held != 0 || st.HeldPeak != 20000 {
		t.Errorf("held %d, peak %d", st.Held, st.HeldPeak)
	}
	p.Barrier()
	if u := p.Untaken(id); len(u) != 0 {
		t.Errorf("credit on a stream that has ended: %v", u)
	}
	// What a stream holds when it is reset goes back to the connection.
	id = p.Open(wiretest.Request("a", "/s/m"), false)
	_, s, _ = a.next()
	p.WriteData(id, make([]byte, 10000), false)
	p.Barrier()
	s.Reset(Cancel)
	s.Consumed(10000)
	c.Flush()
	if f := p.ExpectOn(0, http2.FrameWindowUpdate); f.Increment != 40000 {
		t.Errorf("connection credit %d", f.Increment)
	}
	if st := c.Stats(); st.Held != 0 {
		t.Errorf("held %d", st.Held)
	}
}

// Credit that was not due yet is given back when slow readers come to hold most of the window: without it, nobody could send.
func TestCreditIsNotKeptFromOthers(t *testing.T) {
	const window = 2 * 65535
	calls := newCalls(t)
	c, p := serverAgainst(t, Config{InitialConnWindow: window, MaxConnWindow: window}, func(s *Stream, f []Field, end bool) Receiver {
		calls.hold = s.ID() != 1
		return calls.accept(s, f, end)
	})
	left := window
	send := func(id uint32, most int) {
		p.WriteHeaders(id, requestHead, false)
		for most = min(most, left); most > 0; {
			n := min(most, 16000)
			p.WriteData(id, make([]byte, n), false)
			most -= n
			left -= n
		}
	}
	const read = 48000
	send(1, read)
	for id := uint32(3); left > 0; id += 2 {
		send(id, 60000)
	}
	p.Barrier()
	given := 65535 - window // beyond the first WINDOW_UPDATE
	for _, f := range p.Untaken(0) {
		if f.Stream == 0 && f.Type == http2.FrameWindowUpdate {
			given += int(f.Increment)
		}
	}
	if given < read {
		c.mu.Lock()
		defer c.mu.Unlock()
		t.Errorf("%d given back, of %d that were read; %d are held, %d may be sent", given, read, c.held, c.recvWin)
	}
}

func TestReceiveWindowOverflow(t *testing.T) {
	cfg := Config{InitialWindow: 20000, MaxWindow: 20000, InitialConnWindow: 65535, MaxConnWindow: 65535}
	t.Run("stream", func(t *testing.T) {
		a := newCalls(t)
		a.hold = true
		c, p := serverAgainst(t, cfg, a.accept)
		p.Barrier()
		until(t, "acknowledged", func() bool { return c.Stats().SettingsAcked })
		id := p.Open(wiretest.Request("a", "/s/m"), false)
		p.WriteData(id, make([]byte, 16000), false)
		p.WriteDataPadded(id, make([]byte, 3900), false, 255) // padding counts
		if code := p.ExpectReset(id); code != http2.ErrCodeFlowControl {
			t.Error(code)
		}
		p.Barrier()
	})
	t.Run("connection", func(t *testing.T) {
		a := newCalls(t)
		a.hold = true
		c, p := serverAgainst(t, cfg, a.accept)
		for range 5 {
			p.WriteData(p.Open(wiretest.Request("a", "/s/m"), false), make([]byte, 16000), false)
		}
		expectGoAway(t, p, http2.ErrCodeFlowControl)
		wait(t, c.Done())
	})
	t.Run("before the acknowledgement", func(t *testing.T) {
		// A client that has not seen our smaller window may still use the protocol's.
		a := newCalls(t)
		c, p := serverAgainst(t, cfg, a.accept, wiretest.Options{NoSettingsAck: true})
		id := p.Open(wiretest.Request("a", "/s/m"), false)
		for range 4 {
			p.WriteData(id, make([]byte, 15000), false)
		}
		p.Barrier()
		if u := p.Untaken(id); c.Err() != nil || len(u) > 0 && u[0].Type == http2.FrameRSTStream {
			t.Error(c.Err(), u)
		}
	})
}

// watched is a sink that notes what its stream's window was while DATA came.
type watched struct {
	sink
	window int64
}

func (w *watched) RecvData(s *Stream, p []byte, end bool) {
	if !end {
		s.c.mu.Lock()
		w.window = s.window
		s.c.mu.Unlock()
	}
	w.sink.RecvData(s, p, end)
}

// Windows of a bulk stream grow, and those of a stream whose reader is slow do not.
func TestWindowGrowth(t *testing.T) {
	done := make(chan struct{})
	fast := &watched{sink: sink{done: done}}
	client, server := pair(t, Config{}, Config{}, func(*Stream, []Field, bool) Receiver { return fast })
	s := mustOpen(t, client, false, NewBlocking())
	if err := s.Write(make([]byte, 16<<20), true); err != nil {
		t.Fatal(err)
	}
	client.Flush()
	wait(t, done)
	if st := server.Stats(); st.Window < 512<<10 || st.Window > 4<<20 {
		t.Errorf("the connection's window is %d", st.Window)
	}
	if w := fast.window; w < 256<<10 || w > 1<<20 {
		t.Errorf("the stream's window is %d", w)
	}

	slow := newCalls(t)
	slow.hold = true
	client, server = pair(t, Config{}, Config{}, slow.accept)
	s = mustOpen(t, client, false, NewBlocking())
	client.Flush()
	_, in, _ := slow.next()
	var sent int
	for range 20 {
		n, err := s.TryWrite(make([]byte, 64<<10), false)
		if err != nil {
			t.Fatal(err)
		}
		sent += n
		client.Flush()
		until(t, "all arrived", func() bool { return server.Stats().Held == int64(n) })
		server.mu.Lock()
		in.grantAt -= 1e9 // a second passes for the one who measures
		server.mu.Unlock()
		in.Consumed(n)
		until(t, "credit", func() bool { client.mu.Lock(); defer client.mu.Unlock(); return s.sendWin > 30000 })
	}
	server.mu.Lock()
	w := in.window
	server.mu.Unlock()
	if w != protocolWindow || sent < 1<<20 {
		t.Errorf("the slow stream's window is %d after %d bytes", w, sent)
	}
}

// TestHugeConnectionWindow: credit of a huge window comes back long before half of it is used up, or slow readers that hold
// the other half would stop the rest.
func TestHugeConnectionWindow(t *testing.T) {
	done := make(chan struct{})
	client, _ := pair(t, Config{}, Config{InitialConnWindow: 1 << 30, MaxConnWindow: 1 << 30},
		func(*Stream, []Field, bool) Receiver { return &sink{done: done} })
	s := mustOpen(t, client, false, NewBlocking())
	if err := s.Write(make([]byte, 2*maxOwed+maxOwed/2), true); err != nil {
		t.Fatal(err)
	}
	client.Flush()
	wait(t, done)
	until(t, "credit", func() bool { return client.Stats().SendWindow >= 1<<30-maxOwed })
}

// Where much is held for slow readers, a fast stream's window does not grow any more.
func TestWindowGrowthUnderPressure(t *testing.T) {
	done := make(chan struct{})
	fast := &watched{sink: sink{done: done}}
	client, server := pair(t, Config{}, Config{InitialConnWindow: 1 << 30, MaxConnWindow: 1 << 30, Budget: budgetOf(t, 1<<30)},
		func(*Stream, []Field, bool) Receiver { return fast })
	until(t, "credit", func() bool { client.mu.Lock(); defer client.mu.Unlock(); return client.sendWin > 1<<28 })
	server.mu.Lock()
	server.held += calmHeld + 1 // for others
	server.mu.Unlock()
	s := mustOpen(t, client, false, NewBlocking())
	if err := s.Write(make([]byte, 4<<20), true); err != nil {
		t.Fatal(err)
	}
	client.Flush()
	wait(t, done)
	server.mu.Lock()
	defer server.mu.Unlock()
	server.held -= calmHeld + 1
	server.chargeLocked()
	if w := fast.window; w != protocolWindow {
		t.Errorf("the stream's window is %d", w)
	}
}

func TestBlockingReads(t *testing.T) {
	client, server := pair(t, Config{}, Config{}, acceptEcho)
	b := NewBlocking()
	s := mustOpen(t, client, false, b)
	go func() {
		_ = s.Write(make([]byte, 300000), true)
		client.Flush()
	}()
	if n, err := io.Copy(io.Discard, b); n != 300000 || err != nil {
		t.Error(n, err)
	}
	if b.Err() != nil || len(b.Trailers()) != 2 {
		t.Error(b.Err(), b.Trailers())
	}
	b = NewBlocking()
	mustOpen(t, client, false, b)
	client.Flush()
	if _, err := b.WaitHead(testContext(t)); err != nil {
		t.Fatal(err)
	}
	server.Close(InternalError, "test")
	if _, err := b.Read(make([]byte, 1)); err == nil {
		t.Error("no error")
	}
	if e := b.Err(); e == nil || e.Kind != KindConnLost || e.Code != InternalError || e.Debug != "test" {
		t.Errorf("%v", e)
	}
}

// A window that opens by SETTINGS alone, on a stream whose writer was turned away before it had a receiver.
func TestInitialWindowAfterHead(t *testing.T) {
	ready := newRecorder(t)
	c, p := serverAgainst(t, Config{}, func(s *Stream, _ []Field, _ bool) Receiver {
		_ = s.WriteHeaders(responseHead, false)
		if n, err := s.TryWrite([]byte("abc"), true); n != 0 || err != nil {
			t.Error(n, err)
		}
		ready.s = s
		return ready
	}, initialWindow(0))
	p.Barrier()
	id := p.Open(wiretest.Request("a", "/s/m"), true)
	p.ExpectOn(id, http2.FrameHeaders)
	p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1})
	ready.want("ready")
	if n, err := ready.stream().TryWrite([]byte("abc"), true); n != 1 || err != nil {
		t.Error(n, err)
	}
	c.Flush()
	if f := p.ExpectOn(id, http2.FrameData); f.Length != 1 || f.EndStream() {
		t.Error(f)
	}
}
