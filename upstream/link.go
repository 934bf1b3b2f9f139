package upstream

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Link is how the connections of an endpoint are: whether they can be made (Backoff), whether they can take another call
// (NoRoom), and since when there are any. Every State that is attached shows it among its own reasons, so that pickers test one
// word. The zero value has no connections and nothing against them. All methods may be called concurrently.
//
// A change shows at once. Watchers of the States are told of it by Tell.
type Link struct {
	reasons   atomic.Uint32
	connected atomic.Int64 // Unix nanoseconds

	mu       sync.Mutex // taken before a State's
	attached []attached
	news     []func() // in the order of the changes
	telling  bool     // somebody is at it
}

// attached is a State and how often it was attached: each of those who share it does that.
type attached struct {
	state *State
	times int
}

// Has tells whether one of the reasons is set.
func (l *Link) Has(r Reason) bool { return l.reasons.Load()&uint32(r) != 0 }

// SetBackoff sets or clears Backoff. It returns whether that changed anything; then Tell is to be called.
func (l *Link) SetBackoff(yes bool) (changed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.Has(Backoff) == yes {
		return false
	}
	add, remove := Backoff, Reason(0)
	if yes {
		l.reasons.Or(uint32(Backoff))
	} else {
		l.reasons.And(^uint32(Backoff))
		add, remove = remove, add
	}
	for _, a := range l.attached {
		_, tell := a.state.change(add, remove, "")
		l.news = append(l.news, tell)
	}
	return true
}

// SetConnected records that there is a connection since t, or none any more (zero t). It returns whether that changed anything;
// then Tell is to be called.
func (l *Link) SetConnected(t time.Time) (changed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.IsZero() {
		changed = l.connected.Swap(0) != 0
	} else {
		changed = l.connected.CompareAndSwap(0, t.UnixNano())
	}
	for _, a := range l.attached {
		if a.state.setConnected(t) {
			l.news = append(l.news, func() { a.state.notify(Disconnected) })
		}
	}
	return changed
}

// SetRoom sets or clears NoRoom. It returns whether there is room again; then Tell is to be called.
func (l *Link) SetRoom(room bool) (changed bool) {
	if room == !l.Has(NoRoom) {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if room {
		l.reasons.And(^uint32(NoRoom))
	} else {
		l.reasons.Or(uint32(NoRoom))
	}
	for _, a := range l.attached {
		a.state.SetRoom(room)
	}
	if room {
		l.stirLocked()
	}
	return room
}

// Stir is for what calls that wait may want to know, though it changes no reason: a dial is over, say. Tell is to be called then.
func (l *Link) Stir() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stirLocked()
}

func (l *Link) stirLocked() {
	for _, a := range l.attached {
		l.news = append(l.news, func() { a.state.notify(Stirred) })
	}
}

// Tell tells the States' watchers what has changed, in that order. Whoever has changed something calls it when he holds no
// lock. If somebody is telling already, he tells this as well.
func (l *Link) Tell() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.telling {
		return
	}
	l.telling = true
	for len(l.news) > 0 {
		news := l.news
		l.news = nil
		l.mu.Unlock()
		for _, tell := range news {
			tell()
		}
		l.mu.Lock()
	}
	l.telling = false
}

// Attach has the State show how the connections are until detach is called. Nothing is held against them from then on: nobody
// would tell the State that it is over.
func (l *Link) Attach(s *State) (detach func()) {
	l.mu.Lock()
	if i := l.placeLocked(s); i >= 0 {
		l.attached[i].times++
	} else {
		l.attached = append(l.attached, attached{s, 1})
		is := Reason(l.reasons.Load())
		_, tell := s.change(is&Backoff, Backoff&^is, "")
		l.news = append(l.news, tell)
		s.SetRoom(is&NoRoom == 0)
		s.connected.Store(l.connected.Load())
	}
	l.mu.Unlock()
	l.Tell()
	return sync.OnceFunc(func() { l.detach(s) })
}

func (l *Link) detach(s *State) {
	l.mu.Lock()
	i := l.placeLocked(s)
	if l.attached[i].times--; l.attached[i].times == 0 {
		l.attached = slices.Delete(l.attached, i, i+1)
		_, tell := s.change(0, Backoff, "")
		l.news = append(l.news, tell)
		s.SetRoom(true)
	}
	l.mu.Unlock()
	l.Tell()
}

func (l *Link) placeLocked(s *State) int {
	return slices.IndexFunc(l.attached, func(a attached) bool { return a.state == s })
}
