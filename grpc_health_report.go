package grpcproxy

import (
	"cmp"
	"maps"
	"slices"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// report is the answer about one name.
type report struct {
	status grpcwire.ServingStatus
	// pending: upstreams are being asked about the service for the first time.
	pending bool
}

// report finds the answer about a name: of everything, of a group, or of a service.
func (h *Health) report(name string) report {
	current, ours, up := running.look(h.app)
	if !up {
		return report{status: grpcwire.NotServing}
	}
	scope := h.scope(current)
	t := newTally(scope)
	switch {
	case name == "":
		for _, p := range scope {
			t.add(p, nil)
		}
	case h.isGroup(name, current, ours):
		for _, p := range scope {
			if p.Group == name {
				t.add(p, nil)
			}
		}
	default:
		return h.reportService(name, scope)
	}
	return report{status: t.status(h.percent)}
}

// scope are the proxies that the handler answers for.
func (h *Health) scope(proxies []proxy) []proxy {
	if len(h.Groups) == 0 {
		return proxies
	}
	return slices.DeleteFunc(slices.Clone(proxies), func(p proxy) bool { return !slices.Contains(h.Groups, p.Group) })
}

// isGroup tells a group's name from a service's. While a configuration is about to start, it counts as well as the one that
// is running.
func (h *Health) isGroup(name string, current, ours []proxy) bool {
	if len(h.Groups) > 0 {
		return slices.Contains(h.Groups, name)
	}
	has := func(p proxy) bool { return p.Group == name }
	return slices.ContainsFunc(current, has) || slices.ContainsFunc(ours, has)
}

// reportService finds the answer about a service. The upstreams that count are those of the proxies where at least one
// upstream has it: another proxy's know nothing of it, and need not.
func (h *Health) reportService(name string, scope []proxy) report {
	t := newTally(scope)
	known, pending := false, false
	for _, p := range scope {
		switch {
		case slices.Contains(p.services, name):
			known = true
			t.add(p, nil)
		case p.perRPC:
			has := false
			for _, e := range p.cluster.View().Live() {
				is, asked := e.State.Service(name)
				has = has || asked && is.Known == upstream.Has
				pending = pending || asked && is.Known == upstream.Unsure
			}
			if has {
				known = true
				t.add(p, func(s *upstream.State) bool {
					is, asked := s.Service(name)
					return asked && is.Usable && is.Known == upstream.Has
				})
			}
		}
	}
	switch {
	case known:
		return report{status: t.status(h.percent)}
	case pending:
		return report{status: grpcwire.NotServing, pending: true}
	}
	return report{status: grpcwire.ServiceUnknown}
}

// tally counts upstreams, each once, however many handlers share it.
type tally struct {
	seen           map[*transport.Endpoint]struct{} // nil where there is one handler, which has each once
	serving, total int
}

func newTally(scope []proxy) tally {
	if len(scope) < 2 {
		return tally{}
	}
	return tally{seen: make(map[*transport.Endpoint]struct{})}
}

// add counts the upstreams of a proxy. serves, if it is not nil, has a say in which are serving.
func (t *tally) add(p proxy, serves func(*upstream.State) bool) {
	for _, e := range p.cluster.View().Live() {
		if e.State.Has(upstream.Draining) {
			continue
		}
		if t.seen != nil {
			if _, ok := t.seen[e]; ok {
				continue
			}
			t.seen[e] = struct{}{}
		}
		t.total++
		// Being full or on trial comes and goes with single calls.
		if e.State.UsableExcept(upstream.Momentary) && (serves == nil || serves(e.State)) {
			t.serving++
		}
	}
}

// status: with no upstreams at all, nothing is serving.
func (t *tally) status(percent int) grpcwire.ServingStatus {
	if t.serving > 0 && t.serving*100 >= percent*t.total {
		return grpcwire.Serving
	}
	return grpcwire.NotServing
}

// listed is one line of a List.
type listed struct {
	name   string
	status grpcwire.ServingStatus
}

// list has the answers about all names that somebody may ask about, sorted.
func (h *Health) list() []listed {
	current, _, _ := running.look(h.app)
	names := map[string]struct{}{"": {}}
	for _, p := range h.scope(current) {
		if p.Group != "" {
			names[p.Group] = struct{}{}
		}
		for _, s := range p.services {
			names[s] = struct{}{}
		}
		if !p.perRPC {
			continue
		}
		for _, e := range p.cluster.View().Live() {
			for name, is := range e.State.Services() {
				if is.Known == upstream.Has { // others were made up by clients
					names[name] = struct{}{}
				}
			}
		}
	}
	list := make([]listed, 0, len(names))
	for name := range maps.Keys(names) {
		list = append(list, listed{name, h.report(name).status})
	}
	slices.SortFunc(list, func(a, b listed) int { return cmp.Compare(a.name, b.name) })
	return list
}
