package proxy

import "github.com/caddygrpc/caddy-grpc-proxy/call"

// Most calls are unary, go well at the first endpoint, and are over in a millisecond. What they are made of is most of what the proxy
// allocates, so it is used again. Whoever still has a flight when another call has got it would meddle with that call. So only flights
// are used again of which it is known that nobody has them, and that is known only of those that went the straight way: each place where
// a flight is handed to somebody has its line in alone. All others are left to the garbage collector.

// Recycler is a Downstream that wants to use its Flight again.
type Recycler interface {
	// Recycle is called at most once, after Done and with nothing held, if nobody else will touch the flight any more: neither
	// side's connection, no timer and no list. Flight.Reset makes it as new.
	Recycle()
}

// recycle gives the flight back to its owner, and returns true, if nobody else has it. The flight runs until then and ever after, so that
// what came in spite of that would be left lying.
func (f *Flight) recycle() bool {
	r := f.recycler
	f.recycler = nil
	if !f.alone() {
		return false
	}
	r.Recycle()
	return true
}

// alone tells whether nobody can touch a flight any more whose client's side was told that it is Done.
func (f *Flight) alone() bool {
	a, c := &f.first, &f.choice
	switch {
	case f.result != nil || f.late != nil || !f.answer.complete:
		return false // an inbound may still want to end it
	case f.Call.Result.Attempts != 1 || a.stream == nil || a != c.last:
		return false // another attempt's stream may be the one that is about to be heard of
	case c.waited:
		return false // the cluster or the transport may be about to tell it something
	case !f.replay.ended || f.timer.loose || f.drained.noted:
		return false
	}
	return a.stream.Release()
}

// Reset makes a flight that was recycled as new.
func (f *Flight) Reset() {
	f.Call, f.Request = call.Call{}, Request{}
	f.p, f.drained = nil, drainEntry{}
	f.on.Store(nil)
	f.moved.Store(0)
	f.timer = timer{t: f.timer.t}
	f.progress = progress{}
	f.mu.Lock()
	f.events, f.spare, f.running = nil, nil, false
	f.mu.Unlock()
}
