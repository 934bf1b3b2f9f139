package transport

import (
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// limits are the settings of Config that do not make connections different, so that handlers with other ones share an endpoint all
// the same. Of each the largest in force holds: nobody gets less than what he is configured for.
type limits struct {
	maxConns, queueSize int
	queueTimeout        time.Duration
}

func (c *Config) limits() *limits { return &limits{c.MaxConns, c.QueueSize, c.QueueTimeout} }

// user is a handler that an endpoint is in use by.
type user struct {
	limits
	logger *zap.Logger
	group  any
}

// Use puts the limits of somebody's configuration into force until stop is called, and has the endpoint log to its logger as long
// as nobody comes later. The limits of who made the endpoint hold until somebody uses it, and those of the last user after that.
//
// other is a MaxConns of another user from the same group that is not the same; 0 if there is none. A configuration that takes
// over from another is another group: that they differ for a moment is nothing to tell.
func (e *Endpoint) Use(cfg Config, group any) (other int, stop func()) {
	cfg = cfg.withDefaults()
	u := &user{*cfg.limits(), cfg.Logger, group}
	e.mu.Lock()
	for _, v := range e.users {
		if v.group == group && v.maxConns != u.maxConns {
			other = v.maxConns
		}
	}
	e.users = append(e.users, u)
	e.agreeLocked()
	e.mu.Unlock()
	e.heedLimits()
	return other, sync.OnceFunc(func() {
		e.mu.Lock()
		e.users = slices.DeleteFunc(e.users, func(v *user) bool { return v == u })
		if len(e.users) > 0 {
			e.agreeLocked()
		}
		e.mu.Unlock()
		e.heedLimits()
	})
}

// MaxConns is how many connections are allowed now.
func (e *Endpoint) MaxConns() int { return e.limits.Load().maxConns }

// agreeLocked finds what all the users together make hold.
func (e *Endpoint) agreeLocked() {
	most := e.users[0].limits
	for _, u := range e.users[1:] {
		most.maxConns = max(most.maxConns, u.maxConns)
		most.queueSize = max(most.queueSize, u.queueSize)
		most.queueTimeout = max(most.queueTimeout, u.queueTimeout)
	}
	e.limits.Store(&most)
	e.logger.Store(e.users[len(e.users)-1].logger)
}

// heedLimits makes what there is fit the limits, here and in the clients' parts.
func (e *Endpoint) heedLimits() {
	e.fit()
	e.clients.mu.Lock()
	parts := make([]*Endpoint, 0, len(e.clients.parts))
	for _, p := range e.clients.parts {
		parts = append(parts, p)
	}
	e.clients.mu.Unlock()
	for _, p := range parts {
		p.fit()
	}
}

// fit dials for calls that wait, if more connections are allowed now, and takes those out of use that are too many: the
// newest, which have the fewest streams.
func (e *Endpoint) fit() {
	e.mu.Lock()
	conns := *e.conns.Load()
	surplus := conns[min(len(conns), e.MaxConns()):]
	for _, c := range surplus {
		e.removeLocked(c)
	}
	if len(e.line.waiters) > 0 {
		e.startDialLocked()
	}
	e.trimLocked()
	e.mu.Unlock()
	for _, c := range surplus { // without mu: connections may call back
		c.Shutdown()
	}
}

// mutex is Endpoint.mu. Who has changed the link tells of it as soon as he holds the lock no more.
type mutex struct {
	sync.Mutex
	link    *upstream.Link
	dirty   bool
	refused []refused
}

// refused is a parked call that gets no stream.
type refused struct {
	ticket *Ticket
	err    *Error
}

// changed is for who holds the lock and may have changed the link.
func (m *mutex) changed(yes bool) { m.dirty = m.dirty || yes }

// Unlock is sync.Mutex's, and tells: of the link, and the calls that were turned away.
func (m *mutex) Unlock() {
	dirty, turnedAway := m.dirty, m.refused
	m.dirty, m.refused = false, nil
	m.Mutex.Unlock()
	if dirty {
		m.link.Tell()
	}
	for _, r := range turnedAway {
		r.ticket.Refused(r.err)
	}
}
