package selection

import (
	"encoding/json"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(Cookie)) }

// Cookie is `sticky` by the words of `reverse_proxy`, which has more options.
type Cookie struct {
	// The cookie. Default: `lb`.
	Name string `json:"name,omitempty"`

	// What tokens are made with; see `sticky`. Default: random, until the process ends.
	Secret string `json:"secret,omitempty"`

	// How long a token is good for; see `sticky`. Default: `0`; it lasts as long as the client keeps it.
	MaxAge caddy.Duration `json:"max_age,omitempty"`

	// The policy for calls without a token that leads anywhere. Default: `random`.
	FallbackRaw json.RawMessage `json:"fallback,omitempty" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`

	stickyPolicy
}

// stickyPolicy is a Sticky without its fields.
type stickyPolicy struct {
	nested // The policy, which passes on what its fallback can do.
}

// Build implements [Policy].
func (p *stickyPolicy) Build(s *upstream.Snapshot) Picker { return p.child.Build(s) }

// WithPriorities implements [Prioritized].
func (p *stickyPolicy) WithPriorities() Policy { return WithPriorities(p.child) }

// CaddyModule returns the Caddy module information.
func (*Cookie) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "cookie", New: func() caddy.Module { return new(Cookie) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy cookie [<name> [<secret>]] {
//	    fallback <policy> ...
//	    max_age  <duration>
//	}
func (p *Cookie) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // The policy's name.
	for _, arg := range []*string{&p.Name, &p.Secret} {
		if d.NextArg() {
			if *arg = d.Val(); *arg == "" {
				return d.Err("cookie: the name and the secret must not be empty")
			}
		}
	}
	if d.NextArg() {
		return d.Errf("cookie: unexpected argument %q", d.Val())
	}
	return options{"fallback": policyOption(&p.FallbackRaw), "max_age": durationOption(&p.MaxAge)}.parse(d, "cookie")
}

// Provision implements caddy.Provisioner.
func (p *Cookie) Provision(ctx caddy.Context) error {
	if p.FallbackRaw == nil {
		p.FallbackRaw = json.RawMessage(`{"policy":"random"}`)
	}
	s := &Sticky{Cookie: p.Name, Secret: p.Secret, MaxAge: p.MaxAge, FallbackRaw: p.FallbackRaw}
	if err := s.Provision(ctx); err != nil {
		return err
	}
	p.child = s
	return s.Validate()
}

var (
	_ Policy                = (*Cookie)(nil)
	_ Binding               = (*Cookie)(nil)
	_ Prioritized           = (*Cookie)(nil)
	_ HealthWatcher         = (*Cookie)(nil)
	_ LoadReportReceiver    = (*Cookie)(nil)
	_ caddy.Provisioner     = (*Cookie)(nil)
	_ caddyfile.Unmarshaler = (*Cookie)(nil)
)
