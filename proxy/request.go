package proxy

import (
	"time"
)

// take takes a piece of the request.
func (f *Flight) take(p []byte, end bool) {
	r := &f.replay
	if r.ended || f.answer.complete {
		return // nobody wants it
	}
	f.moved.Add(int64(len(p)))
	at := r.total
	r.total += int64(len(p))
	r.ended = end
	if a := f.atts[0]; a != nil && f.atts[1] == nil && a.stream != nil && a.sent == at { // as nearly always: nothing waits before it
		n := 0
		if f.keeps(len(p)) {
			r.keepFrom(p, at)
			f.write(a, p, end)
		} else if n = f.write(a, p, end); n < len(p) {
			r.keepFrom(p[n:], at+int64(n))
		}
		f.credit()
		return
	}
	f.keeps(len(p))
	r.keepFrom(p, at)
	for _, a := range f.atts {
		if a != nil {
			f.feed(a)
		}
	}
}

// keeps tells whether the request is still kept for another try, with so many bytes more. If that is too much, the attempt that is
// farthest is the last one. While there is none, what is kept is bounded by what the client may send.
func (f *Flight) keeps(more int) bool {
	r := &f.replay
	if !r.keep || r.fits(more) || f.phase == choosing {
		return r.keep
	}
	var first *attempt
	for _, a := range f.atts {
		if a != nil && a.stream != nil && (first == nil || a.sent > first.sent) {
			first = a
		}
	}
	for _, a := range f.atts {
		if a != nil && a != first {
			f.giveUp(a)
		}
	}
	r.letGo()
	r.forget(first.sent)
	return false
}

// feed sends an attempt what it has not been sent yet.
func (f *Flight) feed(a *attempt) {
	if a.stream == nil {
		return
	}
	f.write(a, f.replay.from(a.sent), f.replay.ended)
	f.replay.forget(f.farthest())
	f.credit()
}

// write sends the attempt a piece of the request, and returns how much was taken. For the rest RecvWriteReady comes.
//
// What the client sent after the body goes no further. gRPC over HTTP/2: "Request → Request-Headers *Length-Prefixed-Message
// EOS". Servers take a second HEADERS of a request for a violation, and close the connection that all clients share. Where
// nothing is left to be sent, an empty DATA frame carries the end.
func (f *Flight) write(a *attempt, p []byte, end bool) int {
	if a.broken || a.ended || len(p) == 0 && !end {
		return 0
	}
	first := a.sent == 0
	n, err := a.stream.TryWrite(p, end)
	a.sent += int64(n)
	before := f.replay.framing.Messages()
	if more := a.sent - f.replay.left; more > 0 { // else another attempt was sent it before
		f.replay.left = a.sent
		f.replay.framing.Add(p[n-int(more) : n])
	}
	if a.work != nil {
		// A message that another attempt was sent before counts by its bytes only.
		a.work.Add(uint64(f.replay.framing.Messages()-before), uint64(n))
	}
	if err != nil {
		a.broken = true // its receiver is told why
		return n
	}
	a.ended = end && n == len(p)
	if a.timed {
		a.asked = time.Since(a.outcome.Start)
	}
	// A unary call's end follows at once: wait a moment for it, so that the whole call leaves in one packet.
	f.touch(a.stream.Conn(), first && !end)
	return n
}

// farthest is how much of the request the attempt that is farthest has been sent.
func (f *Flight) farthest() (sent int64) {
	for _, a := range f.atts {
		if a != nil {
			sent = max(sent, a.sent)
		}
	}
	return sent
}

// credit lets the client send as much as has gone on.
func (f *Flight) credit() {
	if n := f.farthest() - f.replay.credited; n > 0 {
		f.replay.credited += n
		f.d.Consumed(int(n))
	}
}
