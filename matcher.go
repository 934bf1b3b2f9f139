package grpcproxy

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
)

func init() {
	caddy.RegisterModule(MatchGRPC{})
}

// MatchGRPC matches gRPC calls: POST requests whose content-type is `application/grpc`, alone or followed by `+` or
// `;`. gRPC-Web (`application/grpc-web`) is not gRPC and does not match, unlike with the `protocol grpc` matcher. All
// given conditions must hold; in a list, one entry must.
type MatchGRPC struct {
	// Services to match: `pkg.Service`, or a prefix that ends in `*`, such as `pkg.*`.
	Services []string `json:"services,omitempty"`

	// Methods to match: `Method`, or `pkg.Service/Method`. A `*` at the end matches any rest.
	Methods []string `json:"methods,omitempty"`

	// Request metadata to match, by key. Of each key's list one value must be among the call's: literally, as a prefix
	// with `*` at the end, or as a suffix with `*` in front. `*` alone matches any value, an empty list that the key is
	// absent. Placeholders are resolved per call.
	Metadata map[string][]string `json:"metadata,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (MatchGRPC) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.matchers.grpc",
		New: func() caddy.Module { return new(MatchGRPC) },
	}
}

// UnmarshalCaddyfile sets up the matcher. Syntax:
//
//	grpc [<service|service/method>...]
//	grpc {
//	    service  <names...>
//	    method   <names...>
//	    metadata <key> [<values...>]
//	    metadata !<key>
//	}
func (m *MatchGRPC) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	for d.Next() {
		m.names(d.RemainingArgs())
		if err := m.Validate(); err != nil {
			return d.WrapErr(err)
		}
		for nesting := d.Nesting(); d.NextBlock(nesting); {
			word := d.Val()
			args := d.RemainingArgs()
			if len(args) == 0 {
				return d.ArgErr()
			}
			switch word {
			case "service":
				m.Services = append(m.Services, args...)
			case "method":
				m.Methods = append(m.Methods, args...)
			case "metadata":
				if err := m.unmarshalMetadata(d, args); err != nil {
					return err
				}
			default:
				return d.Errf("unrecognized word %q in the grpc matcher; expected service, method or metadata", word)
			}
			if err := m.Validate(); err != nil {
				return d.WrapErr(err)
			}
		}
	}
	return nil
}

// names adds services and methods in the short form: pkg.Service, pkg.Service/Method, /pkg.Service/*.
func (m *MatchGRPC) names(args []string) {
	for _, arg := range args {
		arg = strings.TrimPrefix(arg, "/")
		service, whole := strings.CutSuffix(arg, "/*")
		if !whole && strings.Contains(arg, "/") {
			m.Methods = append(m.Methods, arg)
		} else {
			m.Services = append(m.Services, service)
		}
	}
}

func (m *MatchGRPC) unmarshalMetadata(d *caddyfile.Dispenser, args []string) error {
	if m.Metadata == nil {
		m.Metadata = make(map[string][]string)
	}
	key, values := strings.ToLower(args[0]), args[1:]
	if absent, ok := strings.CutPrefix(key, "!"); ok {
		if len(values) > 0 {
			return d.Errf("metadata %s takes no values: it matches calls without the key", key)
		}
		m.Metadata[absent] = []string{}
		return nil
	}
	if len(values) == 0 {
		values = []string{"*"}
	}
	m.Metadata[key] = append(m.Metadata[key], values...)
	return nil
}

// Validate refuses names that no call can have.
func (m *MatchGRPC) Validate() error {
	for _, key := range slices.Sorted(maps.Keys(m.Metadata)) {
		if err := checkName(key); err != nil {
			return fmt.Errorf("grpc matcher: metadata: %w", err)
		}
	}
	for _, s := range slices.Concat(m.Services, m.Methods) {
		if s == "" || strings.HasPrefix(s, "/") {
			return fmt.Errorf("grpc matcher: %q is not a name; write pkg.Service or pkg.Service/Method, without a leading slash", s)
		}
		if name, ok := strings.CutSuffix(s, "/"); ok {
			return fmt.Errorf("grpc matcher: %q ends with a slash, which no method does; write %s for a whole service, or %s/Method", s, name, name)
		}
		if i := strings.IndexByte(s, '*'); i >= 0 && i != len(s)-1 {
			return fmt.Errorf("grpc matcher: %q has a * that is not at the end", s)
		}
	}
	return nil
}

// Match tells whether the request is a gRPC call that fulfils the conditions.
func (m *MatchGRPC) Match(r *http.Request) bool {
	ok, _ := m.MatchWithError(r)
	return ok
}

// MatchWithError is Match; it has no errors.
func (m *MatchGRPC) MatchWithError(r *http.Request) (bool, error) {
	if !web.IsGRPC(r) {
		return false, nil
	}
	web.NameCall(r)
	if len(m.Services) > 0 || len(m.Methods) > 0 {
		service, method, ok := grpcwire.SplitMethod(r.URL.Path)
		if !ok || !m.matchName(service, method) {
			return false, nil
		}
	}
	return m.matchMetadata(r), nil
}

// matchName: a listed service, or a listed method; with both lists, a method without a service in it belongs to the
// listed services.
func (m *MatchGRPC) matchName(service, method string) bool {
	inService := slices.ContainsFunc(m.Services, func(p string) bool { return glob(p, service) })
	if len(m.Methods) == 0 {
		return inService
	}
	return slices.ContainsFunc(m.Methods, func(p string) bool {
		if i := strings.LastIndexByte(p, '/'); i >= 0 {
			return p[:i] == service && glob(p[i+1:], method)
		}
		return glob(p, method) && (inService || len(m.Services) == 0)
	}) || inService && !m.hasBareMethod()
}

// hasBareMethod tells whether a method without a service is listed, which narrows the listed services down.
func (m *MatchGRPC) hasBareMethod() bool {
	return slices.ContainsFunc(m.Methods, func(p string) bool { return !strings.Contains(p, "/") })
}

func (m *MatchGRPC) matchMetadata(r *http.Request) bool {
	if len(m.Metadata) == 0 {
		return true
	}
	repl, _ := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	for key, patterns := range m.Metadata {
		have := r.Header.Values(key)
		if len(patterns) == 0 {
			if len(have) > 0 {
				return false
			}
			continue
		}
		if !slices.ContainsFunc(patterns, func(p string) bool {
			if repl != nil {
				p = repl.ReplaceKnown(p, "")
			}
			return slices.ContainsFunc(have, func(v string) bool { return glob(p, v) })
		}) {
			return false
		}
	}
	return true
}

// glob matches literally, or with a * at the beginning or the end.
func glob(pattern, s string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(s, prefix)
	}
	if suffix, ok := strings.CutPrefix(pattern, "*"); ok {
		return strings.HasSuffix(s, suffix)
	}
	return pattern == s
}

// Interface guards
var (
	_ caddyhttp.RequestMatcherWithError = (*MatchGRPC)(nil)
	_ caddyhttp.CELLibraryProducer      = (*MatchGRPC)(nil)
	_ caddyfile.Unmarshaler             = (*MatchGRPC)(nil)
	_ caddy.Validator                   = (*MatchGRPC)(nil)
)
