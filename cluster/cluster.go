// Package cluster holds a handler's endpoints over time. It joins what is configured with what sources find, keeps each
// endpoint's connections and state for as long as they are of use, and publishes what calls need as one immutable View.
package cluster

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// View is what a call needs to find its endpoint. It is immutable and replaced as a whole.
type View struct {
	Picker   selection.Picker
	Snapshot *upstream.Snapshot
	// Endpoints are by upstream.Endpoint.Index: the live ones and then those that drain.
	Endpoints []Endpoint
	// Pending: the view lacks the first list of a source.
	Pending bool
	// Err is why a source has no list, nil if all have.
	Err error
	// Starting: the companions have not been started, before which nothing is known about the endpoints' health. Calls are to
	// wait.
	Starting bool
	// Panic: so few endpoints are healthy that health is to be disregarded.
	Panic bool

	used []bool // by the policy, by index; nil: all live ones
}

// Endpoint is one of a View's: its connections, and what the cluster's handler thinks of it. Other handlers may have the same
// connections and think otherwise.
type Endpoint struct {
	*transport.Endpoint
	State *upstream.State
}

// Config says what a Cluster is made of.
type Config struct {
	// Static are the configured endpoints. If there is a source that is Preferred, they are its substitute until it has
	// a list.
	Static []upstream.Endpoint
	// Sources find further endpoints.
	Sources []Source
	// Policy chooses among all of them.
	Policy selection.Policy
	// Transport says how an endpoint is reached.
	Transport func(*upstream.Endpoint) transport.Config
	// Health names what the handler means by an endpoint's health (healthcheck.Config.Identity). Clusters where it is the same
	// share what is known of endpoints that they reach in the same way.
	Health string
	// Configuration is what the handler belongs to. Handlers of one configuration that have different limits for an endpoint
	// will go on having them, so that is told of.
	Configuration any
	// DrainTimeout is how long calls may go on on an endpoint that has left the list.
	DrainTimeout time.Duration
	// Cut ends the calls that still run on an endpoint when that is over, and tells how many there were.
	Cut func(*transport.Endpoint) int
	// Drained is told of endpoints that have left the list, since when and why, when the last call on them has ended, or was
	// ended. It must not block. Nil: nobody is told.
	Drained func(e *upstream.Endpoint, since time.Time, why string)
	// Companions are started for each endpoint when it comes, or when the policy begins to use it, and stopped when it goes,
	// or is not used any more.
	Companions []Companion
	// Hold makes calls wait for the companions to be started.
	Hold bool
	// Warmth is the part of its weight that an endpoint has at the moment, from just above 0 to 1. Nil: it is always 1.
	Warmth func(*upstream.State) float64
	// Panics tells whether so few endpoints being usable is a panic. Nil: never.
	Panics func(usable, endpoints int) bool
	// Changed is told of every new view, and of everything that changes an endpoint's condition or what is known of its
	// services. It must not block, and must not call the cluster's methods but View. Nil: nobody is told.
	Changed func()
	Logger  *zap.Logger
}

// Companion looks after an endpoint (health checks, load reports) from the call on until stop is called.
type Companion func(*upstream.Endpoint, *transport.Endpoint) (stop func())

// Cluster is a handler's endpoints.
type Cluster struct {
	cfg  Config
	view atomic.Pointer[View]

	waiting waiting
	running atomic.Bool // between Start and Close

	mu         sync.Mutex
	generation uint64
	sources    []*source
	members    map[memberKey]*member
	live       []*member // in the list's order
	draining   []*member // in the order in which they left
	started    bool
	closed     bool
	panicking  bool
	differs    bool        // it was told of that another handler has another max_conns
	surplus    int         // how many endpoints were named more than once, when that was last logged
	rebuild    *time.Timer // debounces changes
	dueAt      time.Time   // when rebuild fires; zero if it does not
	relist     bool        // the list has changed, not only somebody's health
	sweeper    *time.Timer
	sweeping   bool // sweeper is set
	ctx        context.Context
	cancel     context.CancelFunc
}

// New makes a cluster. It takes endpoints from transport's pool and starts nothing.
func New(cfg Config) (*Cluster, error) {
	c := &Cluster{cfg: cfg, members: make(map[memberKey]*member)}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	for _, s := range cfg.Sources {
		src, err := c.newSource(s)
		if err != nil {
			c.Close()
			return nil, err
		}
		c.sources = append(c.sources, src)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.listLocked(); err != nil {
		c.mu.Unlock()
		c.Close()
		c.mu.Lock()
		return nil, err
	}
	c.publishLocked()
	return c, nil
}

// View is what is known now. Calls ask once per attempt.
func (c *Cluster) View() *View { return c.view.Load() }

// Start begins to watch the sources and makes the first connections. It is called when the configuration has come into
// force, at most once.
func (c *Cluster) Start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.started {
		return
	}
	c.started = true
	c.running.Store(true)
	for _, m := range c.live {
		c.useLocked(m)
	}
	c.attendLocked(c.View().used)
	for _, s := range c.sources {
		go s.watch(c.ctx)
	}
	if c.cfg.Hold || c.cfg.Warmth != nil { // those that are new are usable from now on only
		c.publishLocked()
	}
}

// Close gives back what the cluster holds. Calls that still run may go on with the last view.
func (c *Cluster) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	c.running.Store(false)
	c.cancel()
	for _, t := range []*time.Timer{c.rebuild, c.sweeper} {
		if t != nil {
			t.Stop()
		}
	}
	for _, m := range c.live {
		m.abandon()
		m.release()
	}
	for _, m := range c.draining {
		m.abandon()
		c.lingerLocked(m)
	}
	if v := c.view.Load(); v != nil { // a call that waited, asks the view again
		last := *v
		last.Pending, last.Starting = false, false
		c.view.Store(&last)
	}
	c.endWaiting()
	for _, s := range c.sources {
		s.lease.Release()
	}
}

const (
	// debounce is how long changes are gathered before a new view is made of them, ±50 %.
	debounce = 100 * time.Millisecond
	// memoryTime is how long an endpoint that has left the list is remembered at least, with its connections, its health
	// and what was learned about it.
	memoryTime = time.Minute
	// sweepEvery is how often endpoints that drain are looked at.
	sweepEvery = time.Second
)

// changeLocked makes a new view of what has changed: soon, or right away.
func (c *Cluster) changeLocked(list, now bool) {
	if c.closed {
		return
	}
	c.relist = c.relist || list
	wait := jitter(debounce)
	if now {
		wait = 0
	}
	c.changeLaterLocked(wait)
}

// changeLaterLocked makes a new view after a while, if none is due before.
func (c *Cluster) changeLaterLocked(wait time.Duration) {
	if c.closed {
		return
	}
	due := time.Now().Add(wait)
	if !c.dueAt.IsZero() && !due.Before(c.dueAt) {
		return
	}
	c.dueAt = due
	if c.rebuild == nil {
		c.rebuild = time.AfterFunc(wait, c.apply)
		return
	}
	c.rebuild.Reset(wait)
}

func (c *Cluster) apply() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dueAt = time.Time{}
	if c.closed {
		return
	}
	if c.relist {
		c.relist = false
		if err := c.listLocked(); err != nil {
			c.cfg.Logger.Error("cannot take over the new list of upstreams; the last one stays in force", zap.Error(err))
			return
		}
	}
	c.publishLocked()
}

// publishLocked makes the view that calls see from now on.
func (c *Cluster) publishLocked() {
	c.generation++
	draining := make([]*member, 0, len(c.draining))
	for _, m := range c.draining {
		if !m.cut { // else not even a policy that binds clients may use it any more
			draining = append(draining, m)
		}
	}
	s := &upstream.Snapshot{
		Generation: c.generation,
		Endpoints:  make([]upstream.Endpoint, len(c.live)),
		Draining:   make([]upstream.Endpoint, len(draining)),
	}
	v := &View{Snapshot: s, Endpoints: make([]Endpoint, 0, len(c.live)+len(draining))}
	for _, part := range []struct {
		members []*member
		out     []upstream.Endpoint
	}{{c.live, s.Endpoints}, {draining, s.Draining}} {
		for i, m := range part.members {
			m.info.Index = len(v.Endpoints)
			part.out[i] = m.info
			v.Endpoints = append(v.Endpoints, Endpoint{m.end, m.info.State})
		}
	}
	v.used = c.uses(s)
	unused := c.attendLocked(v.used) // before anything looks at their health, or at how long they are usable
	c.warmLocked(s)
	c.panicLocked(v)
	v.Picker = c.cfg.Policy.Build(s)
	for _, src := range c.sources {
		if src.err != nil && !src.found {
			v.Err = fmt.Errorf("%s: %w", src.Name, src.err)
		}
	}
	v.Pending = c.lacksLocked()
	v.Starting = c.cfg.Hold && !c.started
	c.view.Store(v)
	c.stir()
	c.tell()
	for _, m := range unused {
		m.leaveAlone()
	}
}

// tell reports a change.
func (c *Cluster) tell() {
	if c.cfg.Changed != nil {
		c.cfg.Changed()
	}
}

// lacksLocked tells whether calls had better wait for a source's first list.
func (c *Cluster) lacksLocked() bool {
	for _, s := range c.sources {
		if !s.answered && (s.Preferred || len(c.cfg.Static) == 0) {
			return true
		}
	}
	return false
}
