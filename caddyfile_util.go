package grpcproxy

import (
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func hasPlaceholder(s string) bool { return strings.ContainsAny(s, "{}") }

// schemeOf is the scheme of an address whose rest cannot be checked yet.
func schemeOf(addr string) upstream.Scheme {
	name, _, ok := strings.Cut(addr, "://")
	switch {
	case !ok:
		return upstream.SchemeNone
	case name == "https", name == "grpcs":
		return upstream.SchemeTLS
	}
	return upstream.SchemePlain
}

// modulesBelow lists the modules of a namespace, for error messages.
func modulesBelow(namespace string) string {
	var names []string
	for _, m := range caddy.GetModules(namespace) {
		names = append(names, m.ID.Name())
	}
	return strings.Join(names, ", ")
}
