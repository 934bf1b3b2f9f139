package grpcproxy

import "testing"

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
