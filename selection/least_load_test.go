package selection

import (
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// streams opens streams of some length, one each interval, that do work: most are silent, a tenth are busy. After half of
// the time it returns how uneven the endpoints' work is from then on: the standard deviation in parts of the mean.
func streams(t *testing.T, build func(s *upstream.Snapshot) Picker, every, length, d time.Duration) float64 {
	t.Helper()
	const n = 5
	s := snapshot(make([]int, n)...)
	p := build(s)
	rng := rand.New(rand.NewPCG(9, 10))
	var wg sync.WaitGroup
	before := make([]uint64, n)
	begin := time.Now()
	for half := false; time.Since(begin) < d; time.Sleep(every) {
		if !half && time.Since(begin) >= d/2 {
			half = true
			for i := range before {
				before[i] = s.Endpoints[i].State.Work().Bytes()
			}
		}
		i, ok := pick(p, PickInfo{})
		if !ok {
			t.Fatal("nothing picked")
		}
		state, busy := s.Endpoints[i].State, rng.IntN(10) == 0
		state.Begin()
		wg.Go(func() {
			defer state.End()
			if !busy {
				state.Work().Add(1, 100)
				time.Sleep(length)
				return
			}
			for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
				state.Work().Add(20, 20_000)
			}
		})
	}
	var sum, squares float64
	for i := range before {
		x := float64(s.Endpoints[i].State.Work().Bytes() - before[i])
		sum += x
		squares += x * x
	}
	wg.Wait()
	mean := sum / n
	return math.Sqrt(squares/n-mean*mean) / mean
}

// Streams of very different work are spread better than by their number, whatever the chance of a single run.
func TestLeastLoadStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		byLoad, byCount := 0.0, 0.0
		const runs = 8
		for range runs {
			byLoad += streams(t, new(LeastLoad).Build, 100*time.Millisecond, time.Minute, 6*time.Minute) / runs
			byCount += streams(t, (&LeastRequest{FullScan: true}).Build, 100*time.Millisecond, time.Minute, 6*time.Minute) / runs
		}
		t.Logf("standard deviation of the work: by load %.3f, by number %.3f of the mean", byLoad, byCount)
		if byLoad > 0.1 || byLoad > 0.5*byCount {
			t.Errorf("standard deviation of the work: by load %.3f, by number %.3f of the mean", byLoad, byCount)
		}
	})
}

// Short calls alternate even between two measurements: nobody gets them all because it had nothing to do at the last.
func TestLeastLoadShortCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := snapshot(0, 0, 0, 0)
		p := new(LeastLoad).Build(s)
		worst := 0.0
		for round := range 100 {
			counts := make([]int, 4)
			for range 200 { // a second's quarter
				i, _ := pick(p, PickInfo{})
				s.Endpoints[i].State.Work().Add(2, 500)
				counts[i]++
				time.Sleep(1250 * time.Microsecond)
			}
			synctest.Wait()
			for _, c := range counts {
				if round > 10 {
					worst = max(worst, math.Abs(float64(c)-50)/50)
				}
			}
		}
		t.Logf("worst deviation of a quarter of a second: %.2f", worst)
		if worst > 0.5 {
			t.Errorf("in a quarter of a second an endpoint got %.0f %% more or less than its share", 100*worst)
		}
	})
}

// An endpoint that was just added gets more streams than others until it has as much work, but not all of them.
func TestLeastLoadNewEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := snapshot(0, 0, 0)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		open := func(p Picker, s *upstream.Snapshot) int {
			i, _ := pick(p, PickInfo{})
			state := s.Endpoints[i].State
			state.Begin()
			wg.Go(func() {
				defer state.End()
				tick := time.NewTicker(100 * time.Millisecond)
				defer tick.Stop()
				for {
					select {
					case <-tick.C:
						state.Work().Add(10, 10_000)
					case <-stop:
						return
					}
				}
			})
			time.Sleep(20 * time.Millisecond)
			return i
		}
		p := new(LeastLoad).Build(old)
		for range 300 {
			open(p, old)
		}
		time.Sleep(20 * time.Second)
		p.Pick(PickInfo{})
		synctest.Wait()
		s := snapshot(0, 0, 0, 0)
		copy(s.Endpoints, old.Endpoints)
		p = new(LeastLoad).Build(s)
		// 100 more streams, in two seconds: with all of those that draw it, the new one would have as many as the
		// others; with twice as many it would be flooded.
		for range 400 {
			open(p, s)
		}
		for i := range s.Endpoints {
			if n := s.Endpoints[i].State.Active(); n < 140 || n > 210 {
				t.Errorf("endpoint %d has %d streams of 700", i, n)
			}
		}
		close(stop)
		wg.Wait()
	})
}

// Two pickers of the same configuration measure the same endpoints; none of the work is counted twice.
func TestLeastLoadTwoPickers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := snapshot(0, 0)
		a := new(LeastLoad).Build(s).(*leastLoad)
		b := new(LeastLoad).Build(s).(*leastLoad)
		if a.known[0] != b.known[0] {
			t.Fatal("they do not share what they know")
		}
		for range 600 {
			s.Endpoints[0].State.Work().Add(1, 904)
			a.Pick(PickInfo{})
			b.Pick(PickInfo{})
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
		}
		if got := number(&a.known[0].rate); math.Abs(got-50_000) > 1000 {
			t.Errorf("measured %.0f per second, want 50,000", got)
		}
		if got := number(&a.known[1].rate); got != 0 {
			t.Errorf("measured %.0f per second of nothing", got)
		}
	})
}
