package selectiontest

import (
	"math"
	"testing"
)

// evenly fails the test unless the counts at the indexes (all if nil) look like draws with equal chances. A right policy
// fails about once in three million times.
func evenly(t *testing.T, counts []int64, indexes []int) {
	t.Helper()
	if indexes == nil {
		indexes = between(0, len(counts))
	}
	if len(indexes) < 2 {
		return
	}
	weights := make([]float64, len(counts))
	for _, i := range indexes {
		weights[i] = 1
	}
	byWeight(t, counts, weights)
}

// byWeight fails the test unless the counts look like draws with chances in the weights' proportion. Those of weight 0
// are not looked at.
func byWeight(t *testing.T, counts []int64, weights []float64) {
	t.Helper()
	sum, total, freedom := 0.0, 0.0, -1
	for i, w := range weights {
		if w > 0 {
			sum += float64(counts[i])
			total += w
			freedom++
		}
	}
	if sum == 0 {
		t.Fatal("nothing was picked")
	}
	if freedom < 1 {
		return
	}
	x := 0.0
	for i, w := range weights {
		if w > 0 {
			want := sum * w / total
			d := float64(counts[i]) - want
			x += d * d / want
		}
	}
	if limit := chiSquareLimit(freedom); x > limit {
		t.Errorf("shares are not as they should be: chi-square %.1f, limit %.1f; counts %v, weights %v", x, limit, counts, weights)
	}
}

// chiSquareLimit is what a chi-square of so many degrees of freedom exceeds with a chance of 3e-7 (the normal
// distribution's z of 5), by the approximation of Wilson and Hilferty.
func chiSquareLimit(freedom int) float64 {
	const z = 5
	k := float64(freedom)
	return k * math.Pow(1-2/(9*k)+z*math.Sqrt(2/(9*k)), 3)
}
