package selection

import (
	"math"
	"math/bits"
)

// shares is a line of whole numbers, from 0 to total, of which each endpoint owns a piece as long as its weight. It finds
// the owner of a number in constant time, and it deals turns.
//
// It is what weighted policies share. A random number gives a random endpoint with the right chance. Turns go through
// all numbers once, in steps of about 0.618 of the line (the golden ratio, whose multiples are spread over a line more
// evenly than those of any other number), so that each endpoint is dealt exactly its weight in total turns, and its turns
// are spread over them. Compared with what others do: an EDF heap (Envoy) needs a lock; a table of turns as long as the
// sum of all weights is exact but may have billions of entries; the static stride of gRFC A58 skips turns, on average as
// many as the largest weight is times the mean, which for one large endpoint among ten thousand is thousands per call.
type shares struct {
	total uint32
	step  uint64 // coprime to total
	// ends[i] is where the piece of the endpoint at place i ends and that of the next begins.
	ends []uint32
	// guide[k] is the owner of the number k<<shift. There are about as many entries as endpoints, so that it leads
	// almost always to the owner or next to it (Chen and Asau, "On generating random variates from an empirical
	// distribution", 1974).
	guide []int32
	shift uint8
}

// newShares makes the shares of n endpoints by their weights, none of which may be 0.
func newShares(n int, weight func(place int) uint32) *shares {
	s := &shares{ends: make([]uint32, n)}
	common, sum := uint32(0), uint64(0)
	for i := range s.ends {
		w := weight(i)
		s.ends[i] = w
		common, _ = euclid(common, w)
		sum += uint64(w)
	}
	sum /= uint64(common)
	shrink := 0 // More than 65,536 endpoints may need a line of more than 2^32 numbers, which then gets coarser.
	for ; sum > math.MaxUint32; shrink++ {
		sum = sum/2 + uint64(n)
	}
	for i, w := range s.ends {
		s.total += max(w/common>>shrink, 1)
		s.ends[i] = s.total
	}
	s.step = stride(s.total)
	s.shift = uint8(max(bits.Len32(s.total-1)-bits.Len(uint(n)), 0))
	s.guide = make([]int32, (s.total-1)>>s.shift+2)
	place := int32(0)
	for k := range s.guide {
		for int(place) < n-1 && uint64(s.ends[place]) <= uint64(k)<<s.shift {
			place++
		}
		s.guide[k] = place
	}
	return s
}

// stride is a number near 0.618 of total that has no divisor in common with it, so that its multiples visit every number
// below total once before they repeat. How evenly they do that depends on the quotients of Euclid's algorithm, the smaller
// the better (those of the golden ratio are all 1), and just next to 0.618 of some totals there are only bad ones.
func stride(total uint32) uint64 {
	const reach = 64
	golden := int64(math.Round(float64(total) * (math.Sqrt(5) - 1) / 2))
	best, least := int64(1), uint32(math.MaxUint32)
	for d := int64(0); d <= reach; d++ {
		for _, s := range [...]int64{golden + d, golden - d} {
			if s <= 0 || s >= int64(total) {
				continue
			}
			if common, sum := euclid(total, uint32(s)); common == 1 && sum < least {
				best, least = s, sum
			}
		}
	}
	return uint64(best)
}

// euclid returns the greatest common divisor and the sum of the algorithm's quotients.
func euclid(a, b uint32) (divisor, quotients uint32) {
	for b != 0 {
		quotients += a / b
		a, b = b, a%b
	}
	return a, quotients
}

// owner is the place of the endpoint that the number belongs to.
func (s *shares) owner(number uint32) int {
	k := number >> s.shift
	low, high := int(s.guide[k]), int(s.guide[k+1])
	for low < high {
		middle := int(uint(low+high) >> 1)
		if number < s.ends[middle] {
			high = middle
		} else {
			low = middle + 1
		}
	}
	return low
}

// turn is the place of the endpoint whose turn it is.
func (s *shares) turn(t uint64) int {
	return s.owner(uint32(t % uint64(s.total) * s.step % uint64(s.total)))
}

// draw is the place of a random endpoint.
func (s *shares) draw() int { return s.owner(uint32(randN(int(s.total)))) }

// weight is the length of the endpoint's piece; all weigh 1 where there are no shares.
func (s *shares) weight(place int) uint32 {
	switch {
	case s == nil:
		return 1
	case place == 0:
		return s.ends[0]
	}
	return s.ends[place] - s.ends[place-1]
}

// lightness is how many times the endpoint's weight goes into the mean: what its load is multiplied with, so that loads
// of endpoints of different weights can be compared.
func (s *shares) lightness(place int) float64 {
	if s == nil {
		return 1
	}
	return float64(s.total) / float64(len(s.ends)) / float64(s.weight(place))
}
