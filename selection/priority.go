package selection

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(Priority)) }

// Priority sends calls to the endpoints with the lowest priority number as long as enough of them can be used, and what
// they cannot carry to the next ones, gradually. Every policy does so without being told if the endpoints have several
// priorities; this one is there to set the factor.
//
// Calls spill over as in Envoy: a level of which 80 percent can be used is still considered able to carry everything, since
// 80 × 1.4 > 100; with 50 percent it carries 50 × 1.4 = 70 percent of the calls, and the next level the rest.
type Priority struct {
	// How much more load endpoints can carry than they get when all of them can be used, 1 to 100. Default: `1.4`.
	OverprovisioningFactor float64 `json:"overprovisioning_factor,omitempty"`

	// The policy that chooses within a level. Default: `least_request`.
	PolicyRaw json.RawMessage `json:"child,omitempty" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`

	nested
	severalLevels atomic.Bool
}

// WithPriorities makes any policy honour the endpoints' priorities: what is [Prioritized] in its own way, all else within a
// Priority. It costs nothing as long as all endpoints have the same: then the policy's own picker is built.
func WithPriorities(p Policy) Policy {
	if p, ok := p.(Prioritized); ok {
		return p.WithPriorities()
	}
	return &Priority{nested: nested{p}}
}

// WithPriorities implements [Prioritized].
func (p *Priority) WithPriorities() Policy { return p }

// CaddyModule returns the Caddy module information.
func (*Priority) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "priority", New: func() caddy.Module { return new(Priority) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy priority {
//	    overprovisioning_factor <factor>
//	    policy                  <policy> ...
//	}
func (p *Priority) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // The policy's name.
	if d.NextArg() {
		return d.Errf("priority: unexpected argument %q; options go into a block", d.Val())
	}
	return options{
		"overprovisioning_factor": factorOption(&p.OverprovisioningFactor),
		"policy":                  policyOption(&p.PolicyRaw),
	}.parse(d, "priority")
}

// Provision implements caddy.Provisioner.
func (p *Priority) Provision(ctx caddy.Context) error {
	p.PolicyRaw = orLeastRequest(p.PolicyRaw)
	if err := p.load(ctx, p, "PolicyRaw"); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	return nil
}

// Validate implements caddy.Validator.
func (p *Priority) Validate() error {
	if err := p.notSticky("priority"); err != nil {
		return err
	}
	return checkOverprovisioning(p.OverprovisioningFactor)
}

// WatchesHealth implements [HealthWatcher]. With one level the shares do not depend on health, so the answer may change
// with the snapshot: it is right once a picker was built for it.
func (p *Priority) WatchesHealth() bool { return p.severalLevels.Load() || p.nested.WatchesHealth() }

// Build implements [Policy].
func (p *Priority) Build(s *upstream.Snapshot) Picker {
	parts := byPriority(s.Endpoints)
	if len(parts) < 2 {
		return p.child.Build(s)
	}
	p.severalLevels.Store(true)
	list, health := make([]level, len(parts)), make([]int, len(parts))
	for i, endpoints := range parts {
		list[i].endpoints = endpoints
		health[i] = p.health(usable(endpoints), len(endpoints))
	}
	for i, load := range priorityLoad(health) {
		list[i].share = float64(load) / 100
	}
	return p.buildLevels(s, list, true)
}

// byPriority parts endpoints into levels, the first of which is used first. It returns nil if all are of one level.
func byPriority(endpoints []upstream.Endpoint) (levels [][]upstream.Endpoint) {
	if !slices.ContainsFunc(endpoints, func(e upstream.Endpoint) bool { return e.Priority != endpoints[0].Priority }) {
		return nil
	}
	sorted := slices.Clone(endpoints)
	slices.SortStableFunc(sorted, func(a, b upstream.Endpoint) int { return cmp.Compare(a.Priority, b.Priority) })
	for len(sorted) > 0 {
		end := slices.IndexFunc(sorted, func(e upstream.Endpoint) bool { return e.Priority != sorted[0].Priority })
		if end < 0 {
			end = len(sorted)
		}
		levels = append(levels, sorted[:end:end])
		sorted = sorted[end:]
	}
	return levels
}

// health is how many percent of all calls a level can carry.
func (p *Priority) health(usable, all int) int {
	factor := int(math.Round(100 * cmp.Or(p.OverprovisioningFactor, defaultOverprovisioning)))
	return min(100, factor*usable/all)
}

// priorityLoad returns how many percent of the calls each level gets, given their health in percent.
//
// Envoy, "Priority levels": a level gets min(what is left, its health × 100 / normalized total health), where the total
// health is the sum of all, at most 100; what rounding leaves over goes to the first level that is healthy at all. If
// none is, everything goes to the first.
func priorityLoad(health []int) []int {
	total := 0
	for _, h := range health {
		total += h
	}
	total = min(total, 100)
	load := make([]int, len(health))
	if total == 0 {
		load[0] = 100
		return load
	}
	left, first := 100, -1
	for i, h := range health {
		load[i] = min(left, h*100/total)
		left -= load[i]
		if first < 0 && h > 0 {
			first = i
		}
	}
	load[first] += left
	return load
}

var (
	_ Policy                = (*Priority)(nil)
	_ Prioritized           = (*Priority)(nil)
	_ HealthWatcher         = (*Priority)(nil)
	_ LoadReportReceiver    = (*Priority)(nil)
	_ caddy.Provisioner     = (*Priority)(nil)
	_ caddy.Validator       = (*Priority)(nil)
	_ caddyfile.Unmarshaler = (*Priority)(nil)
)
