package selection

import (
	"encoding/json"
	"errors"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// The hash policies of `reverse_proxy`, by its words: rendezvous hashing with one key.

func init() {
	caddy.RegisterModule(new(IPHash))
	caddy.RegisterModule(new(ClientIPHash))
	caddy.RegisterModule(new(URIHash))
	caddy.RegisterModule(new(Query))
	caddy.RegisterModule(new(Header))
}

// The keys of those that have no fields.
var (
	byPeerIP   = sources{{kind: fromPeerIP}}
	byClientIP = sources{{kind: fromClientIP}}
	byURI      = sources{{kind: fromURI}}
)

// IPHash is `rendezvous` with the key `peer_ip`: the IP address at the other end of the connection.
type IPHash struct{}

// CaddyModule returns the Caddy module information.
func (*IPHash) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "ip_hash", New: func() caddy.Module { return new(IPHash) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy ip_hash
func (*IPHash) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return parseAlone(d) }

// Build implements [Policy].
func (*IPHash) Build(s *upstream.Snapshot) Picker { return newRendezvous(&hashing{from: byPeerIP}, s) }

// KeyHash implements [Keyed].
func (*IPHash) KeyHash(c *call.Call) (uint64, bool) { return byPeerIP.hash(c) }

// ClientIPHash is `rendezvous` with the key `client_ip`: the client's IP address, as told by trusted proxies in front.
type ClientIPHash struct{}

// CaddyModule returns the Caddy module information.
func (*ClientIPHash) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "client_ip_hash", New: func() caddy.Module { return new(ClientIPHash) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy client_ip_hash
func (*ClientIPHash) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return parseAlone(d) }

// Build implements [Policy].
func (*ClientIPHash) Build(s *upstream.Snapshot) Picker {
	return newRendezvous(&hashing{from: byClientIP}, s)
}

// KeyHash implements [Keyed].
func (*ClientIPHash) KeyHash(c *call.Call) (uint64, bool) { return byClientIP.hash(c) }

// URIHash is `rendezvous` with the key `uri`: what the client asks for, which is the RPC's path as a rule.
type URIHash struct{}

// CaddyModule returns the Caddy module information.
func (*URIHash) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "uri_hash", New: func() caddy.Module { return new(URIHash) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy uri_hash
func (*URIHash) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return parseAlone(d) }

// Build implements [Policy].
func (*URIHash) Build(s *upstream.Snapshot) Picker { return newRendezvous(&hashing{from: byURI}, s) }

// KeyHash implements [Keyed].
func (*URIHash) KeyHash(c *call.Call) (uint64, bool) { return byURI.hash(c) }

// Query is `rendezvous` with the key `query`: a parameter of the URI's query.
type Query struct {
	// The parameter. It is needed.
	Key string `json:"key,omitempty"`

	// The policy for calls without the parameter. Default: any endpoint.
	FallbackRaw json.RawMessage `json:"fallback,omitempty" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`

	hashing
}

// CaddyModule returns the Caddy module information.
func (*Query) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "query", New: func() caddy.Module { return new(Query) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy query <key> {
//	    fallback <policy> ...
//	}
func (p *Query) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return parseNamed(d, &p.Key, &p.FallbackRaw)
}

// Provision implements caddy.Provisioner.
func (p *Query) Provision(ctx caddy.Context) error {
	if p.Key == "" {
		return errors.New("key: the name of the query parameter is missing")
	}
	return p.provision(ctx, []HashKey{{Source: "query", Name: p.Key}}, p, p.FallbackRaw)
}

// Build implements [Policy].
func (p *Query) Build(s *upstream.Snapshot) Picker { return newRendezvous(&p.hashing, s) }

// Header is `rendezvous` with the key `header`: a key of the request's metadata.
type Header struct {
	// The metadata key. It is needed.
	Field string `json:"field,omitempty"`

	// The policy for calls without the metadata. Default: any endpoint.
	FallbackRaw json.RawMessage `json:"fallback,omitempty" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`

	hashing
}

// CaddyModule returns the Caddy module information.
func (*Header) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "header", New: func() caddy.Module { return new(Header) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy header <field> {
//	    fallback <policy> ...
//	}
func (p *Header) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return parseNamed(d, &p.Field, &p.FallbackRaw)
}

// Provision implements caddy.Provisioner.
func (p *Header) Provision(ctx caddy.Context) error {
	if p.Field == "" {
		return errors.New("field: the metadata key is missing")
	}
	return p.provision(ctx, []HashKey{{Source: "header", Name: p.Field}}, p, p.FallbackRaw)
}

// Build implements [Policy].
func (p *Header) Build(s *upstream.Snapshot) Picker { return newRendezvous(&p.hashing, s) }

// parseNamed reads a policy with a name and perhaps a fallback.
func parseNamed(d *caddyfile.Dispenser, name *string, fallback *json.RawMessage) error {
	d.Next() // The policy's name.
	policy := d.Val()
	if !d.NextArg() {
		return d.ArgErr()
	}
	*name = d.Val()
	if d.NextArg() {
		return d.Errf("%s: unexpected argument %q", policy, d.Val())
	}
	return options{"fallback": policyOption(fallback)}.parse(d, policy)
}

var (
	_ Policy                = (*IPHash)(nil)
	_ Keyed                 = (*IPHash)(nil)
	_ caddyfile.Unmarshaler = (*IPHash)(nil)
	_ Policy                = (*ClientIPHash)(nil)
	_ Keyed                 = (*ClientIPHash)(nil)
	_ caddyfile.Unmarshaler = (*ClientIPHash)(nil)
	_ Policy                = (*URIHash)(nil)
	_ Keyed                 = (*URIHash)(nil)
	_ caddyfile.Unmarshaler = (*URIHash)(nil)
	_ Policy                = (*Query)(nil)
	_ Keyed                 = (*Query)(nil)
	_ HealthWatcher         = (*Query)(nil)
	_ LoadReportReceiver    = (*Query)(nil)
	_ caddy.Provisioner     = (*Query)(nil)
	_ caddyfile.Unmarshaler = (*Query)(nil)
	_ Policy                = (*Header)(nil)
	_ Keyed                 = (*Header)(nil)
	_ HealthWatcher         = (*Header)(nil)
	_ LoadReportReceiver    = (*Header)(nil)
	_ caddy.Provisioner     = (*Header)(nil)
	_ caddyfile.Unmarshaler = (*Header)(nil)
)
