// Package selectiontest tests whether a selection policy keeps the contract of package selection. Every policy passes
// it, those of other modules too:
//
//	func TestMyPolicy(t *testing.T) {
//		selectiontest.Run(t, func() selection.Policy { return new(MyPolicy) }, selectiontest.Traits{Even: true})
//	}
//
// Those that choose by way of other policies pass [RunAround] as well.
package selectiontest

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Traits say what a policy promises beyond the contract, for endpoints of equal weight unless it says otherwise.
type Traits struct {
	// Even: open endpoints with equally many calls in flight are picked equally often, apart from chance.
	Even bool
	// Exact: they are picked exactly equally often, also by calls that come at the same time. It goes with Even.
	Exact bool
	// Ordered: the open endpoint with the lowest index is picked, always.
	Ordered bool
	// Least: an endpoint with more calls in flight than all others is picked less often than they are.
	Least bool
	// Weighted: open endpoints without calls in flight are picked as often as their weights say, apart from chance. It
	// goes with Even.
	Weighted bool
	// Remembers: an endpoint that is slow, has much work and reports a high load is picked less often than others, also
	// by a picker that was built later, by another policy of the same configuration and for another set of endpoints.
	Remembers bool
}

// Snapshot makes a snapshot of n endpoints that are usable and have no calls.
func Snapshot(n int) *upstream.Snapshot {
	s := &upstream.Snapshot{Generation: 1, Endpoints: make([]upstream.Endpoint, n)}
	for i := range s.Endpoints {
		s.Endpoints[i] = upstream.Endpoint{
			Index: i, Network: "tcp", Address: fmt.Sprintf("127.0.0.1:%d", 10_000+i), Weight: 1, State: new(upstream.State),
		}
	}
	return s
}

// Run runs all tests on policies that the function makes. It makes a new one for each test.
func Run(t *testing.T, newPolicy func() selection.Policy, traits Traits) {
	s := suite{newPolicy, traits}
	t.Run("nothing to pick", s.testEmpty)
	t.Run("only open endpoints", s.testOnlyOpen)
	t.Run("exhaustion", s.testExhaustion)
	t.Run("comes back", s.testComesBack)
	t.Run("part of a snapshot", s.testPart)
	t.Run("services", s.testServices)
	t.Run("panic", s.testDisregard)
	t.Run("connected", s.testConnected)
	t.Run("no room", s.testNoRoom)
	t.Run("zero weights", s.testZeroWeights)
	t.Run("allocations", s.testAllocations)
	t.Run("parallel", s.testParallel)
	t.Run("learning in parallel", s.testLearningParallel)
	t.Run("learning about parts", s.testLearningPart)
	t.Run("learning allocations", s.testLearningAllocations)
	if traits.Even {
		t.Run("even", s.testEven)
		t.Run("begins anywhere", s.testBegin)
	}
	if traits.Weighted {
		t.Run("weighted", s.testWeighted)
	}
	if traits.Exact {
		t.Run("exact", s.testExact)
		t.Run("exact in parallel", s.testExactParallel)
	}
	if traits.Ordered {
		t.Run("ordered", s.testOrdered)
	}
	if traits.Least {
		t.Run("least", s.testLeast)
	}
	if traits.Remembers {
		t.Run("remembers", s.testRemembers)
	}
}

type suite struct {
	newPolicy func() selection.Policy
	traits    Traits
}

// pick returns the index of what is picked.
func pick(p selection.Picker, in selection.PickInfo) (index int, ok bool) {
	picked, ok := p.Pick(in)
	return picked.Index, ok
}

func (s suite) testEmpty(t *testing.T) {
	for range 3 {
		if i, ok := pick(s.newPolicy().Build(Snapshot(0)), selection.PickInfo{}); ok {
			t.Fatalf("picked %d of no endpoints", i)
		}
	}
	snap := Snapshot(3)
	p := s.newPolicy().Build(snap)
	for i := range snap.Endpoints {
		snap.Endpoints[i].State.SetUsable(false)
	}
	for range 10 {
		if i, ok := pick(p, selection.PickInfo{}); ok {
			t.Fatalf("picked %d, which is not usable", i)
		}
	}
	for i := range snap.Endpoints {
		snap.Endpoints[i].State.SetUsable(true)
	}
	for range 10 {
		if i, ok := pick(p, selection.PickInfo{Tried: []int{2, 0, 1}}); ok {
			t.Fatalf("picked %d, which has been tried", i)
		}
	}
}

// testOnlyOpen tries every combination of closed endpoints in small snapshots, and some in a large one.
func (s suite) testOnlyOpen(t *testing.T) {
	check := func(snap *upstream.Snapshot, p selection.Picker, tried []int) {
		t.Helper()
		open := openOf(snap, tried)
		for range 8 {
			i, ok := pick(p, selection.PickInfo{Tried: tried})
			if ok != (len(open) > 0) || ok && !slices.Contains(open, i) {
				t.Fatalf("%d endpoints, open %v, tried %v: picked %d, %v", len(snap.Endpoints), open, tried, i, ok)
			}
		}
	}
	for n := 1; n <= 4; n++ {
		snap := Snapshot(n)
		p := s.newPolicy().Build(snap)
		for unusable := range 1 << n {
			for triedSet := range 1 << n {
				var tried []int
				for i := range n {
					snap.Endpoints[i].State.SetUsable(unusable>>i&1 == 0)
					if triedSet>>i&1 == 1 {
						tried = append(tried, i)
					}
				}
				check(snap, p, tried)
			}
		}
	}
	const n = 300
	snap := Snapshot(n)
	p := s.newPolicy().Build(snap)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		share := rng.Float64()
		for i := range n {
			snap.Endpoints[i].State.SetUsable(rng.Float64() < share)
		}
		check(snap, p, rng.Perm(n)[:rng.IntN(5)])
	}
	// A single one that is open.
	for i := range n {
		snap.Endpoints[i].State.SetUsable(i == n/3)
	}
	check(snap, p, nil)
	check(snap, p, []int{n / 3})
}

func openOf(snap *upstream.Snapshot, tried []int) []int {
	var open []int
	for i := range snap.Endpoints {
		if snap.Endpoints[i].State.Usable() && !slices.Contains(tried, i) {
			open = append(open, i)
		}
	}
	return open
}

// testExhaustion: a call that is tried again and again comes to each endpoint once, and then there is none.
func (s suite) testExhaustion(t *testing.T) {
	for _, n := range []int{1, 2, 5, 40} {
		p := s.newPolicy().Build(Snapshot(n))
		for range 20 {
			var tried []int
			for {
				i, ok := pick(p, selection.PickInfo{Tried: tried})
				if !ok {
					break
				}
				tried = append(tried, i)
				if len(tried) > n {
					t.Fatalf("%d endpoints, tried %v", n, tried)
				}
			}
			slices.Sort(tried)
			if len(tried) != n || len(slices.Compact(tried)) != n {
				t.Fatalf("%d endpoints, tried %v", n, tried)
			}
		}
	}
}

// testComesBack: no new picker is needed to see that an endpoint is usable again.
func (s suite) testComesBack(t *testing.T) {
	snap := Snapshot(3)
	p := s.newPolicy().Build(snap)
	for only := range 3 {
		for i := range snap.Endpoints {
			snap.Endpoints[i].State.SetUsable(i == only)
		}
		for range 5 {
			if i, ok := pick(p, selection.PickInfo{}); !ok || i != only {
				t.Fatalf("picked %d, %v; only %d is usable", i, ok, only)
			}
		}
	}
}

// testPart: in a part of a snapshot, endpoints are known by their indexes and not by their places.
func (s suite) testPart(t *testing.T) {
	for _, indexes := range [][]int{{7}, {3, 4, 5}, {9, 2, 4}, {1, 0}, {0, 2}} {
		snap := Snapshot(len(indexes))
		for place, index := range indexes {
			snap.Endpoints[place].Index = index
		}
		p := s.newPolicy().Build(snap)
		for triedSet := range 1 << len(indexes) {
			// Indexes of endpoints that belong to others are among those that were tried.
			tried := []int{100, 101}
			var open []int
			for place, index := range indexes {
				if triedSet>>place&1 == 1 {
					tried = append(tried, index)
				} else {
					open = append(open, index)
				}
			}
			for range 20 {
				i, ok := pick(p, selection.PickInfo{Tried: tried})
				if ok != (len(open) > 0) || ok && !slices.Contains(open, i) {
					t.Fatalf("indexes %v, tried %v: picked %d, %v", indexes, tried, i, ok)
				}
			}
		}
	}
}

// noMetadata is a call's without any.
type noMetadata struct{}

func (noMetadata) Values(string) []string { return nil }

// testServices: calls of a service that is not serving on an endpoint go elsewhere, others may go there.
func (s suite) testServices(t *testing.T) {
	snap := Snapshot(2)
	snap.Endpoints[0].State.SetNotServing("a")
	p := s.newPolicy().Build(snap)
	in := selection.PickInfo{Call: &call.Call{Service: "a", Method: "M", Metadata: noMetadata{}}}
	for range 20 {
		if i, ok := pick(p, in); !ok || i != 1 {
			t.Fatalf("picked %d, %v for a service that only 1 serves", i, ok)
		}
	}
	in.Tried = []int{1}
	if i, ok := pick(p, in); ok {
		t.Fatalf("picked %d, though the only one that serves was tried", i)
	}
	in.Call.Service = "b"
	if i, ok := pick(p, in); !ok || i != 0 {
		t.Fatalf("picked %d, %v for a service that 0 serves as well", i, ok)
	}
}

// testDisregard: reasons that are to be disregarded do not count, others do.
func (s suite) testDisregard(t *testing.T) {
	snap := Snapshot(3)
	snap.Endpoints[0].State.Set(upstream.Unhealthy)
	snap.Endpoints[1].State.Set(upstream.Unhealthy)
	snap.Endpoints[2].State.Set(upstream.Draining)
	p := s.newPolicy().Build(snap)
	in := selection.PickInfo{Disregard: upstream.Unhealthy}
	for range 20 {
		if i, ok := pick(p, in); !ok || i == 2 {
			t.Fatalf("picked %d, %v", i, ok)
		}
	}
	in.Tried = []int{0, 1}
	if i, ok := pick(p, in); ok {
		t.Fatalf("picked %d, which drains", i)
	}
}

// testConnected: if asked for, only endpoints that have a connection are picked.
func (s suite) testConnected(t *testing.T) {
	snap := Snapshot(3)
	p := s.newPolicy().Build(snap)
	in := selection.PickInfo{Connected: true}
	if i, ok := pick(p, in); ok {
		t.Fatalf("picked %d, which has no connection", i)
	}
	if _, ok := p.Pick(selection.PickInfo{}); !ok {
		t.Fatal("picked none, though nobody asked for a connection")
	}
	snap.Endpoints[1].State.SetConnected(time.Now())
	for range 20 {
		if i, ok := pick(p, in); !ok || i != 1 {
			t.Fatalf("picked %d, %v, want the one that has a connection", i, ok)
		}
	}
}

// testNoRoom: an endpoint whose streams are all taken is picked only if the call is to wait, and only if it serves the call's
// service.
func (s suite) testNoRoom(t *testing.T) {
	snap := Snapshot(2)
	p := s.newPolicy().Build(snap)
	snap.Endpoints[0].State.SetRoom(false)
	for range 20 {
		if i, ok := pick(p, selection.PickInfo{}); !ok || i != 1 {
			t.Fatalf("picked %d, %v, want the one that has room", i, ok)
		}
	}
	snap.Endpoints[1].State.SetRoom(false)
	if i, ok := pick(p, selection.PickInfo{}); ok {
		t.Fatalf("picked %d, which has no room", i)
	}
	snap.Endpoints[0].State.SetNotServing("a")
	in := selection.PickInfo{Call: &call.Call{Service: "a"}, Disregard: upstream.NoRoom}
	for range 20 {
		if i, ok := pick(p, in); !ok || i != 1 {
			t.Fatalf("picked %d, %v, want the one that serves the service", i, ok)
		}
	}
}

// testZeroWeights: a weight of 0 counts as 1.
func (s suite) testZeroWeights(t *testing.T) {
	snap := Snapshot(3)
	for i := range snap.Endpoints {
		snap.Endpoints[i].Weight = 0
	}
	p := s.newPolicy().Build(snap)
	counts := make([]int64, 3)
	for range 3000 {
		i, ok := pick(p, selection.PickInfo{})
		if !ok {
			t.Fatal("nothing picked")
		}
		counts[i]++
	}
	if s.traits.Even {
		evenly(t, counts, nil)
	}
}

func (s suite) testAllocations(t *testing.T) {
	for _, n := range []int{1, 3, 1000} {
		snap := Snapshot(n)
		p := s.newPolicy().Build(snap)
		tried := []int{0, n / 2}
		for name, f := range map[string]func(){
			"first pick": func() { p.Pick(selection.PickInfo{}) },
			"retry":      func() { p.Pick(selection.PickInfo{Tried: tried}) },
		} {
			if got := testing.AllocsPerRun(200, f); got != 0 {
				t.Errorf("%d endpoints, %s: %v allocations", n, name, got)
			}
		}
		for i := range n - 1 {
			snap.Endpoints[i].State.SetUsable(false)
		}
		if got := testing.AllocsPerRun(200, func() { p.Pick(selection.PickInfo{}) }); got != 0 {
			t.Errorf("one of %d endpoints usable: %v allocations", n, got)
		}
	}
}

// workers is how many goroutines pick at the same time: more than there are processors.
func workers() int { return max(8, 2*runtime.GOMAXPROCS(0)) }

// testParallel picks while calls begin and end and endpoints come and go. The race detector sees the rest.
func (s suite) testParallel(t *testing.T) {
	const n, picks = 5, 4000
	snap := Snapshot(n)
	snap.Endpoints[1].State.SetUsable(false) // Stays so.
	p := s.newPolicy().Build(snap)
	var picking, flipping sync.WaitGroup
	var failed atomic.Bool
	stop := make(chan struct{})
	flipping.Go(func() {
		for up := false; ; up = !up {
			select {
			case <-stop:
				return
			default:
				snap.Endpoints[3].State.SetUsable(up)
				runtime.Gosched()
			}
		}
	})
	for range workers() {
		picking.Go(func() {
			tried := make([]int, 0, n)
			for k := range picks {
				tried = append(tried[:0], []int{0, 2}[:k%3]...)
				i, ok := pick(p, selection.PickInfo{Tried: tried})
				if !ok || i < 0 || i >= n || i == 1 || slices.Contains(tried, i) {
					if !failed.Swap(true) {
						t.Errorf("tried %v: picked %d, %v", tried, i, ok)
					}
					return
				}
				snap.Endpoints[i].State.Begin()
				runtime.Gosched()
				snap.Endpoints[i].State.End()
			}
		})
	}
	picking.Wait()
	close(stop)
	flipping.Wait()
}

// testEven: equal shares by the chi-square test, with and without closed endpoints.
func (s suite) testEven(t *testing.T) {
	for _, tt := range []struct {
		name     string
		n        int
		unusable []int
		tried    []int
	}{
		{"two", 2, nil, nil},
		{"three", 3, nil, nil},
		{"ten", 10, nil, nil},
		{"one unusable", 5, []int{2}, nil},
		{"neighbours unusable", 8, []int{2, 3, 4}, nil},
		{"one tried", 5, nil, []int{0}},
		{"unusable and tried", 8, []int{1, 2}, []int{3, 7}},
		{"few open", 100, between(3, 98), []int{0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			snap := Snapshot(tt.n)
			for _, i := range tt.unusable {
				snap.Endpoints[i].State.SetUsable(false)
			}
			p := s.newPolicy().Build(snap)
			open := openOf(snap, tt.tried)
			counts := make([]int64, tt.n)
			for range 6000 * len(open) {
				i, ok := pick(p, selection.PickInfo{Tried: tt.tried})
				if !ok {
					t.Fatal("nothing picked")
				}
				counts[i]++
			}
			evenly(t, counts, open)
		})
	}
}

// testWeighted: shares follow the weights by the chi-square test, with and without closed endpoints.
func (s suite) testWeighted(t *testing.T) {
	for _, tt := range []struct {
		name     string
		weights  []uint32
		unusable []int
		tried    []int
	}{
		{"two", []uint32{1, 3}, nil, nil},
		{"three", []uint32{5, 1, 1}, nil, nil},
		{"far apart", []uint32{1, 1000}, nil, nil},
		{"largest", []uint32{65_535, 65_535, 20_000}, nil, nil},
		{"zero counts as one", []uint32{0, 1, 2}, nil, nil},
		{"one unusable", []uint32{1, 2, 3, 4}, []int{2}, nil},
		{"one tried", []uint32{1, 2, 3, 4}, nil, []int{3}},
		{"unusable and tried", []uint32{10, 20, 30, 40, 50}, []int{1}, []int{4}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			snap := Snapshot(len(tt.weights))
			for i, w := range tt.weights {
				snap.Endpoints[i].Weight = w
			}
			for _, i := range tt.unusable {
				snap.Endpoints[i].State.SetUsable(false)
			}
			open := openOf(snap, tt.tried)
			counts := make([]int64, len(tt.weights))
			policy := s.newPolicy()
			// Several pickers: one may begin anywhere in its cycle.
			for range 20 {
				p := policy.Build(snap)
				for range 2000 * len(open) {
					i, ok := pick(p, selection.PickInfo{Tried: tt.tried})
					if !ok {
						t.Fatal("nothing picked")
					}
					counts[i]++
				}
			}
			weights := make([]float64, len(tt.weights))
			for _, i := range open {
				weights[i] = float64(max(tt.weights[i], 1))
			}
			byWeight(t, counts, weights)
		})
	}
}

func between(from, to int) []int {
	var all []int
	for i := from; i < to; i++ {
		all = append(all, i)
	}
	return all
}

// testBegin: the first pick of a new picker is any endpoint, so that pickers built often, or by many proxies at once, do
// not favour one.
func (s suite) testBegin(t *testing.T) {
	const n = 5
	counts := make([]int64, n)
	policy, snap := s.newPolicy(), Snapshot(n)
	for range 6000 * n {
		i, ok := pick(policy.Build(snap), selection.PickInfo{})
		if !ok {
			t.Fatal("nothing picked")
		}
		counts[i]++
	}
	evenly(t, counts, nil)
}

// exactCases are snapshots in which n endpoints have exactly equal shares.
func exactCases(f func(name string, snap *upstream.Snapshot, open []int)) {
	for name, unusable := range map[string][]int{"all": nil, "one closed": {1}, "run closed": {0, 1, 5}} {
		snap := Snapshot(6)
		for _, i := range unusable {
			snap.Endpoints[i].State.SetUsable(false)
		}
		f(name, snap, openOf(snap, nil))
	}
}

func (s suite) testExact(t *testing.T) {
	exactCases(func(name string, snap *upstream.Snapshot, open []int) {
		p := s.newPolicy().Build(snap)
		for round := range 100 { // After each round, and not only in the end.
			var seen []int
			for range open {
				i, ok := pick(p, selection.PickInfo{})
				if !ok {
					t.Fatalf("%s: nothing picked", name)
				}
				seen = append(seen, i)
			}
			if slices.Sort(seen); !slices.Equal(seen, open) {
				t.Fatalf("%s: round %d: picked %v, open are %v", name, round, seen, open)
			}
		}
	})
}

func (s suite) testExactParallel(t *testing.T) {
	exactCases(func(name string, snap *upstream.Snapshot, open []int) {
		p := s.newPolicy().Build(snap)
		counts := make([]atomic.Int64, len(snap.Endpoints))
		var wg sync.WaitGroup
		share := 2000
		for range workers() {
			wg.Go(func() {
				for range share * len(open) {
					if i, ok := pick(p, selection.PickInfo{}); ok {
						counts[i].Add(1)
					}
				}
			})
		}
		wg.Wait()
		for _, i := range open {
			if got, want := counts[i].Load(), int64(share*workers()); got != want {
				t.Errorf("%s: endpoint %d was picked %d times, not %d", name, i, got, want)
			}
		}
	})
}

func (s suite) testOrdered(t *testing.T) {
	snap := Snapshot(6)
	p := s.newPolicy().Build(snap)
	rng := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		for i := range snap.Endpoints {
			snap.Endpoints[i].State.SetUsable(rng.IntN(3) > 0)
		}
		tried := rng.Perm(6)[:rng.IntN(4)]
		open := openOf(snap, tried)
		i, ok := pick(p, selection.PickInfo{Tried: tried})
		if ok != (len(open) > 0) || ok && i != open[0] {
			t.Fatalf("open %v: picked %d, %v", open, i, ok)
		}
	}
}

func (s suite) testLeast(t *testing.T) {
	const n, busy = 4, 2
	snap := Snapshot(n)
	for range 10 {
		snap.Endpoints[busy].State.Begin()
	}
	p := s.newPolicy().Build(snap)
	counts := make([]int64, n)
	for range 10_000 * n {
		i, ok := pick(p, selection.PickInfo{})
		if !ok {
			t.Fatal("nothing picked")
		}
		counts[i]++
	}
	for i, c := range counts {
		if i != busy && c < 2*counts[busy] {
			t.Errorf("the busy endpoint %d was picked %d times, endpoint %d %d times", busy, counts[busy], i, c)
		}
	}
	others := between(0, n)
	evenly(t, counts, slices.Delete(others, busy, busy+1))
}
