package selection

import (
	"math"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// pick returns the index of what is picked.
func pick(p Picker, in PickInfo) (index int, ok bool) {
	picked, ok := p.Pick(in)
	return picked.Index, ok
}

// script makes randUint64 return, for each index, a number that draws it from n endpoints.
func script(t *testing.T, n int, indexes ...int) (left func() int) {
	t.Helper()
	old := randUint64
	t.Cleanup(func() { randUint64 = old })
	randUint64 = func() uint64 {
		if len(indexes) == 0 {
			t.Fatal("more random numbers are drawn than expected")
		}
		i := indexes[0]
		indexes = indexes[1:]
		return math.MaxUint64/uint64(n)*uint64(i) + math.MaxUint64/uint64(2*n) // The middle of its range.
	}
	return func() int { return len(indexes) }
}

func snapshot(active ...int) *upstream.Snapshot {
	s := new(upstream.Snapshot)
	for _, n := range active {
		state := new(upstream.State)
		for range n {
			state.Begin()
		}
		s.Endpoints = append(s.Endpoints, upstream.Endpoint{Index: len(s.Endpoints), State: state})
	}
	return s
}

// gRFC A48, "Picker Behavior": so many draws as choice_count says, but of different endpoints, the least loaded wins, and the
// first drawn if there are several.
func TestLeastRequestDraws(t *testing.T) {
	const n = 12 // more than all of which are looked at
	type draw struct{ of, place int }
	tests := []struct {
		name    string
		count   int
		draws   []draw
		tried   []int
		active  [n]int
		want    int
		comment string
	}{
		{"second is less", 0, []draw{{n, 0}, {n - 1, 1}}, nil, [n]int{3, 0, 1}, 2, "not 1, which was not drawn"},
		{"first is less", 0, []draw{{n, 2}, {n - 1, 0}}, nil, [n]int{3, 0, 1}, 2, ""},
		{"tie", 0, []draw{{n, 1}, {n - 1, 1}}, nil, [n]int{0, 5, 5}, 1, "the one drawn first"},
		{"tie the other way", 0, []draw{{n, 2}, {n - 1, 1}}, nil, [n]int{0, 5, 5}, 2, ""},
		{"never the same twice", 0, []draw{{n, 11}, {n - 1, 10}}, nil, [n]int{10: 3, 11: 9}, 10, ""},
		{"three", 3, []draw{{n, 1}, {n - 1, 1}, {n - 2, 0}}, nil, [n]int{1, 3, 2}, 0, ""},
		{
			"at most ten", 1000,
			[]draw{{n, 11}, {n - 1, 0}, {n - 2, 8}, {n - 3, 0}, {n - 4, 0}, {n - 5, 0}, {n - 6, 0}, {n - 7, 0}, {n - 8, 0}, {n - 9, 0}},
			nil,
			[n]int{9, 8, 7, 6, 5, 4, 3, 1, 0, 8, 8, 8},
			7, "all but 8 and 10 were drawn",
		},
		{"tried is drawn again", 0, []draw{{n, 1}, {n, 0}, {n - 1, 0}, {n - 1, 1}}, []int{1}, [n]int{3, 0, 4}, 0, "draws of closed ones do not count"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := (&LeastRequest{ChoiceCount: tt.count}).Build(snapshot(tt.active[:]...))
			old := randUint64
			t.Cleanup(func() { randUint64 = old })
			left := tt.draws
			randUint64 = func() uint64 {
				if len(left) == 0 {
					t.Fatal("more random numbers are drawn than expected")
				}
				d := left[0]
				left = left[1:]
				return math.MaxUint64/uint64(d.of)*uint64(d.place) + math.MaxUint64/uint64(2*d.of) // The middle of its range.
			}
			if got, ok := pick(p, PickInfo{Tried: tt.tried}); !ok || got != tt.want || len(left) != 0 {
				t.Errorf("picked %d, %v, %d draws left; want %d %s", got, ok, len(left), tt.want, tt.comment)
			}
		})
	}
}

// Of few endpoints the one that hangs gets nothing as long as others have fewer calls, and of many only what there is no other
// choice for: it is never compared with itself.
func TestLeastRequestAvoidsHung(t *testing.T) {
	for _, n := range []int{2, 3, few, few + 1, 100} {
		for _, weight := range []uint32{1, 1000} {
			for _, choices := range []int{0, 2, 3, 10} {
				active := make([]int, n)
				for i := range active {
					active[i] = i % 3
				}
				active[1] = 3000
				s := snapshot(active...)
				s.Endpoints[1].Weight = weight // drawn nearly always
				p := (&LeastRequest{ChoiceCount: choices}).Build(s)
				for range 1000 {
					if i, ok := pick(p, PickInfo{}); !ok || i == 1 {
						t.Fatalf("%d endpoints, %d choices, weight %d: picked %d, %v", n, choices, weight, i, ok)
					}
				}
			}
		}
	}
}

// All others are drawn as second with the chance that their weights give them, and none that is closed.
func TestDrawTwo(t *testing.T) {
	for _, weights := range [][]uint32{{1, 1, 1, 1, 1}, {5, 1, 3, 1, 2}, {1, 1, 60_000, 1, 2}} {
		s := snapshot(make([]int, len(weights))...)
		for i, w := range weights {
			s.Endpoints[i].Weight = w
		}
		s.Endpoints[3].State.SetUsable(false)
		c := newWeighted(s)
		const rounds = 20_000
		var firsts [5]int
		var seconds [5][5]int
		for range rounds {
			i, j, ok := c.drawTwo(&PickInfo{})
			if !ok || i == j || i == 3 || j == 3 {
				t.Fatalf("drew %d and %d, %v", i, j, ok)
			}
			firsts[i]++
			seconds[i][j]++
		}
		for i := range weights {
			rest := 0.0
			for j, w := range weights {
				if j != i && j != 3 {
					rest += float64(w)
				}
			}
			for j, w := range weights {
				if i == j || i == 3 || j == 3 {
					continue
				}
				n, want := float64(firsts[i]), float64(w)/rest
				// Seven standard deviations: less than one run in 10^11.
				if got := float64(seconds[i][j]); math.Abs(got-n*want) > 7*math.Sqrt(n*want*(1-want))+1 {
					t.Errorf("weights %v: after %d came %d in %v of %v draws, want %.3f of them", weights, i, j, got, n, want)
				}
			}
		}
	}
	one := snapshot(0)
	c := newWeighted(one)
	if i, j, ok := c.drawTwo(&PickInfo{}); !ok || i != 0 || j != 0 {
		t.Errorf("of one endpoint: %d, %d, %v", i, j, ok)
	}
}

// Round robin begins at a random endpoint, goes on in order, and gives nobody a closed endpoint's turn besides its own.
func TestRoundRobinSequence(t *testing.T) {
	s := snapshot(0, 0, 0, 0)
	script(t, 4, 2)
	p := (*RoundRobin)(nil).Build(s)
	pick := func(tried ...int) int {
		t.Helper()
		i, ok := pick(p, PickInfo{Tried: tried})
		if !ok {
			t.Fatal("nothing picked")
		}
		return i
	}
	for step, want := range []int{2, 3, 0, 1, 2} {
		if got := pick(); got != want {
			t.Fatalf("step %d: picked %d, want %d", step, got, want)
		}
	}
	s.Endpoints[3].State.SetUsable(false)
	s.Endpoints[0].State.SetUsable(false)
	for step, want := range []int{1, 2, 1, 2} {
		if got := pick(); got != want {
			t.Fatalf("3 and 0 closed, step %d: picked %d, want %d", step, got, want)
		}
	}
	s.Endpoints[3].State.SetUsable(true)
	s.Endpoints[0].State.SetUsable(true)
	// It is 3's turn; a call that was tried there goes on to 0 and takes 0's turn with it.
	if got := pick(3); got != 0 {
		t.Errorf("picked %d, want 0", got)
	}
	if got := pick(); got != 1 {
		t.Errorf("picked %d, want 1", got)
	}
}

// A call that finds no open endpoint takes nobody's turn: it will ask again, for less.
func TestRoundRobinInVain(t *testing.T) {
	for _, weights := range [][]uint32{{1, 1, 1}, {5, 1, 2}} {
		s := snapshot(0, 0, 0)
		for i, w := range weights {
			s.Endpoints[i].Weight = w
		}
		p, q := newRoundRobin(newWeighted(s)), newRoundRobin(newWeighted(s))
		p.next.Store(q.next.Load())
		for step := range 30 {
			if i, ok := pick(p, PickInfo{Tried: []int{0, 1, 2}}); ok {
				t.Fatalf("picked %d, which was tried", i)
			}
			got, _ := pick(p, PickInfo{})
			want, _ := pick(q, PickInfo{})
			if got != want {
				t.Fatalf("weights %v, step %d: picked %d, want %d", weights, step, got, want)
			}
		}
	}
}

func TestLeastConn(t *testing.T) {
	p := new(LeastConn).Build(snapshot(3, 1, 2))
	for range 20 {
		for want, tried := range map[int][]int{1: nil, 2: {1}, 0: {2, 1}} {
			if got, ok := pick(p, PickInfo{Tried: tried}); !ok || got != want {
				t.Fatalf("tried %v: picked %d, %v, want %d", tried, got, ok, want)
			}
		}
	}
}

// With weights, calls in flight are kept in the proportion of the weights, raised to 1/bias.
func TestLeastRequestBias(t *testing.T) {
	one, two, half, none := 1.0, 2.0, 0.5, 0.0
	for _, tt := range []struct {
		name string
		p    *LeastRequest
		want []float64 // calls in flight of endpoints with weights 1 and 4, as parts
	}{
		{"default", &LeastRequest{}, []float64{0.2, 0.8}},
		{"bias 1", &LeastRequest{ActiveRequestBias: &one}, []float64{0.2, 0.8}},
		{"bias 2", &LeastRequest{ActiveRequestBias: &two}, []float64{1. / 3, 2. / 3}},
		{"bias 1/2", &LeastRequest{ActiveRequestBias: &half}, []float64{1. / 17, 16. / 17}},
		{"bias 0: by weight alone", &LeastRequest{ActiveRequestBias: &none}, []float64{0.2, 0.8}},
		{"full scan", &LeastRequest{FullScan: true}, []float64{0.2, 0.8}},
		{"full scan, bias 2", &LeastRequest{FullScan: true, ActiveRequestBias: &two}, []float64{1. / 3, 2. / 3}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const calls = 20_000
			s := snapshot(0, 0)
			s.Endpoints[0].Weight, s.Endpoints[1].Weight = 1, 4
			p := tt.p.Build(s)
			for range calls {
				i, ok := pick(p, PickInfo{})
				if !ok {
					t.Fatal("nothing picked")
				}
				s.Endpoints[i].State.Begin()
			}
			for i, want := range tt.want {
				if got := float64(s.Endpoints[i].State.Active()) / calls; math.Abs(got-want) > 0.02 {
					t.Errorf("endpoint %d has %.3f of the calls, want %.3f", i, got, want)
				}
			}
		})
	}
}

// weighted_round_robin goes by an endpoint's place in the configuration, also in a part of it.
func TestWeightedRoundRobinWeights(t *testing.T) {
	s := snapshot(0, 0, 0, 0)
	s.Endpoints[3].Weight = 50 // a source's
	p := &WeightedRoundRobin{Weights: []int{2, 0, 4}}
	counts := func(s *upstream.Snapshot, n int) [4]int {
		picker := p.Build(s)
		var c [4]int
		for range n {
			i, ok := pick(picker, PickInfo{})
			if !ok {
				t.Fatal("nothing picked")
			}
			c[i]++
		}
		return c
	}
	if got, want := counts(s, 70), [4]int{20, 0, 40, 10}; got != want {
		t.Errorf("picked %v, want %v", got, want)
	}
	part := &upstream.Snapshot{Endpoints: s.Endpoints[1:3]}
	if got, want := counts(part, 10), [4]int{0, 0, 10, 0}; got != want {
		t.Errorf("picked %v of a part, want %v", got, want)
	}
	// Weight 0 means never.
	for _, i := range []int{0, 2, 3} {
		s.Endpoints[i].State.SetUsable(false)
	}
	if i, ok := pick(p.Build(s), PickInfo{}); ok {
		t.Errorf("picked %d, whose weight is 0", i)
	}
}

// What is picked when all turns of a call were closed endpoints' still follows the weights.
func TestWeightedRoundRobinFewOpen(t *testing.T) {
	active := make([]int, 400)
	s := snapshot(active...)
	for i := range s.Endpoints {
		s.Endpoints[i].Weight = 10
		s.Endpoints[i].State.SetUsable(i == 7 || i == 8)
	}
	s.Endpoints[8].Weight = 30
	p := new(RoundRobin).Build(s)
	const picks = 20_000
	n := 0
	for range picks {
		i, ok := pick(p, PickInfo{})
		if !ok || i != 7 && i != 8 {
			t.Fatalf("picked %d, %v", i, ok)
		}
		if i == 8 {
			n++
		}
	}
	if got := float64(n) / picks; math.Abs(got-0.75) > 0.02 {
		t.Errorf("the endpoint with three quarters of the weight got %.3f of the calls", got)
	}
}
