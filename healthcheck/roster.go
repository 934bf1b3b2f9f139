package healthcheck

import (
	"slices"
	"sync"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// roster has the checks of all configurations on one endpoint. During a reload there are two, and handlers that ask the
// same at other times have checks of their own. It lives in the State's memory.
type roster struct {
	state *upstream.State

	mu       sync.Mutex
	checks   map[string]*checks // by Active.config; those that somebody uses
	memories map[memoryKey]*memory

	// See services.go.
	perRPC               bool // the State knows services from here
	services             map[string]*service
	byCalls, byQuestions bucket
	waiting              bool // a service that somebody wants to know of is still to be answered for
	sweeper              *time.Timer
}

type rosterKey struct{}

func rosterOf(s *upstream.State) *roster {
	return s.Memory(rosterKey{}, func() any {
		return &roster{
			state: s, checks: make(map[string]*checks), memories: make(map[memoryKey]*memory), services: make(map[string]*service),
			byCalls: bucket{most: 64, perSecond: 4}, byQuestions: bucket{most: 16, perSecond: 1},
		}
	}).(*roster)
}

// memoryLocked is what is remembered of a check.
func (r *roster) memoryLocked(key memoryKey) *memory {
	mem := r.memories[key]
	if mem == nil {
		mem = new(memory)
		r.memories[key] = mem
	}
	return mem
}

// join makes the checks of a configuration run on the endpoint, or go on.
func (r *roster) join(a *Active, info *upstream.Endpoint, end *transport.Endpoint) {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.checks[a.config]
	if g != nil {
		g.useLocked(append(g.users, a))
		return
	}
	g = newChecks(r, a, info, end)
	r.checks[a.config] = g
	if g.startLocked(); g.perRPC {
		if !r.perRPC {
			r.sweepLocked(time.Now()) // nobody was there to do it
		}
		for name := range r.services {
			g.askLocked(name, true)
		}
		r.publishLocked()
		r.sweepLaterLocked()
	}
}

// leave is join's counterpart. When nobody uses the checks any more nothing is kept that leads to a configuration.
func (r *roster) leave(a *Active) {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.checks[a.config]
	i := slices.Index(g.users, a)
	if users := slices.Delete(g.users, i, i+1); len(users) > 0 {
		g.useLocked(users)
		return
	}
	delete(r.checks, a.config)
	if g.stopLocked(); g.perRPC {
		r.publishLocked()
	}
}

// publish tells which services are being served.
func (r *roster) publish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.publishLocked()
}

func (r *roster) publishLocked() {
	perRPC := false
	for _, g := range r.checks {
		perRPC = perRPC || g.perRPC
	}
	switch {
	case perRPC:
		for name, s := range r.services {
			s.is, s.answered = r.foundLocked(name)
		}
		r.settleLocked(time.Now())
		r.state.SetServices(r.allFoundLocked(), r)
	case r.perRPC:
		r.state.SetServices(nil, nil)
		if r.sweeper != nil {
			r.sweeper.Stop()
			r.sweeper = nil
		}
	}
	r.perRPC = perRPC
}

func (r *roster) allFoundLocked() map[string]upstream.Service {
	all := make(map[string]upstream.Service)
	for _, g := range r.checks {
		if !g.perRPC {
			continue
		}
		for name := range g.running {
			if _, ok := all[name]; ok {
				continue
			}
			is, _ := r.foundLocked(name)
			if s := r.services[name]; s != nil {
				is.Used = &s.used
			}
			all[name] = is
		}
	}
	return all
}

// foundLocked makes one answer of what all the checks found about a service: all of them must like it, as with votes, and
// one of them is enough to know that the endpoint has it.
func (r *roster) foundLocked(name string) (is upstream.Service, answered bool) {
	is.Usable = true
	for _, g := range r.checks {
		c := g.running[name]
		if c == nil || !g.perRPC {
			continue
		}
		its, has := c.found()
		is.Usable = is.Usable && its.Usable
		answered = answered || has
		if its.Known == upstream.Has || is.Known == upstream.Unsure {
			is.Known = its.Known
		}
	}
	return is, answered
}
