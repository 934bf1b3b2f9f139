package grpcproxy

import (
	"fmt"
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/discovery"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// isTarget tells whether an upstream is a target of gRPC's scheme dns: every address that the name has is an upstream.
// gRPC Name Resolution: "dns:[//authority/]host[:port]". But dns:1234 is a port of a machine called dns, and dns:1234-1236
// are several.
func isTarget(dial string) bool {
	scheme, rest, ok := strings.Cut(dial, ":")
	return ok && strings.EqualFold(scheme, "dns") && strings.Trim(rest, "0123456789-") != ""
}

// checkUpstream tells whether an upstream's address can be understood, and its scheme.
func checkUpstream(addr string) (upstream.Scheme, error) {
	if isTarget(addr) {
		_, err := discovery.Target(addr)
		return upstream.SchemeNone, err
	}
	_, scheme, err := upstream.Parse(addr)
	return scheme, err
}

// target makes the source that stands for an upstream like dns:///name:port.
func (h *Handler) target(ctx caddy.Context, dial string, u *Upstream) (cluster.Source, error) {
	var none cluster.Source
	a, err := discovery.Target(dial)
	if err != nil {
		return none, err
	}
	key := dial
	if r := h.Transport.Resolver; a.Resolver == nil && r != nil {
		a.Resolver = &discovery.Resolver{Addresses: r.Addresses}
		key += " " + strings.Join(r.Addresses, " ")
	}
	if err := a.Provision(ctx); err != nil {
		return none, fmt.Errorf("upstream %q: %w", dial, err)
	}
	return cluster.Source{Source: a, Name: dial, Key: key, Describe: u.describe}, nil
}
