package grpcproxy

import (
	"cmp"
	"maps"
	"slices"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// report finds the answer about a name: of everything, of a group, or of a service. The upstreams that count for a service are
// those of the proxies that name it: another proxy's know nothing of it, and need not.
func (h *Health) report(name string) grpcwire.ServingStatus {
	current, ours, up := running.look(h.app)
	if !up {
		return grpcwire.NotServing
	}
	scope, service := h.scope(current), ""
	switch {
	case name == "":
	case h.isGroup(name, current, ours):
		scope = only(scope, func(p *Handler) bool { return p.Group == name })
	default:
		service = name
		scope = only(scope, func(p *Handler) bool { return slices.Contains(p.HealthChecks.Services(), name) })
		if len(scope) == 0 {
			return grpcwire.ServiceUnknown
		}
	}
	t := newTally(scope)
	for _, p := range scope {
		t.add(p, service)
	}
	return t.status(h.percent)
}

// scope are the proxies that the handler answers for.
func (h *Health) scope(proxies []*Handler) []*Handler {
	if len(h.Groups) == 0 {
		return proxies
	}
	return only(proxies, func(p *Handler) bool { return slices.Contains(h.Groups, p.Group) })
}

func only(proxies []*Handler, are func(*Handler) bool) []*Handler {
	return slices.DeleteFunc(slices.Clone(proxies), func(p *Handler) bool { return !are(p) })
}

// isGroup tells a group's name from a service's. While a configuration is about to start, it counts as well as the one that
// is running.
func (h *Health) isGroup(name string, current, ours []*Handler) bool {
	if len(h.Groups) > 0 {
		return slices.Contains(h.Groups, name)
	}
	has := func(p *Handler) bool { return p.Group == name }
	return slices.ContainsFunc(current, has) || slices.ContainsFunc(ours, has)
}

// tally counts upstreams, each once, however many handlers share what is known of its health.
type tally struct {
	seen           map[*upstream.State]struct{} // nil where there is one handler, which has each once
	serving, total int
}

func newTally(scope []*Handler) tally {
	if len(scope) < 2 {
		return tally{}
	}
	return tally{seen: make(map[*upstream.State]struct{})}
}

// add counts the upstreams of a proxy, and how many of them serve the service. The empty one is being served by all that are
// usable.
func (t *tally) add(p *Handler, service string) {
	for _, e := range p.cluster.View().Live() {
		if e.State.Has(upstream.Draining) {
			continue
		}
		if t.seen != nil {
			if _, ok := t.seen[e.State]; ok {
				continue
			}
			t.seen[e.State] = struct{}{}
		}
		t.total++
		// Being full or on trial comes and goes with single calls.
		if e.State.UsableForExcept(service, upstream.Momentary) {
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
		for _, s := range p.HealthChecks.Services() {
			names[s] = struct{}{}
		}
	}
	list := make([]listed, 0, len(names))
	for name := range maps.Keys(names) {
		list = append(list, listed{name, h.report(name)})
	}
	slices.SortFunc(list, func(a, b listed) int { return cmp.Compare(a.name, b.name) })
	return list
}
