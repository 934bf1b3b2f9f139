package h2

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// budgetOf makes a budget for connections of the test, and checks at its end that they have given everything back.
func budgetOf(t *testing.T, limit int64) *Budget {
	b := NewBudget(limit)
	t.Cleanup(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if h, g := b.held.Load(), b.grown.Load(); h != 0 || g != 0 || len(b.conns) != 0 {
			t.Errorf("%d bytes are held at the end, %d granted, by %d connections", h, g, len(b.conns))
		}
	})
	return b
}

// feeding writes to the client as long as that takes it, or so many bytes.
func feeding(size int) func(s *Stream, _ []Field, _ bool) Receiver {
	return func(s *Stream, _ []Field, _ bool) Receiver {
		_ = s.WriteHeaders(responseHead, false)
		go func() {
			p := make([]byte, 16<<10)
			left := size
			for {
				n := len(p)
				if size > 0 {
					n = min(n, left)
					left -= n
				}
				end := size > 0 && left == 0
				if s.Write(p[:n], end) != nil || end {
					s.Conn().Flush()
					return
				}
				s.Conn().Flush()
			}
		}()
		return &sink{}
	}
}

// A stream on which nothing more can come does not count with its window, however long its answer takes.
func TestBudgetForgetsWindowsOfEndedSides(t *testing.T) {
	b := budgetOf(t, 1<<30)
	calls := make(chan *Stream, 1)
	h := &holding{hold: new(atomic.Bool)}
	client, _ := pair(t, Config{}, Config{Budget: b}, func(s *Stream, _ []Field, _ bool) Receiver {
		calls <- s
		return h
	})
	<-client.Ready()
	s := mustOpen(t, client, false, newRecorder(t))
	client.Flush()
	until(t, "its window has grown", func() bool {
		if err := s.Write(make([]byte, 256<<10), false); err != nil {
			t.Fatal(err)
		}
		return b.grown.Load() > 0
	})
	if err := s.Write(nil, true); err != nil {
		t.Fatal(err)
	}
	client.Flush()
	until(t, "its end has come", h.end.Load)
	if n := b.grown.Load(); n != 0 || (<-calls).Closed() {
		t.Errorf("%d are granted", n)
	}
}

// holding consumes at once until it is told to hold.
type holding struct {
	sink
	hold *atomic.Bool
	got  atomic.Int64
	end  atomic.Bool
	err  atomic.Pointer[Error]
}

func (h *holding) RecvData(s *Stream, p []byte, end bool) {
	h.got.Add(int64(len(p)))
	if end {
		h.end.Store(true)
	}
	if !h.hold.Load() {
		s.Consumed(len(p))
	}
}

func (h *holding) RecvReset(_ *Stream, e *Error) { h.err.Store(e) }

// Streams that have read fast and then stop hold no more, together, than the budget: those that hold the most end, the others
// and new ones go on.
func TestBudgetOfGrownWindows(t *testing.T) {
	const limit, streams = 4 << 20, 100
	b := budgetOf(t, limit)
	huge := Config{InitialConnWindow: 1 << 30, MaxConnWindow: 1 << 30, Budget: b}
	client, _ := pair(t, huge, Config{MaxStreams: 1000}, feeding(0))
	<-client.Ready()
	hold, fresh := new(atomic.Bool), new(atomic.Bool)
	var all []*holding
	var open []*Stream
	for range streams {
		h := &holding{hold: hold}
		all, open = append(all, h), append(open, mustOpen(t, client, true, h))
	}
	client.Flush()
	grown := func() (n int64) {
		client.mu.Lock()
		defer client.mu.Unlock()
		for _, s := range open {
			n += s.window - protocolWindow
		}
		return n
	}
	until(t, "windows have grown", func() bool { return grown() > limit/8 })
	hold.Store(true)
	until(t, "streams end", func() bool { return b.Ended() > 0 })
	settled := func() bool { return b.Held() <= limit && client.Stats().Held <= limit+chargeStep }
	until(t, "less is held", settled)
	if n := grown(); n > limit {
		t.Errorf("windows have grown by %d, the budget is %d", n, limit)
	}
	// Those who stay hold what they held, and give it back.
	fresh.Store(false)
	h := &holding{hold: fresh}
	mustOpen(t, client, true, h)
	client.Flush()
	until(t, "a new stream reads", func() bool { return h.got.Load() > 1<<20 })
	left := 0
	for i, h := range all {
		switch e := h.err.Load(); {
		case e == nil:
			left++
		case e.Kind != KindMemory || e.Code != Cancel || e.Remote || e.Unprocessed || e.Connection || open[i].Err() != e:
			t.Fatalf("%+v", e)
		}
	}
	if ended := int(b.Ended()); left == 0 || left+ended < streams || left < limit/(1<<20) {
		t.Errorf("%d streams are left, %d were ended", left, ended)
	}
}

// Near the limit windows that have grown are given back no more than the first window, and grow again when there is room.
func TestBudgetShrinksWindows(t *testing.T) {
	b := budgetOf(t, 16<<20)
	client, _ := pair(t, Config{Budget: b}, Config{}, feeding(0))
	h := &holding{hold: new(atomic.Bool)}
	s := mustOpen(t, client, true, h)
	client.Flush()
	window := func() int64 {
		client.mu.Lock()
		defer client.mu.Unlock()
		return s.window
	}
	until(t, "it has grown", func() bool { return window() >= 256<<10 })
	if n := b.grown.Load(); n < 256<<10-protocolWindow {
		t.Errorf("the budget knows of %d", n)
	}
	b.grown.Add(16 << 20) // windows of others
	until(t, "it has shrunk", func() bool { return window() == protocolWindow })
	b.grown.Add(-16 << 20)
	until(t, "it has grown again", func() bool { return window() >= 256<<10 })
	s.Reset(Cancel)
	client.Flush()
}

// A reader that has become slow gets its window, and what it can make us hold, smaller step by step.
func TestSlowReaderShrinksItsWindow(t *testing.T) {
	b := budgetOf(t, 16<<20)
	a := newCalls(t)
	client, server := pair(t, Config{}, Config{Budget: b}, a.accept)
	mustOpen(t, client, false, NewBlocking())
	client.Flush()
	_, in, _ := a.next()
	server.mu.Lock()
	in.setWindowLocked(1 << 20) // as if it had read fast
	in.recvWin = 1 << 20
	server.mu.Unlock()
	const n = 16 << 10
	last := int64(1 << 20)
	for last > protocolWindow {
		server.mu.Lock()
		in.recvWin, server.recvWin, in.held, server.held = in.recvWin-n, server.recvWin-n, in.held+n, server.held+n // as if it had come
		server.rtt = 1e6
		in.grantAt = server.nano() - 1e9 // a second passes for the one who measures
		server.mu.Unlock()
		in.Consumed(n)
		server.mu.Lock()
		w, sum := in.window, in.recvWin+in.held+in.owed
		server.mu.Unlock()
		if w > last || w < protocolWindow || w < last/2 && w != protocolWindow || w != sum {
			t.Fatalf("from %d to %d (%d)", last, w, sum)
		}
		last = w
	}
	if n := b.grown.Load(); n != 0 {
		t.Errorf("the budget knows of %d", n)
	}
}

// Answers that have ended, and that nobody reads, count as well and can be given up.
func TestBudgetOfFinishedStreams(t *testing.T) {
	const limit, size, streams = 1 << 20, 60_000, 40
	b := budgetOf(t, limit)
	client, _ := pair(t, Config{InitialConnWindow: 1 << 30, MaxConnWindow: 1 << 30, Budget: b}, Config{}, feeding(size))
	<-client.Ready()
	hold := new(atomic.Bool)
	hold.Store(true)
	var all []*holding
	var opened []*Stream
	for range streams {
		h := &holding{hold: hold}
		all, opened = append(all, h), append(opened, mustOpen(t, client, true, h))
		client.Flush()
		until(t, "it is answered or ended", func() bool { return h.end.Load() || h.err.Load() != nil })
	}
	until(t, "all have ended", func() bool { return client.Streams() == 0 })
	until(t, "less is held", func() bool { return client.Stats().Held <= limit+chargeStep })
	until(t, "streams were told", func() bool {
		told := 0
		for _, h := range all {
			if e := h.err.Load(); e != nil && e.Kind == KindMemory {
				told++
			}
		}
		return told == int(b.Ended()) && told >= (streams*size-limit)/size
	})
	held := client.Stats().Held
	if held < limit/2 {
		t.Errorf("%d are held: more were given up than was needed", held)
	}
	for _, s := range opened {
		s.Consumed(size)
	}
	if st := client.Stats(); st.Held != 0 || b.Held() != 0 || client.holders.first != nil {
		t.Errorf("%d bytes are held, %d of the budget", st.Held, b.Held())
	}
}

// Small messages never touch the budget, and what connections charge comes to nothing in the end, however they take turns.
func TestBudgetAccounts(t *testing.T) {
	b := budgetOf(t, 1<<30)
	client, server := pair(t, Config{Budget: b}, Config{Budget: b}, acceptEcho)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 10 {
				r := NewBlocking()
				s, err := client.OpenStream(requestHead, false, r)
				for err != nil && err.Kind == KindNoCapacity { // so much waits for the socket that it is full for a moment
					time.Sleep(time.Millisecond)
					s, err = client.OpenStream(requestHead, false, r)
				}
				if err != nil {
					t.Error(err)
					return
				}
				go func() {
					_ = s.Write(make([]byte, 1+i*j*3000), true)
					client.Flush()
				}()
				p := make([]byte, 10000)
				for n := 0; ; {
					k, err := r.Read(p)
					if n += k; err != nil || j%3 == 2 && n > 5000 {
						s.Reset(Cancel)
						client.Flush()
						break
					}
				}
			}
		})
	}
	wg.Wait()
	until(t, "nothing is held", func() bool { return client.Stats().Held == 0 && server.Stats().Held == 0 && b.Held() == 0 })
}
