package grpcproxy

import (
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func hasPlaceholder(s string) bool { return strings.ContainsAny(s, "{}") }

// schemeOf is the scheme of an address whose rest cannot be checked yet. It is not known if a placeholder at the
// beginning may bring one along.
func schemeOf(addr string) (scheme upstream.Scheme, known bool) {
	name, _, ok := strings.Cut(addr, "://")
	switch {
	case !ok:
		return upstream.SchemeNone, !strings.HasPrefix(addr, "{")
	case hasPlaceholder(name):
		return upstream.SchemeNone, false
	case name == "https", name == "grpcs":
		return upstream.SchemeTLS, true
	}
	return upstream.SchemePlain, true
}

// modulesBelow lists the modules of a namespace, for error messages.
func modulesBelow(namespace string) string {
	modules := caddy.GetModules(namespace)
	names := make([]string, len(modules))
	for i, m := range modules {
		names[i] = m.ID.Name()
	}
	return strings.Join(names, ", ")
}
