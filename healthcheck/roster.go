package healthcheck

import (
	"slices"
	"sync"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// roster has the checks of all configurations on one endpoint. During a reload there are two, and handlers that ask the
// same at other times have checks of their own. It lives in the State's memory.
type roster struct {
	state *upstream.State

	mu     sync.Mutex
	checks map[string]*checks // by Active.config; those that somebody uses
	names  []string           // services that calls have named
	perRPC bool               // the State knows services from here
}

type rosterKey struct{}

func rosterOf(s *upstream.State) *roster {
	return s.Memory(rosterKey{}, func() any { return &roster{state: s, checks: make(map[string]*checks)} }).(*roster)
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
		for _, name := range r.names {
			g.askLocked(name, true)
		}
		r.publishLocked()
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

// maxServices bounds how many services are asked about because calls name them: clients choose these names.
const maxServices = 64

// missing is told of a service that a call names and that is not asked about yet. It is on the call's path, so if
// somebody is faster it leaves the service to the next call.
func (r *roster) missing(service string) {
	if !r.mu.TryLock() {
		return
	}
	defer r.mu.Unlock()
	if !r.perRPC || len(r.names) >= maxServices || slices.Contains(r.names, service) {
		return
	}
	r.names = append(r.names, service)
	for _, g := range r.checks {
		if g.perRPC {
			g.askLocked(service, true)
		}
	}
	r.publishLocked()
}

// publish tells which services are being served.
func (r *roster) publish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.publishLocked()
}

// publishLocked makes of what all the checks found one answer for each service: that all of them must like it, as with
// votes, and that one of them is enough to know that the endpoint has it.
func (r *roster) publishLocked() {
	services := make(map[string]upstream.Service)
	perRPC := false
	for _, g := range r.checks {
		if !g.perRPC {
			continue
		}
		perRPC = true
		for name, c := range g.running {
			is := c.is()
			if other, ok := services[name]; ok {
				is = upstream.Service{Usable: is.Usable && other.Usable, Known: surer(is.Known, other.Known)}
			}
			services[name] = is
		}
	}
	switch {
	case perRPC:
		missing := r.missing
		if len(services) >= maxServices {
			missing = nil
		}
		r.state.SetServices(services, missing)
	case r.perRPC:
		r.state.SetServices(nil, nil)
	}
	r.perRPC = perRPC
}

func surer(a, b upstream.Known) upstream.Known {
	if a == upstream.Has || b == upstream.Unsure {
		return a
	}
	return b
}
