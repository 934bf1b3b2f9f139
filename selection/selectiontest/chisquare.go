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
	sum := 0.0
	for _, i := range indexes {
		sum += float64(counts[i])
	}
	want := sum / float64(len(indexes))
	if want == 0 {
		t.Fatal("nothing was picked")
	}
	x := 0.0
	for _, i := range indexes {
		d := float64(counts[i]) - want
		x += d * d / want
	}
	if limit := chiSquareLimit(len(indexes) - 1); x > limit {
		t.Errorf("shares are not even: chi-square %.1f, limit %.1f; counts %v at %v", x, limit, counts, indexes)
	}
}

// chiSquareLimit is what a chi-square of so many degrees of freedom exceeds with a chance of 3e-7 (the normal
// distribution's z of 5), by the approximation of Wilson and Hilferty.
func chiSquareLimit(freedom int) float64 {
	const z = 5
	k := float64(freedom)
	return k * math.Pow(1-2/(9*k)+z*math.Sqrt(2/(9*k)), 3)
}
