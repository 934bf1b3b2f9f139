package grpcproxy

import (
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
)

// TestReplayBudget: the budget of replay buffers is for calls that may be sent again. Calls that are committed, or too
// large for it, give their share back at once, however long they last.
func TestReplayBudget(t *testing.T) {
	fill := func(s *sender) {
		for s.room() && cap(s.buf) < maxChunk {
			s.buf = s.buf[:cap(s.buf)]
		}
	}
	before := replayHeld.Load()
	for name, end := range map[string]func(s *sender){
		"committed": func(s *sender) { s.commit() },
		"too large": func(s *sender) {
			s.buf = s.buf[:cap(s.buf)]
			s.att = &attempt{sent: int64(len(s.buf))}
		},
	} {
		var s sender
		s.init(new(exchange))
		fill(&s)
		if n := replayHeld.Load() - before; n != maxChunk-firstChunk {
			t.Fatalf("%s: %d bytes are counted", name, n)
		}
		end(&s)
		if !s.room() {
			t.Fatalf("%s: no room", name)
		}
		if n := replayHeld.Load() - before; n != 0 {
			t.Errorf("%s: %d bytes are counted afterwards", name, n)
		}
		s.release()
		if n := replayHeld.Load() - before; n != 0 {
			t.Errorf("%s: %d bytes are left in the end", name, n)
		}
	}
}

// A busy request is read in large pieces, and a stream that has calmed down gives the space back.
func TestBufferFits(t *testing.T) {
	a := &attempt{view: new(cluster.View), ended: true} // ended: nothing is written
	var s sender
	s.init(new(exchange))
	defer s.release()
	s.att = a
	s.commit()
	read := func(n int) {
		t.Helper()
		if !s.room() {
			t.Fatal("no room")
		}
		if n = min(n, cap(s.buf)-len(s.buf)); n == 0 {
			t.Fatal("no space to read into")
		}
		s.push(n, false)
		a.sent = s.start + int64(len(s.buf)) // all of it
	}
	for range 4 {
		read(1 << 20)
	}
	if cap(s.buf) != maxChunk {
		t.Errorf("a busy request is read into %d bytes, want %d", cap(s.buf), maxChunk)
	}
	for range quietReads - 1 {
		read(10)
	}
	read(firstChunk + 1)
	for range quietReads - 1 {
		read(10)
	}
	if cap(s.buf) != maxChunk {
		t.Errorf("the buffer shrank to %d bytes though there was a large read a moment ago", cap(s.buf))
	}
	read(10)
	read(10)
	if cap(s.buf) != firstChunk {
		t.Errorf("a calm stream keeps %d bytes, want %d", cap(s.buf), firstChunk)
	}
	if bytes, _ := s.counts(); bytes < 1<<16 {
		t.Errorf("%d bytes counted", bytes)
	}
}
