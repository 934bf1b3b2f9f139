package proxy

import (
	"bytes"
	"testing"
)

// grow adds a piece as take does.
func grow(r *replay, p []byte) {
	at := r.total
	r.total += int64(len(p))
	r.keepFrom(p, at)
}

// What is kept can be read from wherever an attempt is; when it is not kept any more, what was sent is forgotten.
func TestReplay(t *testing.T) {
	request := messages(1, 20000)
	r := replay{keep: true}
	for i := 0; i < len(request); i += 700 {
		p := request[i:min(i+700, len(request))]
		if !r.fits(len(p)) {
			t.Fatalf("%d bytes do not fit", r.total)
		}
		grow(&r, p)
	}
	if want := int64(len(request) - smallBuffer); r.held != want || replaysHeld.Load() != want {
		t.Errorf("%d bytes are counted, %d in all, want %d", r.held, replaysHeld.Load(), want)
	}
	for _, sent := range []int64{0, 1, 699, 5000, int64(len(request))} {
		r.forget(sent) // does nothing yet
		if !bytes.Equal(r.from(sent), request[sent:]) {
			t.Errorf("from %d there are %d bytes, which are not the request's", sent, len(r.from(sent)))
		}
	}
	r.letGo()
	if r.held != 0 || replaysHeld.Load() != 0 {
		t.Errorf("%d bytes are still counted, %d in all", r.held, replaysHeld.Load())
	}
	for _, sent := range []int64{0, 1, 1, 5000, int64(len(request) - 1)} {
		r.forget(sent)
		if !bytes.Equal(r.from(sent), request[sent:]) {
			t.Errorf("from %d there are %d bytes, which are not the request's", sent, len(r.from(sent)))
		}
	}
	if r.forget(int64(len(request))); r.buf != nil || r.from(int64(len(request))) != nil {
		t.Error("all was sent, and something is held")
	}
	more := messages(2, 300)
	grow(&r, more)
	if at := int64(len(request)); r.start != at || !bytes.Equal(r.from(at+100), more[100:]) {
		t.Errorf("what comes later is not at its place: %d, want %d", r.start, at)
	}
	r.release()
	r.release() // nothing is given back twice
	if r.buf != nil || replaysHeld.Load() != 0 {
		t.Error("it was released, and something is held")
	}
}

// What one call and all of them may keep is bounded, and a small buffer is always there.
func TestReplayBounds(t *testing.T) {
	r := replay{keep: true}
	defer r.release()
	grow(&r, make([]byte, maxReplay-1))
	if !r.fits(1) || r.fits(2) {
		t.Errorf("1 byte more fits: %t, 2: %t", r.fits(1), r.fits(2))
	}
	if want := int64(maxReplay - smallBuffer); r.held != want {
		t.Errorf("%d bytes are counted, want %d", r.held, want)
	}
	others := maxReplays - replaysHeld.Load()
	replaysHeld.Add(others)
	defer replaysHeld.Add(-others)
	s := replay{keep: true}
	defer s.release()
	if !s.fits(smallBuffer) || s.fits(smallBuffer+1) || s.held != 0 {
		t.Errorf("all is taken: a small buffer fits: %t, more: %t; %d bytes counted", s.fits(smallBuffer), s.fits(smallBuffer+1), s.held)
	}
}

// Buffers grow over their sizes without losing a byte, and none is in two hands.
func TestPooledBuffers(t *testing.T) {
	want := messages(3, 300<<10)
	for _, step := range []int{1, 100, smallBuffer - 1, smallBuffer, smallBuffer + 1, 70000} {
		var a, b []byte
		for i := 0; i < len(want); i += step {
			p := want[i:min(i+step, len(want))]
			a, b = AppendPooled(a, p), AppendPooled(b, p)
			if step == 1 && i > 3*smallBuffer {
				break
			}
		}
		if !bytes.Equal(a, want[:len(a)]) || !bytes.Equal(b, a) {
			t.Errorf("in steps of %d: bytes are lost or mixed up", step)
		}
		clear(a)
		if !bytes.Equal(b, want[:len(b)]) {
			t.Errorf("in steps of %d: two buffers share memory", step)
		}
		PutBuffer(a)
		PutBuffer(b)
	}
	PutBuffer(nil)
	if b := AppendPooled(nil, nil); len(b) != 0 {
		t.Errorf("%d bytes of nothing", len(b))
	}
}
