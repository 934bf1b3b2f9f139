package selection

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(Subset)) }

const (
	defaultMaxSubsets = 1000

	fallbackNone    = "none"
	fallbackAny     = "any"
	fallbackDefault = "default"
)

// Subset sends a call to the endpoints whose metadata is what the call asks for: a version, a tenant, a stage. (Envoy's
// load balancer subsets.)
type Subset struct {
	// What to compare. An endpoint is for a call if all of these are equal. At least one is needed.
	Match []SubsetMatch `json:"match,omitempty"`

	// What happens to calls for which there is no such endpoint, since they ask for nothing or for something that no
	// endpoint has: `none` lets them fail, `any` lets them go to any endpoint, `default` to the endpoints with the values
	// in `default`. Calls that ask for endpoints which exist but cannot be used fail in any case. Default: `none`.
	Fallback string `json:"fallback,omitempty"`

	// The values of the endpoints' metadata for the fallback `default`, one for each match.
	Default map[string]string `json:"default,omitempty"`

	// The policy that chooses within a subset. Default: `least_request`.
	PolicyRaw json.RawMessage `json:"child,omitempty" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`

	// How many subsets there may be, each of which has its own tables. Endpoints of further ones are not found, and a
	// warning is logged. Default: `1000`.
	MaxSubsets int `json:"max_subsets,omitempty"`

	nested
	wants  sources
	logger *slog.Logger
}

// SubsetMatch compares one entry of the endpoints' metadata with a property of the call.
type SubsetMatch struct {
	// The key of the endpoints' metadata.
	Key string `json:"key,omitempty"`

	// What its value must be for a call: a text with placeholders, such as `{http.request.header.X-Version}`.
	Value string `json:"value,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*Subset) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "subset", New: func() caddy.Module { return new(Subset) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy subset {
//	    match       <key> <value>
//	    fallback    none | any | default {
//	        <key> <value>
//	    }
//	    max_subsets <n>
//	    policy      <policy> ...
//	}
//
// match may be repeated.
func (p *Subset) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // The policy's name.
	if d.NextArg() {
		return d.Errf("subset: unexpected argument %q; options go into a block", d.Val())
	}
	return options{
		"match": func(d *caddyfile.Dispenser) error {
			args := d.RemainingArgs()
			if len(args) != 2 {
				return d.Err("subset: match takes a key of the endpoints' metadata and a value")
			}
			p.Match = append(p.Match, SubsetMatch{args[0], args[1]})
			return nil
		},
		"fallback":    p.unmarshalFallback,
		"max_subsets": numberOption(&p.MaxSubsets),
		"policy":      policyOption(&p.PolicyRaw),
	}.parse(d, "subset", "match")
}

func (p *Subset) unmarshalFallback(d *caddyfile.Dispenser) (err error) {
	if p.Fallback, err = oneArg(d); err != nil {
		return err
	}
	for level := d.Nesting(); d.NextBlock(level); {
		key := d.Val()
		value, err := oneArg(d)
		if err != nil {
			return err
		}
		if _, twice := p.Default[key]; twice {
			return d.Errf("subset: the default of %s is given twice", key)
		}
		if p.Default == nil {
			p.Default = make(map[string]string)
		}
		p.Default[key] = value
	}
	return nil
}

// Provision implements caddy.Provisioner.
func (p *Subset) Provision(ctx caddy.Context) error {
	p.logger = ctx.Slogger()
	for _, m := range p.Match {
		s := source{kind: fromPlaceholder, name: m.Value}
		if strings.Contains(m.Value, "{") {
			var err error
			if s, err = (HashKey{Source: "placeholder", Name: m.Value}).source(); err != nil {
				return fmt.Errorf("match: %s: %w", m.Key, err)
			}
		}
		p.wants = append(p.wants, s)
	}
	p.PolicyRaw = orLeastRequest(p.PolicyRaw)
	if err := p.load(ctx, p, "PolicyRaw"); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	return nil
}

// Validate implements caddy.Validator.
func (p *Subset) Validate() error {
	if len(p.Match) == 0 {
		return errors.New("match: there is nothing to compare; write match version {header.x-version}, say")
	}
	keys := make(map[string]bool)
	for _, m := range p.Match {
		switch {
		case m.Key == "":
			return errors.New("match: the key of the endpoints' metadata is empty")
		case m.Value == "":
			return fmt.Errorf("match: the value for %s is empty", m.Key)
		case keys[m.Key]:
			return fmt.Errorf("match: %s is compared twice", m.Key)
		}
		keys[m.Key] = true
	}
	switch p.Fallback {
	case "", fallbackNone, fallbackAny:
		if p.Default != nil {
			return errors.New("default: values are for the fallback default only")
		}
	case fallbackDefault:
		for _, m := range p.Match {
			if p.Default[m.Key] == "" {
				return fmt.Errorf("default: the value of %s is missing", m.Key)
			}
		}
		for key := range p.Default {
			if !keys[key] {
				return fmt.Errorf("default: %s is in no match", key)
			}
		}
	default:
		return fmt.Errorf("fallback: %q is none of none, any, default", p.Fallback)
	}
	if p.MaxSubsets < 0 {
		return fmt.Errorf("max_subsets: %d is negative", p.MaxSubsets)
	}
	return nil
}

// WithPriorities implements [Prioritized]: each subset has its levels.
func (p *Subset) WithPriorities() Policy {
	q := *p
	q.child = WithPriorities(p.child)
	return &q
}

// Build implements [Policy].
func (p *Subset) Build(s *upstream.Snapshot) Picker {
	limit := p.MaxSubsets
	if limit == 0 {
		limit = defaultMaxSubsets
	}
	groups := make(map[string]*upstream.Snapshot)
	var order []string
	left := 0
	for i := range s.Endpoints {
		values := p.valuesOf(&s.Endpoints[i])
		if values == "" {
			continue
		}
		group := groups[values]
		if group == nil {
			if len(order) == limit {
				left++
				continue
			}
			group = &upstream.Snapshot{Generation: s.Generation}
			groups[values] = group
			order = append(order, values)
		}
		group.Endpoints = append(group.Endpoints, s.Endpoints[i])
	}
	if left > 0 && p.logger != nil {
		p.logger.Warn("endpoints belong to more subsets than max_subsets allows; they are not found by what they match",
			slog.Int("max_subsets", limit), slog.Int("endpoints", left))
	}
	for i := range s.Draining {
		if group := groups[p.valuesOf(&s.Draining[i])]; group != nil {
			group.Draining = append(group.Draining, s.Draining[i])
		}
	}
	k := &subset{wants: p.wants, byValues: make(map[string]Picker, len(order))}
	for _, values := range order {
		picker := p.child.Build(groups[values])
		k.byValues[values] = picker
		k.pickers = append(k.pickers, picker)
	}
	switch p.Fallback {
	case fallbackAny:
		k.fallback = p.child.Build(s)
		k.pickers = append(k.pickers, k.fallback)
	case fallbackDefault:
		k.fallback = k.byValues[p.valuesOf(&upstream.Endpoint{Metadata: p.Default})]
	}
	return k
}

// valuesOf are the values that are compared, "" if one is missing.
func (p *Subset) valuesOf(e *upstream.Endpoint) string {
	var key []byte
	for _, m := range p.Match {
		v := e.Metadata[m.Key]
		if v == "" {
			return ""
		}
		key = appendValue(key, v)
	}
	return string(key)
}

// appendValue ends each value with a byte that metadata cannot have.
func appendValue(key []byte, value string) []byte { return append(append(key, value...), 0) }

type subset struct {
	pickers
	wants    sources
	byValues map[string]Picker
	fallback Picker
}

// Pick implements [Picker].
func (p *subset) Pick(in PickInfo) (Pick, bool) {
	var buf [256]byte
	if key, ok := p.values(in.Call, buf[:0]); ok {
		if q, ok := p.byValues[string(key)]; ok {
			return q.Pick(in)
		}
	}
	if p.fallback == nil {
		return Pick{}, false
	}
	return p.fallback.Pick(in)
}

// values are what the call asks for; not ok if it leaves something open.
func (p *subset) values(c *call.Call, key []byte) ([]byte, bool) {
	for i := range p.wants {
		v := p.wants[i].text(c)
		if v == "" {
			return nil, false
		}
		key = appendValue(key, v)
	}
	return key, true
}

// text is the value of a header or a text with placeholders.
func (s *source) text(c *call.Call) string {
	switch {
	case s.kind == fromPlaceholder && !strings.Contains(s.name, "{"):
		return s.name
	case c == nil:
		return ""
	case s.kind == fromAuthority:
		return c.Authority
	case s.kind == fromHeader:
		if c.Metadata == nil {
			return ""
		}
		switch v := c.Metadata.Values(s.name); len(v) {
		case 0:
			return ""
		case 1:
			return v[0]
		default:
			return strings.Join(v, ",")
		}
	case c.Placeholders != nil:
		return c.Placeholders.ReplaceAll(s.name, "")
	}
	return ""
}

var (
	_ Policy                = (*Subset)(nil)
	_ Prioritized           = (*Subset)(nil)
	_ HealthWatcher         = (*Subset)(nil)
	_ LoadReportReceiver    = (*Subset)(nil)
	_ caddy.Provisioner     = (*Subset)(nil)
	_ caddy.Validator       = (*Subset)(nil)
	_ caddyfile.Unmarshaler = (*Subset)(nil)
)
