package selection

import (
	"math"
	"sync/atomic"
	"time"
)

// epoch is when the clock of averages was zero.
var epoch = time.Now()

// clock is the time in nanoseconds, for differences.
func clock() int64 { return int64(time.Since(epoch)) }

// average is an exponentially weighted moving average of values that come at any time: what is older than a decay time
// counts 1/e of what is new. No lock is needed. The values of two that come at once share the time since the last one.
type average struct {
	value atomic.Uint64 // the bits of a float64
	stamp atomic.Int64  // when it was last updated
}

func (a *average) set(x float64, now int64) {
	a.value.Store(math.Float64bits(x))
	a.stamp.Store(now)
}

// add takes a value. A peak-sensitive average jumps to values that are higher than itself.
func (a *average) add(x float64, now int64, decay float64, peak bool) {
	keep := kept(now-a.stamp.Swap(now), decay)
	for {
		old := a.value.Load()
		v := math.Float64frombits(old)
		if peak && x > v {
			v = x
		} else {
			v = v*keep + x*(1-keep)
		}
		if a.value.CompareAndSwap(old, math.Float64bits(v)) {
			return
		}
	}
}

// last is the average when it was last updated.
func (a *average) last() float64 { return math.Float64frombits(a.value.Load()) }

// at is the average now, which tends to 0 as long as no value comes.
func (a *average) at(now int64, decay float64) float64 {
	v := a.last()
	if v == 0 {
		return 0
	}
	return v * kept(now-a.stamp.Load(), decay)
}

// kept is how much of an average is left after some time, in nanoseconds.
func kept(passed int64, decay float64) float64 { return math.Exp(-float64(max(passed, 0)) / decay) }
