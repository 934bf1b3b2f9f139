package grpcproxy

import (
	"crypto/tls"
	"encoding/json"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/direct"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
)

// Direct implements route.Handler.
func (h *Handler) Direct() (to *direct.Handler, why string) {
	switch {
	case h.placeholders != "":
		return nil, "grpc_proxy has a placeholder: " + h.placeholders
	case len(h.trusted) > 0:
		return nil, "grpc_proxy has trusted_proxies of its own"
	}
	return &h.direct, ""
}

// PathOnly implements route.Matcher.
func (m MatchGRPC) PathOnly() bool { return len(m.Metadata) == 0 }

// Patterns implements route.Matcher.
func (m MatchGRPC) Patterns() (all []string) {
	for name, values := range m.Metadata {
		all = append(append(all, name), values...)
	}
	return all
}

// Paths are the patterns of the paths that match, for people to read; none: any.
func (m MatchGRPC) Paths() (patterns []string) {
	for _, s := range m.Services {
		patterns = append(patterns, "/"+s+"/*")
	}
	for _, name := range m.Methods {
		if !strings.Contains(name, "/") {
			name = "*/" + name
		}
		patterns = append(patterns, "/"+name)
	}
	return patterns
}

// placeholderIn is a placeholder in a part of a configuration, empty if there is none.
func placeholderIn(config ...any) string {
	for _, c := range config {
		raw, err := json.Marshal(c)
		if err != nil {
			return err.Error()
		}
		var v any
		if err := json.Unmarshal(raw, &v); err != nil {
			return err.Error()
		}
		if p := findPlaceholder(v); p != "" {
			return p
		}
	}
	return ""
}

func findPlaceholder(v any) string {
	switch v := v.(type) {
	case string:
		if strings.Contains(v, "{") {
			return v
		}
	case []any:
		for _, x := range v {
			if p := findPlaceholder(x); p != "" {
				return p
			}
		}
	case map[string]any:
		for name, x := range v {
			if p := findPlaceholder(name); p != "" {
				return p
			}
			if p := findPlaceholder(x); p != "" {
				return p
			}
		}
	}
	return ""
}

// route returns what tells, of a connection's streams, whose call goes directly to a grpc_proxy.
func (r *Relay) route(nc net.Conn) func([]h2.Field) *direct.Handler {
	var state *tls.ConnectionState
	if tc, ok := nc.(*tls.Conn); ok {
		s := tc.ConnectionState()
		state = &s
	}
	if r.believes(nc.RemoteAddr()) {
		return nil // what such a client says of others is the server's to judge
	}
	strict := state != nil && r.server.StrictSNIHost != nil && *r.server.StrictSNIHost
	return func(fields []h2.Field) *direct.Handler {
		host, path, ok := callOf(fields)
		if !ok || strict && !strings.EqualFold(hostname(host), state.ServerName) {
			return nil
		}
		return r.table.Decide(host, path, state, func() *http.Request { return requestOf(fields, host, path, nc, state) }).Handler
	}
}

// requestOf is a call as a request, as far as matchers look at it.
func requestOf(fields []h2.Field, host, path string, nc net.Conn, state *tls.ConnectionState) *http.Request {
	regular := fields
	for len(regular) > 0 && strings.HasPrefix(regular[0].Name, ":") {
		regular = regular[1:]
	}
	return &http.Request{
		Method: http.MethodPost, Host: host, URL: &url.URL{Path: path}, RequestURI: path, Header: web.Header(regular),
		Proto: "HTTP/2.0", ProtoMajor: 2, TLS: state, RemoteAddr: nc.RemoteAddr().String(), Body: http.NoBody,
	}
}

// believes tells whether the server takes a client for a proxy in front of it.
func (r *Relay) believes(addr net.Addr) bool {
	req := &http.Request{URL: new(url.URL), Header: http.Header{"X-Forwarded-For": {"192.0.2.1"}}, RemoteAddr: addr.String()}
	req = caddyhttp.PrepareRequest(req, caddy.NewReplacer(), nil, r.server)
	trusted, _ := caddyhttp.GetVar(req.Context(), caddyhttp.TrustedProxyVarKey).(bool)
	return trusted
}

// callOf reads the head of a call. It returns false where the server does something with one like that which is not done for direct calls.
func callOf(fields []h2.Field) (host, path string, ok bool) {
	method, kind, types := "", grpcwire.NotGRPC, 0
	for i := range fields {
		f := &fields[i]
		switch f.Name {
		case ":method":
			method = f.Value
		case ":path":
			path = f.Value
		case ":authority":
			host = f.Value
		case ":scheme":
		case "content-type":
			types++
			kind = grpcwire.ContentKind(f.Value)
		case "host", "expect":
			return "", "", false
		default:
			if strings.ContainsAny(f.Name, "_.") { // the server drops these, or does not
				return "", "", false
			}
		}
	}
	return host, path, method == http.MethodPost && types == 1 && kind == grpcwire.GRPC
}

func hostname(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		return h
	}
	return host
}
