package route

import (
	"fmt"
	"net/http"
	"reflect"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// walk follows one call through the routes.
type walk struct {
	req    *http.Request
	groups map[string]bool
	asks   asks
	says   []bool // what the first of the matchers say that are asked for each call; the others say yes
	conds  []cond // those that were met
}

func (w *walk) decide(routes caddyhttp.RouteList) Decision {
	w.groups = make(map[string]bool)
	if d, over := w.list(routes); over {
		return d
	}
	return Decision{Why: "no route takes it"}
}

// list follows the call through a list of routes. over: what becomes of it is known.
func (w *walk) list(routes caddyhttp.RouteList) (d Decision, over bool) {
	for i := range routes {
		r := &routes[i]
		if r.Group != "" && w.groups[r.Group] {
			continue
		}
		matches, why := w.matches(r.MatcherSets)
		if why != "" {
			return Decision{Why: why}, true
		}
		if !matches {
			continue
		}
		if r.Group != "" {
			w.groups[r.Group] = true
		}
		for _, h := range r.Handlers {
			if d, over := w.handler(h); over {
				return d, true
			}
		}
		if r.Terminal {
			return Decision{Why: "a route that ends there takes it"}, true
		}
	}
	return Decision{}, false
}

// matches asks a route's matchers. Those that may ask for more than host and path are not asked: they matter only where the others match.
func (w *walk) matches(sets caddyhttp.MatcherSets) (ok bool, why string) {
	if len(sets) == 0 {
		return true, ""
	}
	for _, set := range sets {
		ok, unknown := w.set(set)
		switch {
		case ok && unknown == "":
			return true, ""
		case ok && why == "":
			why = unknown
		}
	}
	return false, why
}

// set tells whether those of a set's matchers match that are known, and why the others would have to be asked.
func (w *walk) set(set caddyhttp.MatcherSet) (ok bool, unknown string) {
	for _, m := range set {
		how, why := w.known(m)
		switch how {
		case notAtAll:
			unknown = why
		case now:
			if ok, err := (caddyhttp.MatcherSet{m}).MatchWithError(w.req); err != nil {
				unknown = "a matcher fails: " + err.Error()
			} else if !ok {
				return false, ""
			}
		case perCall:
		}
	}
	for _, m := range set { // last, since they cost something
		if how, _ := w.known(m); how == perCall && unknown == "" && !w.ask(m) {
			return false, ""
		}
	}
	return true, unknown
}

// ask is what a matcher says that is asked for each call, on this walk.
func (w *walk) ask(m any) bool {
	says := true
	if i := len(w.conds); i < len(w.says) {
		says = w.says[i]
	}
	w.conds = append(w.conds, cond{m, says})
	return says
}

// when is when a matcher can be asked.
type when uint8

const (
	now      when = iota // once for all calls of a host and a path
	perCall              // for each call
	notAtAll             // it may want to know more
)

// known says when a matcher can be asked, and why not. It notes what the answers for all calls depend on.
func (w *walk) known(m any) (how when, why string) {
	switch m := m.(type) {
	case caddyhttp.MatchHost:
		w.asks |= byHost
		return constant(now, m, m...)
	case *caddyhttp.MatchHost:
		w.asks |= byHost
		return constant(now, m, *m...)
	case caddyhttp.MatchPath:
		w.asks |= byPath
		return constant(now, m, m...)
	case *caddyhttp.MatchPath:
		w.asks |= byPath
		return constant(now, m, *m...)
	case caddyhttp.MatchMethod, *caddyhttp.MatchMethod, caddyhttp.MatchProtocol, *caddyhttp.MatchProtocol:
		return now, ""
	case caddyhttp.MatchHeader:
		return constant(perCall, m, words(m)...)
	case *caddyhttp.MatchHeader:
		return constant(perCall, m, words(*m)...)
	case caddyhttp.MatchRemoteIP:
		return constant(perCall, m, m.Ranges...)
	case *caddyhttp.MatchRemoteIP:
		return constant(perCall, m, m.Ranges...)
	case caddyhttp.MatchClientIP:
		return constant(perCall, m, m.Ranges...)
	case *caddyhttp.MatchClientIP:
		return constant(perCall, m, m.Ranges...)
	case Matcher:
		if m.PathOnly() {
			w.asks |= byHost | byPath
			return now, ""
		}
		return constant(perCall, m, m.Patterns()...)
	}
	return notAtAll, "the matcher " + nameOf(m) + " needs a request"
}

// constant is when a matcher can be asked if its patterns have no placeholders.
func constant(how when, m any, patterns ...string) (when, string) {
	for _, p := range patterns {
		if strings.Contains(p, "{") {
			return notAtAll, "the matcher " + nameOf(m) + " has a placeholder: " + p
		}
	}
	return how, ""
}

// words are all names and values of a header's matcher.
func words(m caddyhttp.MatchHeader) (all []string) {
	for name, values := range m {
		all = append(append(all, name), values...)
	}
	return all
}

// handler follows the call into a handler.
func (w *walk) handler(h caddyhttp.MiddlewareHandler) (d Decision, over bool) {
	switch h := h.(type) {
	case *caddyhttp.Subroute:
		return w.list(h.Routes)
	case caddyhttp.VarsMiddleware:
		return w.vars(h)
	case *caddyhttp.VarsMiddleware:
		return w.vars(*h)
	case Handler:
		to, why := h.Direct()
		return Decision{Handler: to, Why: why}, true
	}
	return Decision{Why: "the handler " + nameOf(h) + " needs a request"}, true
}

// vars passes over variables: only placeholders and matchers read them, and where one of those stands in the way, the call is not direct.
func (*walk) vars(v caddyhttp.VarsMiddleware) (Decision, bool) {
	for name, value := range v {
		if text := fmt.Sprint(value); strings.Contains(name+text, "{") {
			return Decision{Why: "the handler vars has a placeholder: " + name + " " + text}, true
		}
	}
	return Decision{}, false
}

// nameOf is a module's name in configurations.
func nameOf(m any) string {
	if mod, ok := m.(caddy.Module); ok {
		return mod.CaddyModule().ID.Name()
	}
	return reflect.TypeOf(m).String()
}
