package proxy

import (
	"math/rand/v2"
	"sync"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// drainShards spreads the registry of running flights over several locks, so that calls do not queue up for one.
const drainShards = 16

// drain knows the flights that run, and ends them. The zero value is ready.
type drain struct{ shards [drainShards]drainShard }

type drainShard struct {
	mu      sync.Mutex
	flights []*Flight // each at its place; nil where there is none
	free    []int     // such places
	// ended is set once the flights were ended; one that comes after is ended at once.
	ended *Failure
	_     [64]byte // keeps neighbours off the cache line
}

// drainEntry is a flight's place in the registry.
type drainEntry struct {
	shard *drainShard
	place int
	noted bool // somebody has the flight from here
}

// enter puts a flight into the registry. It returns why the flight must end at once, nil if it need not.
func (d *drain) enter(f *Flight) *Failure {
	s := &d.shards[rand.Uint32()%drainShards] //nolint:gosec // spreading load
	s.mu.Lock()
	defer s.mu.Unlock()
	last := len(s.free) - 1
	if last < 0 {
		f.drained = drainEntry{shard: s, place: len(s.flights)}
		s.flights = append(s.flights, f)
		return s.ended
	}
	f.drained = drainEntry{shard: s, place: s.free[last]}
	s.free = s.free[:last]
	s.flights[f.drained.place] = f
	return s.ended
}

// leave takes a flight out, if it is in.
func (d *drain) leave(f *Flight) {
	e := &f.drained
	if e.shard == nil {
		return
	}
	e.shard.mu.Lock()
	defer e.shard.mu.Unlock()
	s := e.shard
	e.shard = nil
	s.flights[e.place] = nil
	if s.free = append(s.free, e.place); len(s.free) == len(s.flights) && len(s.free) > keptPlaces {
		s.flights, s.free = nil, nil
	}
}

// keptPlaces is how many places a shard keeps when nobody is there: who looks for flights looks at all of them.
const keptPlaces = 256

// each calls f with every flight that runs, under the shard's lock.
func (d *drain) each(f func(*Flight)) {
	for i := range d.shards {
		s := &d.shards[i]
		s.mu.Lock()
		for _, x := range s.flights {
			if x != nil {
				f(x)
			}
		}
		s.mu.Unlock()
	}
}

// endWhere ends the flights that match, without a lock held. It returns how many there were.
func (d *drain) endWhere(match func(*Flight) bool, why *Failure) int {
	var flights []*Flight
	d.each(func(f *Flight) {
		if match(f) {
			f.drained.noted = true
			flights = append(flights, f)
		}
	})
	for _, f := range flights {
		f.Cut(why)
	}
	return len(flights)
}

// Running is how many calls there are.
func (p *Proxy) Running() int {
	n := 0
	p.drain.each(func(*Flight) { n++ })
	return n
}

// EndAll ends every call that runs, and every one that still comes. It returns how many there were.
func (p *Proxy) EndAll(why *Failure) int {
	for i := range p.drain.shards {
		s := &p.drain.shards[i]
		s.mu.Lock()
		s.ended = why
		s.mu.Unlock()
	}
	return p.drain.endWhere(func(*Flight) bool { return true }, why)
}

// EndOn ends the calls whose current attempt is on the endpoint. It returns how many there were.
func (p *Proxy) EndOn(end *transport.Endpoint, why *Failure) int {
	return p.drain.endWhere(func(f *Flight) bool { return f.on.Load() == end }, why)
}

// NoteCalls notes how far the calls on an endpoint are. endThem ends those that are no farther by then, since the endpoint hangs.
func (p *Proxy) NoteCalls(end *transport.Endpoint) (endThem func(why *Failure) int) {
	moved := make(map[*Flight]int64)
	p.drain.each(func(f *Flight) {
		if f.on.Load() == end {
			f.drained.noted = true
			moved[f] = f.moved.Load()
		}
	})
	return func(why *Failure) int {
		return p.drain.endWhere(func(f *Flight) bool {
			before, ok := moved[f]
			return ok && f.moved.Load() == before && f.on.Load() == end
		}, why)
	}
}
