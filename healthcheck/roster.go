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
	mu       sync.Mutex
	checks   map[string]*checks // by Active.config; those that somebody uses
	memories map[memoryKey]*memory
}

type rosterKey struct{}

func rosterOf(s *upstream.State) *roster {
	return s.Memory(rosterKey{}, func() any {
		return &roster{checks: make(map[string]*checks), memories: make(map[memoryKey]*memory)}
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
	if g := r.checks[a.config]; g != nil {
		g.useLocked(append(g.users, a))
		return
	}
	g := newChecks(r, a, info, end)
	r.checks[a.config] = g
	g.startLocked()
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
	g.stopLocked()
}
