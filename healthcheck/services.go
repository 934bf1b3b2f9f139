package healthcheck

import (
	"maps"
	"sync/atomic"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// service is one that the endpoint is asked about because somebody has named it.
type service struct {
	used   atomic.Bool // by a call, since somebody looked
	came   time.Time
	last   time.Time // when it was seen to be used, at first when it came
	byCall bool      // else only grpc_health wants to know

	// What all the checks have found.
	is       upstream.Service
	answered bool
	refunded bool // what it took of the bucket
}

// Clients choose the names, so most may be made up. What is asked about is bounded by sort: names that the endpoint has not
// got take no room from those that it has, and those that are only asked about none from those that calls name.
type sort uint8

const (
	proven sort = iota // the endpoint says that it has the service
	named              // a call has named it; the endpoint has not said so, or not yet
	wanted             // so has somebody who asked grpc_health
	sorts
)

func (s *service) sort() sort {
	switch {
	case s.is.Known == upstream.Has:
		return proven
	case s.byCall:
		return named
	}
	return wanted
}

// room is for how many of each sort there is.
var room = [sorts]int{proven: 64, named: 64, wanted: 16}

const (
	// trials is how many more that calls name may wait for their first answer: a service that the endpoint has gets its
	// room though others take it all.
	trials = 16
	// inUse is for how long after a call has named it a service does not make room for others.
	inUse = time.Minute
	// forgetAfter is when a service that the endpoint has not got, and that calls do not name any more, is forgotten.
	forgetAfter = 10 * time.Minute
)

// bucket bounds how often somebody makes the endpoint be asked about another service. One that the endpoint has costs
// nothing in the end.
type bucket struct {
	most, perSecond float64
	left            float64
	at              time.Time
}

func (b *bucket) take(now time.Time) bool {
	b.left, b.at = min(b.most, b.left+b.perSecond*now.Sub(b.at).Seconds()), now
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}

func (b *bucket) giveBack() { b.left = min(b.most, b.left+1) }

// Missing is on the call's path, so if somebody is faster it leaves the service to the next call. It implements
// upstream.Asker.
func (r *roster) Missing(name string) {
	if !r.mu.TryLock() {
		return
	}
	defer r.mu.Unlock()
	now := time.Now()
	if !r.perRPC || r.services[name] != nil || !r.byCalls.take(now) || r.crowdedLocked(now) {
		return
	}
	if n := r.countLocked(named); n >= room[named] {
		if idle, ok := r.idleLocked(named, now); ok {
			r.forgetLocked(idle)
		} else if n >= room[named]+trials {
			return
		}
	}
	r.addLocked(name, &service{came: now, last: now, byCall: true})
}

// Ask takes a question of grpc_health's. It implements upstream.Asker.
func (r *roster) Ask(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	switch {
	case !r.perRPC:
		return false
	case r.services[name] != nil:
		return true
	case !r.byQuestions.take(now) || r.crowdedLocked(now):
		return r.waiting // when these are answered there is room
	}
	if r.countLocked(wanted) >= room[wanted] {
		oldest, ok := r.oldestLocked(wanted)
		if !ok {
			r.byQuestions.giveBack()
			return true
		}
		r.forgetLocked(oldest)
	}
	r.addLocked(name, &service{came: now, last: now})
	return true
}

// crowdedLocked tells whether there is no room for one more service that the endpoint has.
func (r *roster) crowdedLocked(now time.Time) bool {
	if r.countLocked(proven) < room[proven] {
		return false
	}
	_, ok := r.idleLocked(proven, now)
	return !ok
}

func (r *roster) addLocked(name string, s *service) {
	r.services[name] = s
	for _, g := range r.checks {
		if g.perRPC {
			g.askLocked(name, true)
		}
	}
	r.sweepLaterLocked()
	r.publishLocked()
}

// forgetLocked makes nobody ask about the service any more. Its calls go by the endpoint as a whole, until it is asked
// about again.
func (r *roster) forgetLocked(name string) {
	delete(r.services, name)
	for _, g := range r.checks {
		g.dropLocked(name)
	}
	maps.DeleteFunc(r.memories, func(k memoryKey, _ *memory) bool { return k.service == name })
}

// settleLocked makes room for services that have turned out to be of another sort.
func (r *roster) settleLocked(now time.Time) {
	r.waiting = false
	var answered [sorts]int
	for _, s := range r.services {
		if s.answered {
			answered[s.sort()]++
		} else {
			r.waiting = r.waiting || s.sort() == wanted
		}
		if s.sort() == proven && !s.refunded {
			s.refunded = true
			if s.byCall {
				r.byCalls.giveBack()
			} else {
				r.byQuestions.giveBack()
			}
		}
	}
	for of := range sorts {
		for ; answered[of] > room[of]; answered[of]-- {
			name, ok := r.idleLocked(of, now)
			if !ok {
				name, ok = r.latestLocked(of)
			}
			if ok { // else calls have just made them another sort
				r.forgetLocked(name)
			}
		}
	}
}

func (r *roster) countLocked(of sort) int {
	n := 0
	for _, s := range r.services {
		if s.sort() == of {
			n++
		}
	}
	return n
}

// idleLocked finds the service that has not been used for longest, if that is long.
func (r *roster) idleLocked(of sort, now time.Time) (name string, ok bool) {
	r.lookLocked(now)
	name, ok = r.oldestLocked(of)
	return name, ok && now.Sub(r.services[name].last) >= inUse
}

func (r *roster) oldestLocked(of sort) (name string, ok bool) {
	return r.firstLocked(of, func(a, b *service) bool { return a.last.Before(b.last) })
}

func (r *roster) latestLocked(of sort) (name string, ok bool) {
	return r.firstLocked(of, func(a, b *service) bool { return a.came.After(b.came) })
}

// firstLocked finds the first, by some order, of those that have been answered for.
func (r *roster) firstLocked(of sort, before func(a, b *service) bool) (name string, ok bool) {
	for n, s := range r.services {
		if s.sort() == of && s.answered && (!ok || before(s, r.services[name])) {
			name, ok = n, true
		}
	}
	return name, ok
}

// lookLocked notes which services calls have named since it looked before.
func (r *roster) lookLocked(now time.Time) {
	for _, s := range r.services {
		if s.used.Swap(false) {
			s.last, s.byCall = now, true
		}
	}
}

// sweepLaterLocked makes sweep come, unless there is nothing for it to do.
func (r *roster) sweepLaterLocked() {
	if r.sweeper == nil && r.countLocked(proven) < len(r.services) {
		r.sweeper = time.AfterFunc(inUse, r.sweep)
	}
}

// sweep forgets what clients have made up.
func (r *roster) sweep() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sweeper == nil {
		return // nobody asks any more
	}
	r.sweeper = nil
	if r.sweepLocked(time.Now()) {
		r.publishLocked()
	}
	r.sweepLaterLocked()
}

func (r *roster) sweepLocked(now time.Time) (forgot bool) {
	r.lookLocked(now)
	for name, s := range r.services {
		if s.sort() != proven && now.Sub(s.last) >= forgetAfter {
			r.forgetLocked(name)
			forgot = true
		}
	}
	return forgot
}
