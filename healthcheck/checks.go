package healthcheck

import (
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// checks are all the checks of one configuration on one endpoint, shared by the handlers that have this configuration.
// They run while at least one does.
type checks struct {
	r        *roster
	settings atomic.Pointer[Active] // the last of users
	state    *upstream.State
	target   Target
	logged   atomic.Bool // that the server has no health service

	// Under the roster's mu.
	users   []*Active // in the order in which they joined: earlier ones may have been unloaded
	running []*checker
}

func newChecks(r *roster, a *Active, info *upstream.Endpoint, end *transport.Endpoint) *checks {
	cfg := a.transport(info)
	addr := withPort(upstream.Address{Network: info.Network, Dial: info.Address}, a.Port)
	conns := &connections{end: end, addr: addr, cfg: cfg}
	if a.Port == 0 {
		conns.calls = end
	}
	g := &checks{r: r, state: info.State}
	g.target = Target{Endpoint: info, Address: addr, Transport: cfg, Timeout: time.Duration(a.Timeout), conns: conns}
	g.target.noService = func(why string) { g.noService(info.Address, why) }
	g.useLocked([]*Active{a})
	return g
}

// useLocked goes on with the users' settings.
func (g *checks) useLocked(users []*Active) {
	g.users = users
	g.settings.Store(users[len(users)-1])
}

// startLocked begins to ask about the server as a whole and about the services that the configuration names.
func (g *checks) startLocked() {
	for _, service := range append([]string{""}, g.settings.Load().services()...) {
		c := newChecker(g, service)
		g.running = append(g.running, c)
		c.start()
	}
}

// stopLocked ends it all.
func (g *checks) stopLocked() {
	for _, c := range g.running {
		c.stop()
	}
	g.target.conns.close()
}

// note notes how far the calls of all who use the checks are, if they want those ended that hang. end is called if the endpoint
// does not answer the check that begins now.
func (g *checks) note() (end func()) {
	var ends []func()
	g.r.mu.Lock()
	users := slices.Clone(g.users)
	g.r.mu.Unlock()
	for _, u := range users {
		if u.EndHungCalls && u.hung != nil {
			ends = append(ends, u.hung(g.target.conns.end))
		}
	}
	return func() {
		for _, end := range ends {
			end()
		}
	}
}

// noService logs, once, that the server has no health service.
func (g *checks) noService(address, why string) {
	if g.logged.CompareAndSwap(false, true) {
		g.settings.Load().logger.Info("upstream has no health service", zap.String("upstream", address), zap.String("reason", why))
	}
}
