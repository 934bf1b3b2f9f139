package grpcproxy

import (
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// forwarded is what the next hop is told about the client, by the rules of reverse_proxy: what the client itself sent
// in these fields is believed only if it is a trusted proxy. An empty value means that the field is not sent.
type forwarded struct {
	xff, proto, host, via string
}

func (h *Handler) forwarded(r *http.Request, peer netip.AddrPort) forwarded {
	f := forwarded{via: viaOf(r)}
	trusted, _ := caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool)
	ip := peer.Addr().WithZone("")
	if !trusted && ip.IsValid() {
		for _, p := range h.trusted {
			if p.Contains(ip) {
				trusted = true
				break
			}
		}
	}
	unix := r.RemoteAddr == "@"
	if !ip.IsValid() && (!unix || !trusted) {
		return f // nobody knows who this is: say nothing, and pass on nothing the client made up
	}

	if !suppressed(r.Header, "X-Forwarded-For") {
		if ip.IsValid() {
			f.xff = remoteIP(r.RemoteAddr)
		}
		if prior := r.Header["X-Forwarded-For"]; trusted && len(prior) > 0 {
			if list := strings.Join(prior, ", "); list != "" {
				f.xff = strings.TrimSuffix(list+", "+f.xff, ", ")
			}
		}
	}
	if !suppressed(r.Header, "X-Forwarded-Proto") {
		f.proto = "https"
		if r.TLS == nil {
			f.proto = "http"
		}
		if prior := last(r.Header["X-Forwarded-Proto"]); trusted && prior != "" {
			f.proto = prior
		}
	}
	if !suppressed(r.Header, "X-Forwarded-Host") {
		f.host = r.Host
		if prior := last(r.Header["X-Forwarded-Host"]); trusted && prior != "" {
			f.host = prior
		}
	}
	return f
}

// suppressed tells whether an earlier handler forbade the field by setting it to nil.
func suppressed(h http.Header, name string) bool {
	v, ok := h[name]
	return ok && v == nil
}

func last(v []string) string {
	if len(v) == 0 {
		return ""
	}
	return v[len(v)-1]
}

// viaOf is the value that this hop adds (RFC 9110 section 7.6.3), after those already there.
func viaOf(r *http.Request) string {
	own := "2.0 Caddy"
	switch r.ProtoMajor {
	case 1:
		own = "1.1 Caddy"
	case 3:
		own = "3.0 Caddy"
	}
	if prior := r.Header["Via"]; len(prior) > 0 {
		return strings.Join(prior, ", ") + ", " + own
	}
	return own
}

// set puts the values into an http.Header, for header operations to see.
func (f forwarded) set(h http.Header) {
	for _, v := range [...]struct{ name, value string }{
		{"X-Forwarded-For", f.xff}, {"X-Forwarded-Proto", f.proto}, {"X-Forwarded-Host", f.host}, {"Via", f.via},
	} {
		if v.value == "" {
			delete(h, v.name)
		} else {
			h[v.name] = []string{v.value}
		}
	}
}

// isForwardedName tells the names that forwarded speaks for.
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
