package transport

import (
	"container/heap"
	"math"
	"net/netip"
	"slices"
	"sort"
	"time"
)

// line is the calls that wait for a stream of an endpoint, the one with the earliest deadline first. When there are too
// many, the client that has most of them gives way. It is data only: Endpoint guards it with its lock, and tells the waiters.
type line struct {
	waiters []*Ticket // sorted
	clients map[netip.Addr]*party
	largest parties
	seq     uint64

	pace pace
	took took
}

// mostEvicted bounds how many calls give way to one.
const mostEvicted = 64

// admit gives a call its place in the line, if less than limit are there and it can be served in time at the pace that was
// seen. To a call of a client that has few others in the line the latest calls of the client that has most give way: these
// are returned. ok is false if the call has no place; late tells that it would come too late.
func (l *line) admit(w *Ticket, now time.Time, limit int) (evicted []*Ticket, late, ok bool) {
	if w.seq == 0 { // else it was in the line before, and keeps its place
		l.seq++
		w.seq = l.seq
	}
	surplus, behind := len(l.waiters)+1-limit, l.tooFarBack(w, now)
	if n := max(surplus, behind); n > 0 {
		if evicted = l.giveWay(w, n, behind > 0); evicted == nil {
			return nil, behind > surplus, false
		}
		for _, v := range evicted {
			l.remove(v)
		}
	}
	l.insert(w, now)
	return evicted, false, true
}

// tooFarBack is how many places the call is behind the last one that is served in time.
func (l *line) tooFarBack(w *Ticket, now time.Time) int {
	rate, known := l.pace.rate(now)
	if !known || len(l.waiters) == 0 {
		return 0
	}
	left := w.due.Sub(now)
	if w.bound {
		left -= l.took.typical()
	}
	served := max(left.Seconds()*rate, 1) // the first may always hope: how else could be seen that it is better now?
	return max(l.place(w)+1-int(min(served, math.MaxInt32)), 0)
}

// place is where the call is, or would be, in the line.
func (l *line) place(w *Ticket) int {
	return sort.Search(len(l.waiters), func(i int) bool { return !l.waiters[i].before(w) })
}

// giveWay finds n calls that give way to w, of the client that has most of all. It returns nil if that client would have
// less than the other then. ahead: only calls ahead of w are of use.
func (l *line) giveWay(w *Ticket, n int, ahead bool) []*Ticket {
	own := 0
	if p := l.clients[w.Client]; p != nil {
		own = len(p.waiters)
	}
	if n > mostEvicted || len(l.largest) == 0 || len(l.largest[0].waiters)-n < own+1 {
		return nil
	}
	victims := make([]*Ticket, 0, n)
	for _, v := range slices.Backward(l.largest[0].waiters) {
		if ahead && w.before(v) {
			continue
		}
		if victims = append(victims, v); len(victims) == n {
			return victims
		}
	}
	return nil
}

// trim takes out those that are too many, as admit does, and returns them.
func (l *line) trim(limit int) (evicted []*Ticket) {
	for len(l.waiters) > max(limit, 0) {
		p := l.largest[0]
		v := p.waiters[len(p.waiters)-1]
		l.remove(v)
		evicted = append(evicted, v)
	}
	return evicted
}

func (l *line) insert(w *Ticket, now time.Time) {
	if len(l.waiters) == 0 && l.pace.begin(now) {
		l.took = 0
	}
	l.waiters = slices.Insert(l.waiters, l.place(w), w)
	p := l.clients[w.Client]
	if p == nil {
		if l.clients == nil {
			l.clients = make(map[netip.Addr]*party)
		}
		p = &party{client: w.Client}
		l.clients[w.Client] = p
		heap.Push(&l.largest, p)
	}
	p.waiters = append(p.waiters, w)
	heap.Fix(&l.largest, p.at)
}

// remove takes a call out. It returns false if it is not in the line any more.
func (l *line) remove(w *Ticket) bool {
	i := l.place(w)
	if i == len(l.waiters) || l.waiters[i] != w {
		return false
	}
	l.waiters = slices.Delete(l.waiters, i, i+1)
	p := l.clients[w.Client]
	p.waiters = slices.DeleteFunc(p.waiters, func(v *Ticket) bool { return v == w })
	if len(p.waiters) > 0 {
		heap.Fix(&l.largest, p.at)
	} else {
		heap.Remove(&l.largest, p.at)
		delete(l.clients, w.Client)
	}
	return true
}

// next takes out the call whose turn it is, and those before it that cannot be answered in time any more: their streams
// would be of no use to anybody. If there is nobody else to have the stream, the last of them gets it all the same.
func (l *line) next(now time.Time) (w *Ticket, dropped []*Ticket) {
	for len(l.waiters) > 0 {
		w = l.waiters[0]
		l.remove(w)
		if !w.bound || len(l.waiters) == 0 || w.due.Sub(now) >= l.took.typical() {
			return w, dropped
		}
		dropped = append(dropped, w)
	}
	return nil, dropped
}

// party is one client's calls in a line, as they came.
type party struct {
	client  netip.Addr
	waiters []*Ticket
	at      int
}

// parties is a heap (container/heap), the client with most calls first.
type parties []*party

func (p parties) Len() int           { return len(p) }
func (p parties) Less(i, j int) bool { return len(p[i].waiters) > len(p[j].waiters) }

func (p parties) Swap(i, j int) {
	p[i], p[j] = p[j], p[i]
	p[i].at, p[j].at = i, j
}

// Push is heap's.
func (p *parties) Push(x any) {
	c := x.(*party)
	c.at = len(*p)
	*p = append(*p, c)
}

// Pop is heap's.
func (p *parties) Pop() any {
	old := *p
	last := old[len(old)-1]
	old[len(old)-1] = nil
	*p = old[:len(old)-1]
	return last
}

// pace is how fast streams become free while calls wait for them, with the weight of the past falling off.
type pace struct {
	freed float64
	busy  float64 // seconds
	at    time.Time
}

const (
	paceMemory = 5 * time.Second
	// paceForgotten is how long nobody has waited when what was seen counts no more.
	paceForgotten = 10 * time.Second
	// paceEnough is how many streams in how much time tell a pace: the first of a burst may take longer than the others.
	paceEnough     = 4
	paceEnoughTime = time.Second / 2
)

// begin tells that somebody waits, where nobody did. It returns true if the past is forgotten.
func (p *pace) begin(now time.Time) (fresh bool) {
	if fresh = now.Sub(p.at) > paceForgotten; fresh {
		*p = pace{}
	}
	p.at = now
	return fresh
}

// passed tells that a stream has become free for those who wait.
func (p *pace) passed(now time.Time) {
	p.freed, p.busy = p.now(now)
	p.freed++
	p.at = now
}

func (p *pace) now(now time.Time) (freed, busy float64) {
	f := math.Exp(-now.Sub(p.at).Seconds() / paceMemory.Seconds())
	return p.freed * f, p.busy*f + paceMemory.Seconds()*(1-f)
}

// rate is how many streams become free per second.
func (p *pace) rate(now time.Time) (rate float64, known bool) {
	freed, busy := p.now(now)
	if freed < paceEnough || busy < paceEnoughTime.Seconds() {
		return 0, false
	}
	return freed / busy, true
}

// took is the median of how long calls took that had waited: it goes up with every longer one and down with every shorter.
type took time.Duration

func (t *took) add(d time.Duration) {
	switch {
	case *t == 0:
		*t = took(d)
	case d > time.Duration(*t):
		*t += *t/50 + 1
	default:
		*t -= *t / 50
	}
}

// typical is how much time a call should have when it gets a stream: twice the median.
func (t took) typical() time.Duration { return 2 * time.Duration(t) }
