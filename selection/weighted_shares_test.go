package selection

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func sharesOf(weights ...uint32) *shares {
	return newShares(len(weights), func(i int) uint32 { return weights[i] })
}

// Every number has its owner, found by counting; weights are told as they were given, but for a common divisor.
func TestSharesOwner(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	lists := [][]uint32{{1}, {7}, {1, 2}, {5, 1, 1}, {1, 1, 1, 1000}, {1000, 1, 1, 1}, {30, 20, 10}}
	for n := 2; n < 300; n += 17 {
		list := make([]uint32, n)
		for i := range list {
			list[i] = 1 + rng.Uint32N(1<<rng.IntN(10))
		}
		lists = append(lists, list)
	}
	for _, weights := range lists {
		s := sharesOf(weights...)
		number := uint32(0)
		for place, w := range weights {
			if got := s.weight(place); uint64(got)*uint64(weights[0]) != uint64(w)*uint64(s.weight(0)) {
				t.Fatalf("%v: weight %d is %d", weights, place, got)
			}
			for range s.weight(place) {
				if got := s.owner(number); got != place {
					t.Fatalf("%v: %d belongs to %d, not %d", weights, number, got, place)
				}
				number++
			}
		}
		if number != s.total {
			t.Fatalf("%v: total %d, want %d", weights, s.total, number)
		}
	}
}

// Within a cycle each endpoint gets exactly its turns, and in no part of it many more or fewer than its share.
func TestSharesTurns(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	lists := [][]uint32{{3, 1}, {5, 1, 1}, {100, 1}, {9, 10, 11}, {1, 2, 3, 4, 5}}
	for range 40 {
		list := make([]uint32, 2+rng.IntN(30))
		for i := range list {
			list[i] = 1 + rng.Uint32N(100)
		}
		lists = append(lists, list)
	}
	for _, weights := range lists {
		s := sharesOf(weights...)
		counts := make([]int, len(weights))
		worst := 0.0
		for t := range uint64(s.total) {
			counts[s.turn(t)]++
			for place, n := range counts {
				share := float64(t+1) * float64(s.weight(place)) / float64(s.total)
				worst = max(worst, math.Abs(float64(n)-share))
			}
		}
		for place, n := range counts {
			if n != int(s.weight(place)) {
				t.Errorf("%v: %d got %d turns", weights, place, n)
			}
		}
		if worst > 3 {
			t.Errorf("%v: someone is %.1f turns off its share", weights, worst)
		}
	}
}

// A small set of weights gives the turns that one would write down.
func TestSharesOrder(t *testing.T) {
	for _, tt := range []struct {
		weights []uint32
		want    []int
	}{
		{[]uint32{3, 1}, []int{0, 1, 0, 0, 0, 1, 0, 0}},
		{[]uint32{5, 1, 1}, []int{0, 0, 0, 1, 0, 2, 0}},
		{[]uint32{200, 100}, []int{0, 1, 0, 0, 1, 0}},
	} {
		s := sharesOf(tt.weights...)
		var got []int
		for i := range tt.want {
			got = append(got, s.turn(uint64(i)))
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%v: turns %v, want %v", tt.weights, got, tt.want)
		}
	}
}

// More than 65,536 endpoints of the largest weights need a coarser line, in which the shares are still right.
func TestSharesShrink(t *testing.T) {
	const n = 200_000
	s := newShares(n, func(i int) uint32 { return []uint32{65_535, 32_767, 1}[i%3] })
	for i, want := range []float64{2, 1} {
		if got := float64(s.weight(i)) / float64(s.weight(1)); math.Abs(got-want) > 0.001 {
			t.Errorf("weight %d is %.4f of weight 1, want %v", i, got, want)
		}
	}
	if s.weight(2) == 0 || s.owner(s.total-1) != n-1 || s.owner(0) != 0 {
		t.Errorf("weight 2 is %d, the last number belongs to %d", s.weight(2), s.owner(s.total-1))
	}
}

func TestStride(t *testing.T) {
	for total := uint32(1); total < 5000; total++ {
		s := stride(total)
		common, quotients := euclid(total, uint32(s))
		if s == 0 || common != 1 || total > 10 && quotients > 25 {
			t.Errorf("the stride of %d is %d", total, s)
		}
	}
}
