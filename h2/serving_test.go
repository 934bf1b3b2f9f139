package h2

import (
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

func waitsLocked(s *Stream) bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.waiting
}

// accept may write. What becomes due while it runs is told to the receiver that it returns.
func TestWriteReadyDuringAccept(t *testing.T) {
	r := &readyCounter{}
	_, p := serverAgainst(t, Config{MaxPending: 1 << 10}, func(s *Stream, _ []Field, _ bool) Receiver {
		_ = s.WriteHeaders(responseHead, false)
		if n, err := s.TryWrite(make([]byte, 4<<10), true); n == 4<<10 || err != nil {
			t.Error(n, err)
		}
		s.Conn().Flush()
		until(t, "the writer has found room", func() bool { return !waitsLocked(s) })
		return r
	})
	p.Open(p.Request("/a"), true)
	until(t, "the receiver is told", func() bool { return r.count.Load() == 1 })
	p.Barrier()
	if n := r.count.Load(); n != 1 {
		t.Errorf("RecvWriteReady was called %d times, want once", n)
	}
}

type readyCounter struct {
	sink
	count atomic.Int32
}

func (r *readyCounter) RecvWriteReady(*Stream) { r.count.Add(1) }

// RecvWriteReady runs on the reader or on the writer, but not on both at once for one stream.
func TestWriteReadyIsNeverTwice(t *testing.T) {
	c, p := clientAgainst(t, Config{MaxPending: 4 << 10}, wiretest.Options{
		Settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1 << 30}}, DiscardData: true, HoldWindows: true,
	})
	until(t, "SETTINGS are through", func() bool { st := c.Stats(); return st.SettingsAcked && st.PeerSettings && st.Pending == 0 })
	r := &overlapping{first: make(chan struct{}), goOn: make(chan struct{})}
	s := mustOpen(t, c, false, r)
	// The window of the connection is used up, so that the reader is the one who finds the stream.
	useUp(t, c)
	until(t, "no call is under way", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return !s.calling })
	calls := r.count.Load()
	if n, err := s.TryWrite([]byte("x"), false); n != 0 || err != nil {
		t.Fatal(n, err)
	}
	r.armed.Store(true)
	p.WriteWindowUpdate(0, 1<<20)
	wait(t, r.first)
	c.Flush() // there is room again, and the writer serves the stream
	until(t, "the writer has found the stream", func() bool { return !waitsLocked(s) })
	close(r.goOn)
	until(t, "the second call", func() bool { return r.count.Load() >= calls+2 && r.inside.Load() == 0 })
	if r.twice.Load() {
		t.Error("RecvWriteReady ran twice at a time for one stream")
	}
}

// overlapping writes when it can, and stays inside the first call after it was armed.
type overlapping struct {
	sink
	armed, twice  atomic.Bool
	inside, count atomic.Int32
	first, goOn   chan struct{}
}

func (o *overlapping) RecvWriteReady(s *Stream) {
	if o.inside.Add(1) > 1 {
		o.twice.Store(true)
	}
	if o.armed.Swap(false) {
		_, _ = s.TryWrite(make([]byte, 64<<10), false) // more than may wait
		close(o.first)
		<-o.goOn
	}
	o.count.Add(1)
	o.inside.Add(-1)
}

// silent is a receiver whose call goes on until the test calls Done.
type silent struct{ sink }

func (*silent) RecvReset(*Stream, *Error) {}

// A call counts against MaxStreams until it is done, though its stream was reset: by the client, before or after the head of
// the answer, by us because of the client, or by its own handler.
func TestCallsAreCountedUntilDone(t *testing.T) {
	streams := make(chan *Stream, 100)
	c, p := serverAgainst(t, Config{MaxStreams: 4}, func(s *Stream, f []Field, _ bool) Receiver {
		if f[2].Value != "/no-head" {
			_ = s.WriteHeaders(responseHead, false)
		}
		streams <- s
		return &silent{}
	})
	p.ExpectSettingsAck()
	open := func(path string) uint32 { return p.Open(wiretest.Request("a", path), true) }
	next := func() *Stream {
		t.Helper()
		p.Barrier()
		select {
		case s := <-streams:
			return s
		default:
			t.Fatal("the call was not accepted")
			return nil
		}
	}
	refused := func() {
		t.Helper()
		if code := p.ExpectReset(open("/refused")); code != http2.ErrCodeRefusedStream {
			t.Fatalf("RST_STREAM %v, want REFUSED_STREAM", code)
		}
	}
	var all []*Stream
	p.WriteReset(open("/head"), http2.ErrCodeCancel)
	all = append(all, next())
	p.WriteReset(open("/no-head"), http2.ErrCodeCancel)
	all = append(all, next())
	p.WriteWindowUpdate(open("/made-you-reset"), 0)
	all = append(all, next())
	open("/own")
	own := next()
	own.Reset(InternalError)
	all = append(all, own)
	p.Barrier()
	if st := c.Stats(); st.Streams != 0 || st.Lingering != 4 {
		t.Fatalf("%d streams, %d calls without a stream; want 0 and 4", st.Streams, st.Lingering)
	}
	for _, s := range all {
		refused()
		s.Done()
		s.Done() // twice is once
		id := open("/next")
		n := next()
		// A call that is done before its stream is over is not counted after it.
		n.Done()
		refused()
		p.WriteReset(id, http2.ErrCodeCancel)
		open("/next")
		// Nor is one whose answer has ended.
		if err := next().WriteHeaders(okTrailers, true); err != nil {
			t.Fatal(err)
		}
		// From here on the place is taken by a call that is not done.
		p.WriteReset(open("/last"), http2.ErrCodeCancel)
		defer next().Done()
	}
	if st := c.Stats(); c.Err() != nil || st.Lingering != 4 {
		t.Errorf("%v, %d calls without a stream, want 4", c.Err(), st.Lingering)
	}
}

// However fast a client opens and resets streams, it does not get more calls worked on than MaxStreams.
func TestResetsDoNotMultiplyCalls(t *testing.T) {
	const most = 10
	var running, peak atomic.Int32
	streams := make(chan *Stream, 20000)
	c, p := serverAgainst(t, Config{MaxStreams: most}, func(s *Stream, _ []Field, _ bool) Receiver {
		_ = s.WriteHeaders(responseHead, false)
		peak.Store(max(peak.Load(), running.Add(1)))
		streams <- s
		return &silent{}
	})
	p.ExpectSettingsAck()
	go func() { // handlers, which end late
		for s := range streams {
			running.Add(-1)
			s.Done()
		}
	}()
	defer close(streams)
	for range 3000 {
		p.WriteReset(p.Open(wiretest.Request("a", "/s/m"), true), http2.ErrCodeCancel)
	}
	until(t, "all is read", func() bool { st := c.Stats(); return c.Err() != nil || st.Opened+st.Refused == 3000 })
	if n := peak.Load(); n > most {
		t.Errorf("%d calls ran at a time, want at most %d", n, most)
	}
	closeAndWait(t, c)
}

// The budget of resets is for calls that are abandoned as soon as they are made, not for those whose time is over.
func TestLateResetsAreNoAttack(t *testing.T) {
	const calls = 50
	for _, tt := range []struct {
		name    string
		expires time.Duration
		age     time.Duration
		free    bool
	}{
		{"at once", 0, 0, false},
		{"at once, with a deadline far away", time.Minute, 0, false},
		{"at once, with no time at all", 1, 0, false},
		{"soon", 0, patientFor / 2, false},
		{"long before the deadline", 1900 * time.Millisecond, 100 * time.Millisecond, false},
		{"at the deadline", 100 * time.Millisecond, 100 * time.Millisecond, true},
		{"at the deadline, by the client's clock", 100 * time.Millisecond, 90 * time.Millisecond, true},
		{"at a tight deadline", 5 * time.Millisecond, 5 * time.Millisecond, true},
		{"after a second", 0, patientFor, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, p := serverAgainst(t, Config{ResetBudget: calls / 2, ResetRate: 1}, func(s *Stream, _ []Field, _ bool) Receiver {
				if tt.expires > 0 {
					s.Expires(tt.expires)
				}
				s.c.mu.Lock()
				defer s.c.mu.Unlock()
				s.began -= int64(tt.age) // as if it had come so long ago
				return &sink{}
			})
			p.ExpectSettingsAck()
			for range calls {
				p.Batch(func() { p.WriteReset(p.Open(wiretest.Request("a", "/s/m"), true), http2.ErrCodeCancel) })
			}
			until(t, "all is read", func() bool { return c.Err() != nil || c.Stats().ResetsIn == calls })
			st := c.Stats()
			switch {
			case tt.free && (c.Err() != nil || st.PrematureResets != 0):
				t.Errorf("%v, %d of %d resets cost budget, want none", c.Err(), st.PrematureResets, calls)
			case !tt.free && (c.Err() == nil || c.Err().Code != EnhanceYourCalm):
				t.Errorf("%v, %d of %d resets cost budget; want the connection to be closed", c.Err(), st.PrematureResets, calls)
			}
		})
	}
}

// A stream lets go of its receiver when nothing can call that any more, and not before.
func TestRelease(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	ends, lost := newRecorder(t), newRecorder(t)
	s := mustOpen(t, c, false, ends)
	stays := mustOpen(t, c, true, lost)
	c.Flush()
	p.WriteHeaders(s.ID(), wiretest.Fields(":status", "200", "grpc-status", "0"), true)
	ends.want("head :status=200 grpc-status=0 true")
	if s.Release() {
		t.Error("released before it was ended")
	}
	if _, err := s.TryWrite(nil, true); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if !s.Release() {
			t.Error("not released after both ends")
		}
	}
	c.Close(NoError, "")
	wait(t, c.Done())
	lost.want("reset local NO_ERROR remote=false unprocessed=false")
	if stays.Release() {
		t.Error("released, though it did not end in order")
	}
	ends.none()
}

// A stream whose receiver holds bytes can still be ended for the memory.
func TestReleaseHeld(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	r := newRecorder(t)
	r.hold = true
	s := mustOpen(t, c, true, r)
	c.Flush()
	p.WriteHeaders(s.ID(), wiretest.Fields(":status", "200"), false)
	p.WriteData(s.ID(), []byte("abc"), true)
	r.want("head :status=200 false")
	r.want("data 3 true")
	if s.Release() {
		t.Error("released while bytes are held")
	}
	if n := s.endForMemory(); n != 3 || s.Release() {
		t.Errorf("%d bytes were held, and it is released after all", n)
	}
	r.want("reset memory CANCEL remote=false unprocessed=false")
}

// A receiver that is being called, or about to be returned by accept, is not let go.
func TestReleaseDuringAccept(t *testing.T) {
	released := make(chan bool, 1)
	c, p := serverAgainst(t, Config{}, func(s *Stream, _ []Field, _ bool) Receiver {
		_ = s.WriteHeaders(responseHead, true)
		released <- s.Release()
		return new(sink)
	})
	p.Open(p.Request("/a"), true)
	if <-released {
		t.Error("released before accept has returned")
	}
	until(t, "the stream is over", func() bool { return c.Streams() == 0 })
}
