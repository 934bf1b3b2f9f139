package cluster

import (
	"sync"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// newsEvery is the least time between two looks at what has changed. Thousands of calls may wait for the verdicts on
// thousands of endpoints, and when there is news each of them looks at all endpoints.
const newsEvery = 10 * time.Millisecond

// newsAfterClose is how often the calls that outlive the cluster look again: it is not told of changes any more.
const newsAfterClose = 50 * time.Millisecond

// news wakes the calls that found no endpoint. While none waits it costs next to nothing.
type news struct {
	mu    sync.Mutex
	ch    chan struct{} // what they wait on; nil while nobody does
	due   bool          // a look is under way
	over  bool          // the cluster is closed
	last  time.Time     // when the last one was
	timer *time.Timer
}

// News returns a channel that is closed when something has changed since by which a call that found no endpoint may find
// one, or by which there is nothing left to wait for. To miss nothing, a call asks for it before it looks for an endpoint.
func (c *Cluster) News() <-chan struct{} {
	n := &c.news
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch == nil {
		n.ch = make(chan struct{})
	}
	if n.over {
		n.soonLocked(c, newsAfterClose)
	}
	return n.ch
}

// stir is called after each change of the view or of an endpoint's state. It never blocks.
func (c *Cluster) stir() {
	n := &c.news
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch != nil {
		n.soonLocked(c, newsEvery-time.Since(n.last))
	}
}

func (n *news) soonLocked(c *Cluster, wait time.Duration) {
	switch {
	case n.due:
		return
	case n.timer == nil:
		n.timer = time.AfterFunc(wait, c.bringNews)
	default:
		n.timer.Reset(wait)
	}
	n.due = true
}

// bringNews looks whether what has changed is of use to those who wait, once for all of them.
func (c *Cluster) bringNews() {
	n := &c.news
	n.mu.Lock()
	n.due, n.last = false, time.Now() // whatever changes from here on is looked at again
	over := n.over
	n.mu.Unlock()
	if !over && !c.View().worthALook() {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch != nil {
		close(n.ch)
		n.ch = nil
	}
}

// endNews lets those who wait look for themselves from now on.
func (c *Cluster) endNews() {
	c.news.mu.Lock()
	c.news.over = true
	c.news.mu.Unlock()
	c.stir()
}

// worthALook tells whether a call that waits had better look for an endpoint again: one may be usable, or none is waited
// for any more.
func (v *View) worthALook() bool {
	waiting := false
	for _, e := range v.Endpoints {
		if v.Panic || e.State.UsableExcept(upstream.Momentary) {
			return true
		}
		waiting = waiting || e.State.Has(upstream.Connecting)
	}
	return !waiting
}
