package upstream

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"weak"
)

// Load is the calls on one address. All States of the address count into the same one, however it is reached and whatever is
// thought of its health: who is busy is so for everybody. The zero value has no calls.
type Load struct {
	// v has, in one word, the calls in flight (its lower half) and those that ever began (the upper half, which overflows).
	v atomic.Uint64
	// limited are the States with a limit; nil if there is none. The slice is replaced, never changed, under mu.
	limited atomic.Pointer[[]*State]
	mu      sync.Mutex
}

// loads are those that somebody has, by Address.Key: weak.Pointer[Load].
var loads sync.Map

// LoadOf is the load of an address, the same for everyone who asks as long as anybody has it. There is no lease to it: a call has
// it, through its State, to its end, which may come long after the configuration that the call came by has gone.
func LoadOf(a Address) *Load {
	key := a.Key()
	for {
		is, ok := loads.Load(key)
		if !ok {
			l := new(Load)
			w := weak.Make(l)
			if _, ok := loads.LoadOrStore(key, w); ok {
				continue // somebody was faster
			}
			runtime.AddCleanup(l, func(key string) { loads.CompareAndDelete(key, w) }, key)
			return l
		}
		if l := is.(weak.Pointer[Load]).Value(); l != nil {
			return l
		}
		loads.CompareAndDelete(key, is) // it is gone, and its cleanup on the way
	}
}

const oneBegun = 1 << 32

// Active is the number of calls in flight.
func (l *Load) Active() int64 { return inFlight(l.v.Load()) }

func (l *Load) begun() uint32 { return uint32(l.v.Load() / oneBegun) }

func inFlight(v uint64) int64 { return int64(int32(v)) } // the lower half, with its sign

func (l *Load) begin() {
	n := inFlight(l.v.Add(oneBegun + 1))
	if limited := l.limited.Load(); limited != nil {
		for _, s := range *limited {
			if n >= s.limit.Load() {
				s.fill()
			}
		}
	}
}

func (l *Load) end() {
	n := inFlight(l.v.Add(^uint64(0)))
	if limited := l.limited.Load(); limited != nil {
		for _, s := range *limited {
			if n < s.limit.Load() {
				s.fill()
			}
		}
	}
}

// setLimit has every call that begins or ends, whichever State it is counted by, look at the limit of s.
func (l *Load) setLimit(s *State, n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s.limit.Store(n)
	var limited []*State
	if old := l.limited.Load(); old != nil {
		limited = slices.DeleteFunc(slices.Clone(*old), func(t *State) bool { return t == s })
	}
	if n != 0 {
		limited = append(limited, s)
	}
	if len(limited) == 0 {
		l.limited.Store(nil)
		return
	}
	l.limited.Store(&limited)
}
