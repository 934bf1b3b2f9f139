package cluster

import (
	"container/heap"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Wish is what a call waits for.
type Wish uint8

const (
	// Verdict: an endpoint that can be used, or the certainty that none is to be expected.
	Verdict Wish = iota
	// Usable: an endpoint that can be used, however long that takes.
	Usable
	// Room: another endpoint that can take the call at once, since it has a place in the line of one that cannot.
	Room

	wishes = iota
)

// Waiter is a call that waits, as data. One that is not waiting may be used again.
type Waiter struct {
	// Due is when its wait is over. Those that are due first are woken first.
	Due time.Time
	// Wish is what it waits for.
	Wish Wish
	// Wake is called, once, when there may be what it waits for: it does not wait any more then. It runs without a lock held, and
	// must not block. It may come late: when the call has left meanwhile, and even when it waits again.
	Wake func()

	round uint64 // in which it was woken last; 0 if it never was
	place int    // in its heap, from 1; 0 while it does not wait
}

// lookEvery is the least time between two looks at what has changed. Thousands of calls may wait for the verdicts on
// thousands of endpoints, and when there is news each of those that are woken looks at all endpoints.
const lookEvery = 10 * time.Millisecond

const (
	// lookAfterClose is how often the cluster looks for calls that outlive it: it is not told of changes any more.
	lookAfterClose = 50 * time.Millisecond
	// lookForPlaces is how often the cluster looks for a place in a line that is full: nobody is told of those.
	lookForPlaces = 50 * time.Millisecond
	// askEvery is how often endpoints that cannot be connected to are dialled while calls wait for any of them.
	askEvery = time.Second
)

// waiting is the one way in which calls wait for an endpoint: for a list, a verdict, the end of a backoff, room. Whoever changes
// something says so (stir), which costs next to nothing while nobody waits. A look at the endpoints then, at most every
// lookEvery and once for all calls, finds out whether that is of use to any. As many calls are woken as can be served.
type waiting struct {
	// changes counts what was ever told; seen is how many of them the last look knew of.
	changes, seen atomic.Uint64

	mu sync.Mutex
	// heaps are, of each wish, those that were never woken and those that were, and wait again.
	heaps   [wishes][2]waiters
	waiters int
	round   uint64 // of looks at something new
	tries   int    // looks in this round by which calls were woken
	lacked  bool   // the last look found no place for any
	again   bool   // those that have waited before have their turn
	due     bool   // a look is to be at
	at      time.Time
	looking bool      // one is under way
	last    time.Time // when the last one ended
	asked   time.Time // when endpoints were last asked to be dialled
	timer   *time.Timer
	over    bool // the cluster is closed
}

// heap is the one that a waiter belongs to.
func (n *waiting) heap(w *Waiter) *waiters {
	if w.round == 0 {
		return &n.heaps[w.Wish][0]
	}
	return &n.heaps[w.Wish][1]
}

// wantsLocked tells whether any call has this wish.
func (n *waiting) wantsLocked(wish Wish) bool { return len(n.heaps[wish][0])+len(n.heaps[wish][1]) > 0 }

// Changes counts what has changed. A call that is going to look for an endpoint, and to wait if it finds none, asks before.
func (c *Cluster) Changes() uint64 { return c.waiting.changes.Load() }

// Settled tells whether the view shows what has changed, as far as that matters to a call that finds no endpoint in it: whether there
// is a panic. If it does not, the call has to wait for the next look.
func (c *Cluster) Settled() bool { return c.cfg.Panics == nil || c.waiting.settled() }

func (n *waiting) settled() bool { return n.seen.Load() == n.changes.Load() }

// Wait has the call woken when there may be what it waits for. since is what Changes was before it looked: nothing that has
// changed after that is missed.
func (c *Cluster) Wait(w *Waiter, since uint64) {
	n := &c.waiting
	n.mu.Lock()
	defer n.mu.Unlock()
	heap.Push(n.heap(w), w)
	n.waiters++
	switch {
	case n.over:
		n.lookLocked(c, lookAfterClose)
	case n.changes.Load() != since || !n.settled():
		n.lookLocked(c, lookEvery-time.Since(n.last))
	case w.Wish == Usable:
		n.lookLocked(c, askEvery)
	}
}

// Leave takes a call back that has not been woken. It does nothing if that has happened, or is about to.
func (c *Cluster) Leave(w *Waiter) {
	n := &c.waiting
	n.mu.Lock()
	defer n.mu.Unlock()
	if w.place > 0 {
		heap.Remove(n.heap(w), w.place-1)
		n.waiters--
	}
}

// stir is called after each change of the view, or of an endpoint's state or connections. It never blocks.
func (c *Cluster) stir() {
	n := &c.waiting
	n.changes.Add(1)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.waiters > 0 {
		n.lookLocked(c, lookEvery-time.Since(n.last))
	}
}

// lookLocked has the endpoints looked at after a while, if that is not to be done before.
func (n *waiting) lookLocked(c *Cluster, wait time.Duration) {
	at := time.Now().Add(max(wait, 0))
	if n.due && !at.Before(n.at) {
		return
	}
	n.due, n.at = true, at
	switch {
	case n.looking: // the next one begins some time after its end
	case n.timer == nil:
		n.timer = time.AfterFunc(wait, c.look)
	default:
		n.timer.Reset(wait)
	}
}

// look finds out what there is for those that wait, and wakes them.
func (c *Cluster) look() {
	n := &c.waiting
	n.mu.Lock()
	n.due, n.looking = false, true // whatever changes from here on is looked at again
	now := time.Now()
	changes, over, most := n.changes.Load(), n.over, n.waiters
	ask := n.wantsLocked(Usable) && now.Sub(n.asked) >= askEvery
	n.mu.Unlock()
	if !over {
		c.reconsider()
	}
	v := c.View()
	p := v.prospects(most)
	if ask && !p.usable {
		v.ask()
	}

	n.mu.Lock()
	if n.seen.Swap(changes) != changes || n.lacked || over {
		n.round++
		n.tries = 0
	}
	n.lacked = p.places == 0
	if ask && !p.usable {
		n.asked = now
	}
	woken := n.wakeLocked(p)
	switch {
	case n.waiters == 0:
	case over:
		n.lookLocked(c, lookAfterClose)
	case n.nextLocked(p.room > 0, p.places > 0) != nil: // should those that were woken not want what there is
		n.lookLocked(c, lookEvery)
	case n.wantsLocked(Usable) && p.usable && p.places == 0:
		n.lookLocked(c, lookForPlaces)
	case n.wantsLocked(Usable):
		n.lookLocked(c, askEvery)
	}
	n.mu.Unlock()
	for _, w := range woken {
		w.Wake()
	}

	n.mu.Lock()
	n.looking, n.last = false, time.Now()
	if n.due {
		n.due = false
		n.lookLocked(c, max(n.at.Sub(n.last), lookEvery))
	}
	n.mu.Unlock()
}

// wakeLocked takes out those that are to be woken: as many as there is room for, or a place to queue in. Within one round there is
// no news, so that what is left was of no use to those woken before: then they are twice as many each time.
func (n *waiting) wakeLocked(p prospects) (woken []*Waiter) {
	room, places := int64(p.room)<<n.tries, int64(p.places)<<n.tries
	for places > 0 || room > 0 {
		h := n.nextLocked(room > 0, places > 0)
		if h == nil {
			break
		}
		woken = append(woken, n.takeLocked(h))
		n.again = !n.again
		room--
		places--
	}
	if len(woken) > 0 && n.tries < mostTries {
		n.tries++
	}
	if p.places == 0 && (p.usable || !p.pending) { // they have a right to know
		woken = n.takeAllLocked(woken, Verdict)
	}
	return woken
}

// mostTries is when as many are woken as there are, by all means.
const mostTries = 20

// nextLocked is the heap with the call that is to be woken next, nil if all that could be have been since something has changed. Of
// those that were not woken before it is the one that is due first. Of the others it is the one that was woken longest ago: what
// there was may have been of no use to it, and the same may be true the next time. Each of both kinds has every other turn, so that
// neither can keep the other waiting.
func (n *waiting) nextLocked(room, places bool) *waiters {
	var next [2]*waiters
	for wish := range n.heaps {
		if wish == int(Room) && !room || wish != int(Room) && !places {
			continue
		}
		for i := range n.heaps[wish] {
			h := &n.heaps[wish][i]
			if len(*h) > 0 && (*h)[0].round != n.round && (next[i] == nil || (*h)[0].before((*next[i])[0])) {
				next[i] = h
			}
		}
	}
	if next[0] == nil || n.again && next[1] != nil {
		return next[1]
	}
	return next[0]
}

func (n *waiting) takeAllLocked(woken []*Waiter, wish Wish) []*Waiter {
	for i := range n.heaps[wish] {
		for h := &n.heaps[wish][i]; len(*h) > 0; {
			woken = append(woken, n.takeLocked(h))
		}
	}
	return woken
}

func (n *waiting) takeLocked(h *waiters) *Waiter {
	w := heap.Pop(h).(*Waiter)
	w.round = n.round
	n.waiters--
	return w
}

// endWaiting lets those that wait look for themselves from now on.
func (c *Cluster) endWaiting() {
	c.waiting.mu.Lock()
	c.waiting.over = true
	c.waiting.mu.Unlock()
	c.stir()
}

// prospects is what calls that found no endpoint may hope for.
type prospects struct {
	usable  bool // there is an endpoint for calls
	room    int  // how many more could be sent at once
	places  int  // how many more it would take, at once or when others are done
	pending bool // it is not known yet whether there is one
}

// prospects are those of calls in general. Only some have been somewhere already, or are bound to one that drains.
func (v *View) prospects(most int) (p prospects) {
	p.pending = v.Pending || v.Starting
	if v.Starting {
		return p
	}
	ignore := v.Disregard()
	for _, e := range v.Live() {
		switch s := e.State; {
		case s.UsableExcept(ignore | upstream.NoRoom):
			p.usable = true
			if p.places < most || p.room < most {
				room, places := e.Room(most)
				p.room += room
				p.places += places
			}
		case s.UsableExcept(ignore | upstream.Momentary): // for a while
		case s.UsableExcept(ignore | upstream.Momentary | upstream.Backoff | upstream.Connecting):
			p.pending = p.pending || s.Has(upstream.Connecting) || e.Hopeful()
		}
	}
	p.room, p.places = min(p.room, most), min(p.places, most)
	return p
}

// ask has all endpoints dialled that could not be connected to, and are good apart from that.
func (v *View) ask() {
	ignore := v.Disregard() | upstream.Momentary | upstream.Backoff | upstream.Connecting
	for _, e := range v.Live() {
		if e.State.Has(upstream.Backoff) && e.State.UsableExcept(ignore) {
			e.Ask()
		}
	}
}

// waiters is a heap (container/heap): those that were not woken for longest, and of them the one that is due first, is the first.
type waiters []*Waiter

func (w *Waiter) before(v *Waiter) bool {
	if w.round != v.round {
		return w.round < v.round
	}
	return w.Due.Before(v.Due)
}

func (h waiters) Len() int           { return len(h) }
func (h waiters) Less(i, j int) bool { return h[i].before(h[j]) }

func (h waiters) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i+1, j+1
}

// Push is heap's.
func (h *waiters) Push(x any) {
	w := x.(*Waiter)
	w.place = len(*h) + 1
	*h = append(*h, w)
}

// Pop is heap's.
func (h *waiters) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	last.place = 0
	return last
}
