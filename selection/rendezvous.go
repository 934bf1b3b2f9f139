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
	r := &rendezvous{hashed: h.hashed(s)}
	of := make(map[uint32]int)
	for i := range s.Endpoints {
		w := s.Endpoints[i].EffectiveWeight()
		c, ok := of[w]
		if !ok {
			c = len(r.classes)
			of[w] = c
			r.classes = append(r.classes, class{weight: float64(w)})
		}
		r.classes[c].hashes = append(r.classes[c].hashes, xxhash.Sum64String(s.Endpoints[i].HashKey()))
		r.classes[c].places = append(r.classes[c].places, int32(i))
	}
	return r
}

type rendezvous struct {
	hashed
	classes []class
}

// class is all endpoints of one weight.
type class struct {
	weight float64
	hashes []uint64
	places []int32
}

// Pick implements [Picker].
func (p *rendezvous) Pick(in PickInfo) (Pick, bool) {
	h, keyed := p.from.hash(in.Call)
	if !keyed {
		if p.fallback != nil {
			return p.fallback.Pick(in)
		}
		h = randUint64()
	}
	if len(p.classes) > 1 {
		place, ok := p.weighted(h, &in)
		return p.result(place, ok, keyed)
	}
	place, least := -1, uint64(math.MaxUint64)
	for _, c := range p.classes { // One, or none.
		for i, e := range c.hashes {
			if x := mix(h ^ e); x <= least && p.open(i, &in) {
				place, least = i, x
			}
		}
	}
	return p.result(place, place >= 0, keyed)
}

// weighted is the method of Schindelhauer and Schomaker ("Weighted distributed hash tables", 2005): u being the hash of
// endpoint and key as a number in [0, 1), the least -ln(1-u)/w wins, and that is an endpoint of weight w with the
// probability w/sum. With equal weights it is the least hash. The logarithm is only worked out for endpoints that may win:
// since -ln(1-u) >= u, their u is below the least score so far × w.
func (p *rendezvous) weighted(h uint64, in *PickInfo) (place int, ok bool) {
	place = -1
	least := math.Inf(1)
	for i := range p.classes {
		c := &p.classes[i]
		limit := limitOf(least * c.weight)
		for k, e := range c.hashes {
			x := mix(h ^ e)
			if x > limit {
				continue
			}
			u := float64(x>>11) * 0x1p-53
			if score := -math.Log1p(-u) / c.weight; score < least && p.open(int(c.places[k]), in) {
				place, least = int(c.places[k]), score
				limit = limitOf(least * c.weight)
			}
		}
	}
	return place, place >= 0
}

// limitOf is the greatest hash that makes a number of at most u.
func limitOf(u float64) uint64 {
	if u >= 1 {
		return math.MaxUint64
	}
	return uint64(u*0x1p53)<<11 | 1<<11 - 1
}

var (
	_ Policy                = (*Rendezvous)(nil)
	_ Keyed                 = (*Rendezvous)(nil)
	_ HealthWatcher         = (*Rendezvous)(nil)
	_ LoadReportReceiver    = (*Rendezvous)(nil)
	_ caddy.Provisioner     = (*Rendezvous)(nil)
	_ caddyfile.Unmarshaler = (*Rendezvous)(nil)
)
