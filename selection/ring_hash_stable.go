package selection

import (
	"math"
	"math/bits"

	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const (
	stableSize    = 65_536 // stretches
	ringPoints    = 512    // for each unit of weight: shares differ by 1/sqrt(512), 4 %
	ringStretches = 4      // for each endpoint at least, and up to twice as many
)

// stablePoints returns the hashes of a ring's points in order, and to whom they belong. An endpoint that comes, goes or
// changes its weight moves no keys between others, whatever the weights are.
//
// Where the number of all points is limited, that of each endpoint depends on the others' weights, and so does whose keys are
// whose. Here the room is limited instead: the ring is divided into stretches, and endpoints compete for each. In one round,
// an endpoint with the weight w has w turns, and in each turn a point, by its own hash. Who is first in a stretch has it;
// the second stands in; what comes later is dropped. Which of two is before the other depends on nobody else, and that is
// why no others' keys move. (It is weighted rendezvous hashing for the stretches, and while most of them are free, an
// ordinary ring.) The second is there so that keys of an endpoint which cannot be used go where they will be when it is gone.
func stablePoints(s *upstream.Snapshot, size int) (points []uint64, slots []int32) {
	// A power of two: if there must be twice as many, half of the keys stay where they are.
	log := bits.Len(uint(max(size, 2*ringStretches*len(s.Endpoints)))) - 1
	shift := 64 - log
	// Contenders are compared by their time. Equal times are rare but where two endpoints have the same key: the rank decides.
	type stretch struct{ first, second uint64 }
	const free = math.MaxUint64
	all := make([]stretch, 1<<log)
	for i := range all {
		all[i] = stretch{free, free}
	}
	order, keys := hashOrder(s)
	type runner struct {
		seed, turn uint64
		each       float64 // the time between two turns
	}
	runners := make([]runner, len(order))
	sum := 0.0
	for rank, place := range order {
		w := float64(s.Endpoints[place].EffectiveWeight())
		sum += w
		runners[rank] = runner{seed: xxhash.Sum64String(keys[place]), each: 1 / w}
	}
	taken := 0
	// Once all stretches are taken, nobody can come first any more.
	for now := 0.0; taken < len(all) && now < ringPoints && len(runners) > 0; {
		now = min(now+2*float64(len(all))/sum, ringPoints)
		for rank := range runners {
			r := &runners[rank]
			for ; ; r.turn++ {
				hash := mix(r.seed + r.turn*mixStep)
				moment := float64(uint32(hash)) * 0x1p-32
				time := (float64(r.turn) + moment) * r.each
				if r.turn == 0 {
					time = moment * 0x1p-40 // Before anybody's second turn: the least weight has a point too.
				} else if time >= now {
					break
				}
				contender := uint64(math.Float32bits(float32(time)))<<32 | uint64(rank)
				switch at := &all[hash>>shift]; {
				case contender < at.first:
					if at.first == free {
						taken++
					}
					at.first, at.second = contender, at.first
				case contender < at.second && uint32(at.first) != uint32(rank):
					at.second = contender
				}
			}
		}
	}
	points, slots = make([]uint64, 0, 2*taken), make([]int32, 0, 2*taken)
	for k, at := range all {
		end := uint64(k+1)<<shift - 1
		for _, contender := range [...]uint64{at.first, at.second} {
			if contender != free {
				points, slots = append(points, end), append(slots, order[uint32(contender)])
			}
		}
	}
	return points, slots
}
