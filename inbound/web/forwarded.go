package web

import (
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
)

// forwarded is what the next hop is told about the client, without what the client says itself.
func (h *Handler) forwarded(r *http.Request, peer netip.AddrPort) proxy.Forwarded {
	f := proxy.Forwarded{Via: via(r)}
	trusted, _ := caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool)
	ip := peer.Addr().WithZone("")
	if !trusted && ip.IsValid() {
		trusted = slices.ContainsFunc(h.Trusted, func(p netip.Prefix) bool { return p.Contains(ip) })
	}
	unix := r.RemoteAddr == "@"
	if !ip.IsValid() && (!unix || !trusted) {
		return f // nobody knows who this is: say nothing, and pass on nothing the client made up
	}
	f.Trusted = trusted
	if !suppressed(r.Header, "X-Forwarded-For") && ip.IsValid() {
		f.For = remoteIP(r.RemoteAddr)
	}
	if !suppressed(r.Header, "X-Forwarded-Proto") {
		f.Proto = "https"
		if r.TLS == nil {
			f.Proto = "http"
		}
	}
	if !suppressed(r.Header, "X-Forwarded-Host") {
		f.Host = fieldText(r.Host)
	}
	return f
}

// suppressed tells whether an earlier handler forbade the field by setting it to nil.
func suppressed(h http.Header, name string) bool {
	v, ok := h[name]
	return ok && v == nil
}

// via is what this hop adds (RFC 9110 section 7.6.3).
func via(r *http.Request) string {
	switch r.ProtoMajor {
	case 1:
		return "1.1 Caddy"
	case 3:
		return "3.0 Caddy"
	}
	return "2.0 Caddy"
}

// isForwardedName tells the names that [proxy.Forwarded] speaks for.
func isForwardedName(canonical string) bool {
	switch canonical {
	case "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "Via":
		return true
	}
	return false
}

// remoteIP is the address without port and zone, spelt as the server spells it.
func remoteIP(remoteAddr string) string {
	host, _, err := net.SplitHostPort(remoteAddr)
	if err != nil {
		return ""
	}
	host, _, _ = strings.Cut(host, "%")
	return host
}
