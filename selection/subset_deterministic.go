package selection

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/bits"
	"os"
	"slices"
	"strconv"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(DeterministicSubset)) }

// DeterministicSubset uses some of the endpoints only, so that in a large installation not every proxy is connected to every
// endpoint. Which ones does not change with reloads and restarts, and little with the set of endpoints. Endpoints of the rest
// get calls while none of the chosen can be used; until then nothing connects to them, health checks included.
//
// If each proxy knows its number in the fleet, the proxies are spread over a circle of all endpoints, and each takes those
// that follow: with 100 proxies that take 20 of 200 endpoints each, an endpoint has 9 to 11 proxies. (Deterministic aperture,
// as in Twitter's Finagle, without having to know how many proxies there are.) Else each proxy takes those whose hash with
// its identity is lowest, independently of the others: an endpoint has 10 proxies on average, and nearly all have 4 to 16.
// (gRFC A68, random_subsetting.)
type DeterministicSubset struct {
	// How many endpoints to use. It is needed. With fewer endpoints, all are used.
	Size int `json:"size,omitempty"`

	// The number of this proxy in the fleet, from 0 on: the ordinal of a StatefulSet, say. A placeholder such as
	// `{env.POD_INDEX}` is resolved when the configuration is loaded. Default: unknown.
	Index string `json:"index,omitempty"`

	// What tells this proxy from others where `index` is not given. Placeholders are resolved when the configuration is
	// loaded. Default: the host name.
	Identity string `json:"identity,omitempty"`

	// The policy that chooses among the endpoints. Default: `least_request`.
	PolicyRaw json.RawMessage `json:"child,omitempty" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`

	nested
	index   int // -1 if it is not known
	seed    uint64
	chooses atomic.Bool // there are more endpoints than it uses
}

// CaddyModule returns the Caddy module information.
func (*DeterministicSubset) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "deterministic_subset", New: func() caddy.Module { return new(DeterministicSubset) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy deterministic_subset <size> {
//	    index    <number>
//	    identity <name>
//	    policy   <policy> ...
//	}
func (p *DeterministicSubset) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // The policy's name.
	if err := numberOption(&p.Size)(d); err != nil {
		return err
	}
	return options{
		"index":    textOption(&p.Index),
		"identity": textOption(&p.Identity),
		"policy":   policyOption(&p.PolicyRaw),
	}.parse(d, "deterministic_subset")
}

// Provision implements caddy.Provisioner.
func (p *DeterministicSubset) Provision(ctx caddy.Context) error {
	repl := caddy.NewReplacer()
	p.index = -1
	if p.Index != "" {
		text := repl.ReplaceAll(p.Index, "")
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 {
			return fmt.Errorf("index: %s is %q, not the number of a proxy, 0 or above", p.Index, text)
		}
		p.index = n
	}
	identity := repl.ReplaceAll(p.Identity, "")
	if identity == "" {
		if p.Identity != "" {
			return fmt.Errorf("identity: %s is empty", p.Identity)
		}
		var err error
		if identity, err = os.Hostname(); err != nil && p.index < 0 {
			return fmt.Errorf("identity: the host name cannot be found out, so identity or index is needed: %w", err)
		}
	}
	p.seed = xxhash.Sum64String(identity)
	p.PolicyRaw = orLeastRequest(p.PolicyRaw)
	if err := p.load(ctx, p, "PolicyRaw"); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	return nil
}

// Validate implements caddy.Validator.
func (p *DeterministicSubset) Validate() error {
	if p.Size < 1 {
		return fmt.Errorf("size: %d endpoints are too few, the least is 1", p.Size)
	}
	if p.Index != "" && p.Identity != "" {
		return fmt.Errorf("index, identity: both %s and %s tell this proxy from others; choose one", p.Index, p.Identity)
	}
	// Each proxy of a fleet uses others, so a client's calls by another proxy would not find its endpoint.
	return p.notSticky("deterministic_subset")
}

// Build implements [Policy].
func (p *DeterministicSubset) Build(s *upstream.Snapshot) Picker {
	if len(s.Endpoints) <= p.Size {
		return p.child.Build(s)
	}
	p.chooses.Store(true)
	chosen, rest := p.split(s)
	return p.buildSubset(s, chosen, rest)
}

// split returns the endpoints that this proxy uses and the others, of more endpoints than it uses.
//
// Proxies that know their number begin at the places that the van der Corput sequence gives: 0, 1/2, 1/4, 3/4, 1/8, 5/8, ….
// However many proxies there are, they are spread well, and those that come later leave the others where they are. (To deal
// out the endpoints, subset after subset, as chapter 20 of "Site Reliability Engineering" has it, is even more even. But the
// places then depend on how often all endpoints fit into what was dealt before, so that with one endpoint more or less, the
// proxies of a large fleet move half of their connections.)
func (p *DeterministicSubset) split(s *upstream.Snapshot) (chosen, rest []upstream.Endpoint) {
	order, first := shuffled(s, p.seed), 0
	if p.index >= 0 {
		order = shuffled(s, 0)
		place, _ := bits.Mul64(bits.Reverse64(uint64(p.index)), uint64(len(order)))
		first = int(place)
	}
	for i := range order {
		e := s.Endpoints[order[(first+i)%len(order)]]
		if i < p.Size {
			chosen = append(chosen, e)
		} else {
			rest = append(rest, e)
		}
	}
	return chosen, rest
}

// shuffled returns the places of the endpoints in an order that depends on the seed and their hash keys alone.
func shuffled(s *upstream.Snapshot, seed uint64) []int32 {
	order, hashes := make([]int32, len(s.Endpoints)), make([]uint64, len(s.Endpoints))
	for i := range s.Endpoints {
		order[i], hashes[i] = int32(i), mix(seed^xxhash.Sum64String(s.Endpoints[i].HashKey()))
	}
	slices.SortFunc(order, func(a, b int32) int {
		return cmp.Or(cmp.Compare(hashes[a], hashes[b]), cmp.Compare(s.Endpoints[a].Address, s.Endpoints[b].Address))
	})
	return order
}

var (
	_ Policy                = (*DeterministicSubset)(nil)
	_ Selective             = (*DeterministicSubset)(nil)
	_ HealthWatcher         = (*DeterministicSubset)(nil)
	_ LoadReportReceiver    = (*DeterministicSubset)(nil)
	_ caddy.Provisioner     = (*DeterministicSubset)(nil)
	_ caddy.Validator       = (*DeterministicSubset)(nil)
	_ caddyfile.Unmarshaler = (*DeterministicSubset)(nil)
)
