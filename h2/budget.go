package h2

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
)

// A Budget bounds what the streams of many connections hold together: DATA that has come and was not consumed yet. A window that
// was granted cannot be taken back, so a bound for each stream is none for all of them: a hundred streams that read fast and then
// stop hold a hundred windows that have grown.
//
// As long as what is held, and what grown windows let the peers send, is below the limit, windows grow with use. From there on
// no window grows, and those that have give back no credit beyond the first window. When more than the limit is held all the
// same, the streams that hold the most end, with KindMemory, until it is less again.
type Budget struct {
	limit atomic.Int64
	held  atomic.Int64 // what connections have charged
	grown atomic.Int64 // by how much the windows of streams whose peer may still send exceed their first
	ended atomic.Uint64

	reaping atomic.Bool
	mu      sync.Mutex
	conns   map[*Conn]struct{}
}

// DefaultBudgetLimit is what all streams of a process may hold, unless somebody says otherwise.
const DefaultBudgetLimit = 256 << 20

// ProcessBudget is the budget of connections whose Config names none.
var ProcessBudget = NewBudget(DefaultBudgetLimit)

// NewBudget makes a budget of so many bytes.
func NewBudget(limit int64) *Budget {
	b := &Budget{conns: make(map[*Conn]struct{})}
	b.limit.Store(limit)
	return b
}

// SetLimit changes the limit.
func (b *Budget) SetLimit(n int64) {
	b.limit.Store(n)
	b.check()
}

// Limit is the limit in bytes.
func (b *Budget) Limit() int64 { return b.limit.Load() }

// Held is how many bytes are held, but for less than 16 KiB of each connection.
func (b *Budget) Held() int64 { return b.held.Load() }

// Ended is how many streams were ended because too much was held.
func (b *Budget) Ended() uint64 { return b.ended.Load() }

// near tells whether the budget does not bear windows to grow by so much.
func (b *Budget) near(more int64) bool {
	return b.held.Load()+b.grown.Load()+more > b.limit.Load()
}

func (b *Budget) check() {
	if b.held.Load() > b.limit.Load() && b.reaping.CompareAndSwap(false, true) {
		go b.reap()
	}
}

// chargeStep is in what steps connections charge their budget: small messages never do, and bulk does once or twice for each
// full frame.
const chargeStep = 16 << 10

// releasedLocked takes a stream that holds nothing any more from those that hold something though they have ended.
func (s *Stream) releasedLocked() {
	if s.held == 0 {
		s.c.holders.remove(s)
	}
}

// chargeLocked brings what the connection has charged near to what it holds.
func (c *Conn) chargeLocked() {
	d := c.held - c.charged
	if d > -chargeStep && d < chargeStep && (c.held > 0 || c.charged == 0) {
		return
	}
	c.charged = c.held
	b := c.cfg.Budget
	b.held.Add(d)
	if d > 0 {
		b.check()
	}
}

// setWindowLocked changes a stream's window, and what the budget knows of it.
func (s *Stream) setWindowLocked(n int64) {
	if n == s.window {
		return
	}
	first := int64(s.c.cfg.InitialWindow)
	if d := max(n-first, 0) - max(s.window-first, 0); d != 0 {
		s.c.cfg.Budget.grown.Add(d)
	}
	s.window = n
}

// shrinkLocked notes, as far as the budget is concerned, that nothing more comes on a stream.
func (s *Stream) shrinkLocked() {
	s.setWindowLocked(min(s.window, int64(s.c.cfg.InitialWindow)))
}

func (b *Budget) join(c *Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns[c] = struct{}{}
}

func (b *Budget) leave(c *Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.conns, c)
}

// holder is a stream and what it held when it was looked at.
type holder struct {
	s    *Stream
	held int64
}

// reap ends streams until what is held is a little below the limit.
func (b *Budget) reap() {
	for {
		limit := b.limit.Load()
		excess := b.held.Load() - (limit - limit/16)
		for _, h := range b.holders() {
			if excess <= 0 {
				break
			}
			excess -= h.s.endForMemory()
		}
		b.reaping.Store(false)
		if b.held.Load() <= b.limit.Load() || !b.reaping.CompareAndSwap(false, true) {
			return
		}
	}
}

// holders are the streams that hold something, the greediest first.
func (b *Budget) holders() (all []holder) {
	b.mu.Lock()
	conns := make([]*Conn, 0, len(b.conns))
	for c := range b.conns {
		conns = append(conns, c)
	}
	b.mu.Unlock()
	for _, c := range conns { // each on its own: connections call the budget with their lock held
		c.mu.Lock()
		if c.held > 0 {
			for _, s := range c.streams {
				if s.held > 0 {
					all = append(all, holder{s, s.held})
				}
			}
			for s := c.holders.first; s != nil; s = s.after {
				all = append(all, holder{s, s.held})
			}
		}
		c.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b holder) int { return cmp.Compare(b.held, a.held) })
	return all
}

// endForMemory ends a stream that holds too much, and returns how much that was.
func (s *Stream) endForMemory() int64 {
	c := s.c
	c.mu.Lock()
	n := s.held
	if n == 0 {
		c.mu.Unlock()
		return 0
	}
	e := &Error{Kind: KindMemory, Code: Cancel, Debug: "too much is held for slow readers, most of it for this one"}
	if !c.client {
		e.Code = EnhanceYourCalm // gRPC's clients make RESOURCE_EXHAUSTED of it
	}
	if s.closed {
		s.err = e
		s.forgiveLocked()
	} else {
		s.resetLocked(e.Code, e)
	}
	c.cfg.Budget.ended.Add(1)
	r := s.r
	c.flushLocked()
	if r != nil {
		r.RecvReset(s, e)
	}
	return n
}
