package selection

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(RingHash)) }

const (
	defaultMinRing = 1024
	defaultMaxRing = 4096
	maxRing        = 8_388_608
)

// RingHash sends calls with the same key to the same endpoint. Endpoints have many points each on a ring, by the hash of
// their address, and a call goes to the first point at or after the hash of its key. When an endpoint cannot be used, its
// keys are spread over the others, and no other keys move. When the set of endpoints changes, some other keys move too, up
// to a tenth of them in small sets, since the number of each endpoint's points depends on how many endpoints there are.
//
// It is gRPC's and Envoy's algorithm, and proxies of these kinds agree about who gets a key (gRFC A42, A76). The entry
// `hash_key` of an endpoint's metadata stands for its address, so that an endpoint can keep its keys under a new one.
type RingHash struct {
	Hashing

	// The ring has at least so many points, all endpoints together, 1 to 8388608. More points make the shares more even.
	// Default: `1024`.
	MinRingSize uint64 `json:"min_ring_size,omitempty"`

	// It has at most so many, 1 to 8388608, but one per endpoint if there are more endpoints than that. A point takes 12
	// bytes. Default: `4096`.
	MaxRingSize uint64 `json:"max_ring_size,omitempty"`

	// Let no endpoint have more calls in flight than so many percent of the average, at least 100; a call goes on to the
	// next endpoint on the ring instead. It keeps a popular key from overloading one endpoint. Usual are 120 to 200.
	// Default: `0`, no such limit.
	BalanceFactor int `json:"balance_factor,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*RingHash) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "ring_hash", New: func() caddy.Module { return new(RingHash) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy ring_hash [<source> [<name>]] {
//	    key            <source> [<name>] [terminal]
//	    fallback       <policy> ...
//	    min_ring_size  <points>
//	    max_ring_size  <points>
//	    balance_factor <percent>
//	}
//
// The sources are those of [HashKey]; key may be repeated.
func (p *RingHash) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return p.unmarshal(d, options{
		"min_ring_size":  numberOption(&p.MinRingSize),
		"max_ring_size":  numberOption(&p.MaxRingSize),
		"balance_factor": numberOption(&p.BalanceFactor),
	})
}

// Provision implements caddy.Provisioner.
func (p *RingHash) Provision(ctx caddy.Context) error { return p.provision(ctx) }

// Validate implements caddy.Validator.
func (p *RingHash) Validate() error {
	for _, f := range []struct {
		name string
		size uint64
	}{{"min_ring_size", p.MinRingSize}, {"max_ring_size", p.MaxRingSize}} {
		if f.size > maxRing {
			return fmt.Errorf("%s: %d is above the largest ring, %d", f.name, f.size, maxRing)
		}
	}
	if low, high := p.sizes(); low > high {
		return fmt.Errorf("min_ring_size: %d is above max_ring_size, %d", low, high)
	}
	return checkBalanceFactor(p.BalanceFactor)
}

func (p *RingHash) sizes() (low, high uint64) {
	return cmp.Or(p.MinRingSize, defaultMinRing), cmp.Or(p.MaxRingSize, defaultMaxRing)
}

// Build implements [Policy].
func (p *RingHash) Build(s *upstream.Snapshot) Picker {
	r := &ring{wheel: wheel{hashed: p.hashed(s), bound: newBound(p.BalanceFactor, s)}}
	low, high := p.sizes()
	r.points, r.slots = newRing(s, float64(low), float64(high))
	return r.pass(r, s)
}

// newRing returns the hashes of the ring's points in order, and to whom they belong.
//
// gRFC A42 and Envoy's ring_hash_lb.cc: scale = min(ceil(min_weight * min_size) / min_weight, max_size), with weights
// that add up to 1; an endpoint gets the points up to where the sum of its predecessors' and its own weight × scale is,
// each XXH64 of "<key>_<number>".
func newRing(s *upstream.Snapshot, minSize, maxSize float64) (points []uint64, slots []int32) {
	n := len(s.Endpoints)
	if n == 0 {
		return nil, nil
	}
	order, keys := hashOrder(s)
	sum, least := 0.0, math.Inf(1)
	for i := range s.Endpoints {
		w := float64(s.Endpoints[i].EffectiveWeight())
		sum += w
		least = min(least, w)
	}
	least /= sum
	// Unlike theirs, a ring has room for all endpoints: with more endpoints than points, some would never be picked.
	scale := min(math.Ceil(least*minSize)/least, max(maxSize, float64(n)))

	type point struct {
		hash        uint64
		place, rank int32 // The rank is the endpoint's in order: two may have the same key.
	}
	all := make([]point, 0, int(math.Ceil(scale))+1)
	var have, target float64
	var buf []byte
	for rank, place := range order {
		target += scale * (float64(s.Endpoints[place].EffectiveWeight()) / sum)
		buf = append(append(buf[:0], keys[place]...), '_')
		for i, stem := int64(0), len(buf); have < target; i++ {
			buf = strconv.AppendInt(buf[:stem], i, 10)
			all = append(all, point{xxhash.Sum64(buf), place, int32(rank)})
			have++
		}
	}
	slices.SortFunc(all, func(a, b point) int {
		if a.hash != b.hash {
			return cmp.Compare(a.hash, b.hash)
		}
		return cmp.Compare(a.rank, b.rank)
	})
	points, slots = make([]uint64, len(all)), make([]int32, len(all))
	for i, p := range all {
		points[i], slots[i] = p.hash, p.place
	}
	return points, slots
}

type ring struct {
	wheel
	points []uint64
}

// Pick implements [Picker]. gRFC A42: the first point whose hash is at least the call's, and the next ones if that
// endpoint is not open; without a key, a random hash.
func (p *ring) Pick(in PickInfo) (int, bool) {
	h, ok := p.from.hash(in.Call)
	if !ok {
		if p.fallback != nil {
			return p.fallback.Pick(in)
		}
		h = randUint64()
	}
	i, _ := slices.BinarySearch(p.points, h)
	if i == len(p.points) {
		i = 0
	}
	return p.walk(i, h, &in)
}

var (
	_ Policy                = (*RingHash)(nil)
	_ HealthWatcher         = (*RingHash)(nil)
	_ LoadReportReceiver    = (*RingHash)(nil)
	_ caddy.Provisioner     = (*RingHash)(nil)
	_ caddy.Validator       = (*RingHash)(nil)
	_ caddyfile.Unmarshaler = (*RingHash)(nil)
)
