package selection

import (
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(RingHash)) }

const (
	// gRFC A42. Envoy's default for the smallest ring is the same, and for the largest maxRing.
	defaultMinRing = 1024
	defaultMaxRing = 4096

	maxRing = 8_388_608
)

// RingHash sends calls with the same key to the same endpoint. Endpoints have many points each on a ring, by the hash of
// their address, and a call goes to the first point at or after the hash of its key. When an endpoint cannot be used, its
// keys are spread over the others, and no other keys move.
//
// It is gRPC's and Envoy's algorithm (gRFC A42, A76): they and we agree about who gets a key. An endpoint's number of points
// depends on the others' weights, so when one comes, goes or changes its weight, some keys move between others too;
// `maglev` moves few of them, and `rendezvous` none. The entry `hash_key` of an endpoint's metadata stands for its address,
// so that an endpoint can keep its keys under a new one.
type RingHash struct {
	Hashing

	// The least number of points, all endpoints together, 1 to 8388608. Default: `1024`.
	MinRingSize uint64 `json:"min_ring_size,omitempty"`

	// The largest number of points, 1 to 8388608, but one per endpoint if there are more endpoints than that. A point takes
	// 14 bytes. Default: that of gRPC clients, `4096`; Envoy's is `8388608`.
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
		"balance_factor": percentOption(&p.BalanceFactor),
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
	switch low, high := p.sizes(); {
	case low <= high:
	case p.MinRingSize == 0:
		return fmt.Errorf("max_ring_size: %d is below min_ring_size, which is %d by default; set that too", high, low)
	case p.MaxRingSize == 0:
		return fmt.Errorf("min_ring_size: %d is above max_ring_size, which is %d by default; set that too", low, high)
	default:
		return fmt.Errorf("min_ring_size: %d is above max_ring_size, %d", low, high)
	}
	return checkBalanceFactor(p.BalanceFactor)
}

func (p *RingHash) sizes() (low, high uint64) {
	return cmp.Or(p.MinRingSize, defaultMinRing), cmp.Or(p.MaxRingSize, defaultMaxRing)
}

// Build implements [Policy].
func (p *RingHash) Build(s *upstream.Snapshot) Picker {
	low, high := p.sizes()
	// Unlike theirs, the ring has as many points as there are endpoints at least: with fewer, some would never be picked.
	high = max(high, uint64(len(s.Endpoints)))
	points, slots := ringPoints(s, ringShares(s, float64(low), float64(high)))
	return newRing(wheel{hashed: p.hashed(s), slots: slots, bound: newBound(p.BalanceFactor, s)}, points)
}

// ringShares returns how many points each endpoint has in the rings of gRPC and Envoy (gRFC A42, ring_hash_lb.cc): with
// weights that add up to 1, scale = min(ceil(min_weight * min_size) / min_weight, max_size), and in the order of the ring an
// endpoint gets the points up to where the sum of its predecessors' and its own weight × scale is.
func ringShares(s *upstream.Snapshot, minSize, maxSize float64) []int {
	sum, least := 0.0, math.Inf(1)
	for i := range s.Endpoints {
		w := float64(s.Endpoints[i].EffectiveWeight())
		sum += w
		least = min(least, w)
	}
	least /= sum
	scale := min(math.Ceil(least*minSize)/least, maxSize)
	shares := make([]int, len(s.Endpoints))
	var have, target float64
	order, _ := hashOrder(s)
	for _, place := range order {
		target += scale * (float64(s.Endpoints[place].EffectiveWeight()) / sum)
		for ; have < target; have++ {
			shares[place]++
		}
	}
	return shares
}

// ringPoints returns the hashes of the ring's points in order, and to whom they belong. An endpoint's points are XXH64 of
// "<key>_<number>" (gRFC A42, ring_hash_lb.cc).
func ringPoints(s *upstream.Snapshot, shares []int) (points []uint64, slots []int32) {
	type point struct {
		hash        uint64
		place, rank int32 // The rank is the endpoint's in order: two may have the same key.
	}
	size := 0
	for _, n := range shares {
		size += n
	}
	all := make([]point, 0, size)
	var buf []byte
	order, keys := hashOrder(s)
	for rank, place := range order {
		buf = append(append(buf[:0], keys[place]...), '_')
		for i, stem := 0, len(buf); i < shares[place]; i++ {
			buf = strconv.AppendInt(buf[:stem], int64(i), 10)
			all = append(all, point{xxhash.Sum64(buf), place, int32(rank)})
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

// ring is a wheel whose slots are the points of a ring.
type ring struct {
	wheel
	points []uint64
	// start has for each value of a hash's first bits the first point that may be at or after the hash: one does not have
	// to search for it.
	start []int32
	shift int // leaves the first bits
}

func newRing(w wheel, points []uint64) *ring {
	first := bits.Len(uint(len(points) / 4)) // two to four points have the same first bits
	r := &ring{wheel: w, points: points, start: make([]int32, 1<<first), shift: 64 - first}
	i := 0
	for k := range r.start {
		for i < len(points) && points[i] < uint64(k)<<r.shift {
			i++
		}
		r.start[k] = int32(i)
	}
	return r
}

// Pick implements [Picker]. gRFC A42: the first point whose hash is at least the call's, and the next ones if that
// endpoint is not open; without a key, a random hash.
func (p *ring) Pick(in PickInfo) (Pick, bool) {
	h, keyed := p.from.hash(in.Call)
	if !keyed {
		if p.fallback != nil {
			return p.fallback.Pick(in)
		}
		h = randUint64()
	}
	i := int(p.start[h>>p.shift])
	for i < len(p.points) && p.points[i] < h {
		i++
	}
	if i == len(p.points) {
		i = 0
	}
	place, ok := p.walk(i, h, &in)
	return p.result(place, ok, keyed)
}

var (
	_ Policy                = (*RingHash)(nil)
	_ Keyed                 = (*RingHash)(nil)
	_ HealthWatcher         = (*RingHash)(nil)
	_ LoadReportReceiver    = (*RingHash)(nil)
	_ caddy.Provisioner     = (*RingHash)(nil)
	_ caddy.Validator       = (*RingHash)(nil)
	_ caddyfile.Unmarshaler = (*RingHash)(nil)
)
