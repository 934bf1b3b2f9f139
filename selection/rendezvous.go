package selection

import (
	"math"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(Rendezvous)) }

// Rendezvous sends calls with the same key to the same endpoint: the one whose hash together with the key is the lowest. Shares
// are as even as chance is, and follow weights exactly; when an endpoint comes or goes, no other keys move than its own.
// It looks at every endpoint for every call, some 10 microseconds for 10,000 of them, and needs no table.
//
// The entry `hash_key` of an endpoint's metadata stands for its address.
type Rendezvous struct{ Hashing }

// CaddyModule returns the Caddy module information.
func (*Rendezvous) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "rendezvous", New: func() caddy.Module { return new(Rendezvous) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy rendezvous [<source> [<name>]] {
//	    key      <source> [<name>] [terminal]
//	    fallback <policy> ...
//	}
//
// The sources are those of [HashKey]; key may be repeated.
func (p *Rendezvous) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return p.unmarshal(d, nil) }

// Provision implements caddy.Provisioner.
func (p *Rendezvous) Provision(ctx caddy.Context) error { return p.provision(ctx) }

// Build implements [Policy].
func (p *Rendezvous) Build(s *upstream.Snapshot) Picker { return newRendezvous(&p.hashing, s) }

func newRendezvous(h *hashing, s *upstream.Snapshot) Picker {
	r := &rendezvous{hashed: h.hashed(s), hashes: make([]uint64, len(s.Endpoints))}
	weights := make([]float64, len(s.Endpoints))
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		r.hashes[i], weights[i] = xxhash.Sum64String(e.HashKey()), float64(e.EffectiveWeight())
		if weights[i] != weights[0] {
			r.weights = weights
		}
	}
	return r.pass(r, s)
}

type rendezvous struct {
	hashed
	hashes  []uint64
	weights []float64 // nil if they are equal
}

// Pick implements [Picker].
func (p *rendezvous) Pick(in PickInfo) (int, bool) {
	h, ok := p.from.hash(in.Call)
	if !ok {
		if p.fallback != nil {
			return p.fallback.Pick(in)
		}
		h = randUint64()
	}
	if p.weights != nil {
		return p.weighted(h, in.Tried)
	}
	place, least := -1, uint64(math.MaxUint64)
	for i, e := range p.hashes {
		if x := mix(h ^ e); x <= least && p.open(i, in.Tried) {
			place, least = i, x
		}
	}
	return p.result(place, place >= 0)
}

// weighted is the method of Schindelhauer and Schomaker ("Weighted distributed hash tables", 2005): u being the hash of
// endpoint and key as a number in [0, 1), the least -ln(1-u)/w wins, and that is an endpoint of weight w with the
// probability w/sum. With equal weights it is the least hash. The logarithm is only worked out for endpoints that may win,
// since -ln(1-u) >= u.
func (p *rendezvous) weighted(h uint64, tried []int) (int, bool) {
	place, least := -1, math.Inf(1)
	for i, e := range p.hashes {
		w := p.weights[i]
		u := float64(int64(mix(h^e)>>11)) * 0x1p-53
		if u >= least*w {
			continue
		}
		if score := -math.Log1p(-u) / w; score < least && p.open(i, tried) {
			place, least = i, score
		}
	}
	return p.result(place, place >= 0)
}

var (
	_ Policy                = (*Rendezvous)(nil)
	_ HealthWatcher         = (*Rendezvous)(nil)
	_ LoadReportReceiver    = (*Rendezvous)(nil)
	_ caddy.Provisioner     = (*Rendezvous)(nil)
	_ caddyfile.Unmarshaler = (*Rendezvous)(nil)
)
