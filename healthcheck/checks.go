package healthcheck

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// checksKey tells, in a State's memory, checks of one configuration from those of another.
type checksKey struct{ config string }

// checks are all the checks of one configuration on one endpoint, shared by the handlers that have this configuration.
// They run while at least one does.
type checks struct {
	mu       sync.Mutex
	users    int
	settings atomic.Pointer[Active] // of who joined last: earlier ones may have been unloaded
	state    *upstream.State
	target   Target
	ctx      context.Context
	cancel   context.CancelFunc
	running  map[string]*checker // by service
	perRPC   bool
	logged   atomic.Bool // that the server has no health service
}

// join begins to use the checks.
func (g *checks) join(a *Active, info *upstream.Endpoint, end *transport.Endpoint) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.users++
	g.settings.Store(a)
	if g.users > 1 {
		return
	}
	cfg := a.transport(info)
	addr := withPort(upstream.Address{Network: info.Network, Dial: info.Address}, a.Port)
	conns := &connections{end: end, addr: addr, cfg: cfg}
	if a.Port == 0 {
		conns.calls = end
	}
	g.state = end.State
	g.target = Target{Endpoint: info, Address: addr, Transport: cfg, Timeout: time.Duration(a.Timeout), conns: conns}
	g.target.noService = func(why string) { g.noService(info.Address, why) }
	g.ctx, g.cancel = context.WithCancel(context.Background())
	g.running = make(map[string]*checker)
	names, perRPC := []string{""}, false
	if p, ok := a.prober.(ServiceProber); ok {
		if names, perRPC = p.AskAbout(); len(names) == 0 {
			names = []string{""}
		}
	}
	g.perRPC = perRPC
	for _, name := range names {
		g.startLocked(name, false)
	}
	if perRPC {
		for _, name := range g.remembered() {
			g.startLocked(name, true)
		}
		g.publishLocked()
	}
}

// leave is join's counterpart.
func (g *checks) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.users--
	if g.users > 0 {
		return
	}
	g.cancel()
	for _, c := range g.running {
		c.stop()
	}
	g.target.conns.close()
	if g.perRPC {
		g.state.SetServices(nil, nil)
	}
	g.running = nil
}

func (g *checks) startLocked(service string, perRPC bool) {
	if g.running[service] != nil {
		return
	}
	c := newChecker(g, service, perRPC)
	g.running[service] = c
	c.start()
}

// maxServices bounds how many services are asked about because calls name them: clients choose these names.
const maxServices = 64

// serviceNames remembers the services that calls have named, in the State's memory.
type serviceNames struct {
	mu    sync.Mutex
	names []string
}

type serviceNamesKey struct{ question string }

func (g *checks) names() *serviceNames {
	return g.state.Memory(serviceNamesKey{g.settings.Load().question}, func() any { return new(serviceNames) }).(*serviceNames)
}

func (g *checks) remembered() []string {
	n := g.names()
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.names)
}

// missing is told of a service that a call names and that is not asked about yet. It is on the call's path, so if
// somebody is faster it leaves the service to the next call.
func (g *checks) missing(service string) {
	if !g.mu.TryLock() {
		return
	}
	defer g.mu.Unlock()
	if g.running == nil || g.running[service] != nil {
		return
	}
	n := g.names()
	n.mu.Lock()
	if len(n.names) < maxServices && !slices.Contains(n.names, service) {
		n.names = append(n.names, service)
	}
	n.mu.Unlock()
	g.startLocked(service, true)
	g.publishLocked()
}

// publish tells which services are being served.
func (g *checks) publish() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.running != nil && g.perRPC {
		g.publishLocked()
	}
}

func (g *checks) publishLocked() {
	services := make(map[string]upstream.Service, len(g.running))
	for name, c := range g.running {
		services[name] = c.is()
	}
	missing := g.missing
	if len(services) >= maxServices {
		missing = nil
	}
	g.state.SetServices(services, missing)
}

// noService logs, once, that the server has no health service.
func (g *checks) noService(address, why string) {
	if g.logged.CompareAndSwap(false, true) {
		g.settings.Load().logger.Info("upstream has no health service", zap.String("upstream", address), zap.String("reason", why))
	}
}
