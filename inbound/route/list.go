package route

import (
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// Line is a grpc_proxy of a server, and the calls that come to it.
type Line struct {
	// Hosts and Paths are what the routes on the way ask for, as they are written; empty: any.
	Hosts, Paths []string
	// Decision is where such calls go.
	Decision
}

// Lines lists the grpc_proxy handlers of the server, in the order of its routes.
func (t *Table) Lines() []Line {
	var l lister
	l.list(t.srv.Routes, Line{})
	for i := range l.lines {
		line := &l.lines[i]
		line.Decision = t.likely(sample(line.Hosts, "host.example"), path(line.Paths))
	}
	return l.lines
}

// likely is the first way of calls that is direct, or that of calls of which no matcher says no.
func (t *Table) likely(host, path string) Decision {
	if t.why != "" {
		return Decision{Why: t.why}
	}
	leaves := t.leaves(host, path, nil)
	for _, l := range leaves {
		if l.Handler != nil {
			return l.Decision
		}
	}
	return leaves[0].Decision
}

type lister struct{ lines []Line }

func (l *lister) list(routes caddyhttp.RouteList, at Line) {
	for i := range routes {
		here := at
		for _, set := range routes[i].MatcherSets {
			for _, m := range set {
				here = here.narrowed(m)
			}
		}
		for _, h := range routes[i].Handlers {
			switch h := h.(type) {
			case *caddyhttp.Subroute:
				l.list(h.Routes, here)
			case Handler:
				l.lines = append(l.lines, here)
			}
		}
	}
}

// narrowed is the line behind a matcher.
func (l Line) narrowed(m any) Line {
	switch m := m.(type) {
	case caddyhttp.MatchHost:
		l.Hosts = m
	case *caddyhttp.MatchHost:
		l.Hosts = *m
	case caddyhttp.MatchPath:
		l.Paths = m
	case *caddyhttp.MatchPath:
		l.Paths = *m
	case interface{ Paths() []string }:
		if p := m.Paths(); len(p) > 0 {
			l.Paths = p
		}
	}
	return l
}

// sample is something that the first pattern matches.
func sample(patterns []string, otherwise string) string {
	if len(patterns) == 0 {
		return otherwise
	}
	return strings.ReplaceAll(patterns[0], "*", "x")
}

// path is one of a call that the first pattern matches.
func path(patterns []string) string {
	p := sample(patterns, "/pkg.Service/Method")
	switch service, method, ok := strings.Cut(strings.TrimPrefix(p, "/"), "/"); {
	case service == "":
		return "/pkg.Service/Method"
	case !ok || method == "":
		return "/" + service + "/Method"
	}
	return p
}
