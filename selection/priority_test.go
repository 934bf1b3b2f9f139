package selection

import (
	"fmt"
	"slices"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// healthy makes one level of 100 endpoints per number, so many of which can be used.
func healthy(percent ...int) *upstream.Snapshot {
	return parted(100*len(percent), func(e *upstream.Endpoint) {
		e.Priority = uint32(e.Index / 100 * 10) // Numbers may have gaps.
		e.State.SetUsable(e.Index%100 < percent[e.Index/100])
	})
}

// The tables of Envoy's documentation, "Priority levels".
func TestPriorityLoad(t *testing.T) {
	tests := []struct{ healthy, load []int }{
		{[]int{100, 100}, []int{100, 0}},
		{[]int{72, 100}, []int{100, 0}},
		{[]int{71, 100}, []int{99, 1}},
		{[]int{50, 100}, []int{70, 30}},
		{[]int{25, 100}, []int{35, 65}},
		{[]int{0, 100}, []int{0, 100}},
		{[]int{72, 72}, []int{100, 0}},
		{[]int{71, 71}, []int{99, 1}},
		{[]int{50, 50}, []int{70, 30}},
		{[]int{25, 25}, []int{50, 50}},
		{[]int{25, 25, 100}, []int{35, 35, 30}},
		{[]int{25, 25, 10}, []int{43, 41, 16}}, // What rounding leaves over goes to the first.
		{[]int{0, 0, 5}, []int{0, 0, 100}},
		{[]int{0, 0}, []int{100, 0}},
	}
	for _, tt := range tests {
		picker := WithPriorities(new(Random)).Build(healthy(tt.healthy...))
		p, ok := picker.(*levels)
		if !ok {
			t.Fatalf("%T", picker)
		}
		var load []int
		before := uint64(0)
		for _, u := range p.upTo {
			load = append(load, int((u-before)*100/whole))
			before = u
		}
		if !slices.Equal(load, tt.load) {
			t.Errorf("healthy %v: load %v, want %v", tt.healthy, load, tt.load)
		}
	}
}

// Envoy's rule: the levels' health, added up.
func TestCarriesAll(t *testing.T) {
	for _, tt := range []struct {
		healthy []int
		want    bool
	}{
		{[]int{100, 0}, true},
		{[]int{72, 0}, true},
		{[]int{71, 0}, false},
		{[]int{0, 100}, true},
		{[]int{50, 22}, true},
		{[]int{50, 20}, false},
		{[]int{25, 25, 25}, true},
		{[]int{0, 0}, false},
		{[]int{100}, false}, // One level is judged by the threshold alone.
	} {
		s := healthy(tt.healthy...)
		for name, p := range map[string]Policy{
			"all": WithPriorities(new(Random)), "sticky": WithPriorities(&Sticky{nested: nested{new(Random)}}),
			"cookie": WithPriorities(&Cookie{stickyPolicy: stickyPolicy{nested{new(Random)}}}),
		} {
			if got := p.(Carrier).CarriesAll(s.Endpoints); got != tt.want {
				t.Errorf("%s: healthy %v: carries all %v", name, tt.healthy, got)
			}
		}
	}
	if (&Priority{OverprovisioningFactor: 1, nested: nested{new(Random)}}).CarriesAll(healthy(72, 0).Endpoints) {
		t.Error("the factor does not count")
	}
}

func TestPriorityShares(t *testing.T) {
	p := WithPriorities(new(Random)).Build(healthy(50, 100))
	const n = 50_000
	second := 0
	for range n {
		i, ok := pick(p, PickInfo{})
		if !ok {
			t.Fatal("nothing picked")
		}
		second += i / 100
	}
	// 30 percent; the standard deviation is 0.2.
	if share := float64(second) / n; share < 0.29 || share > 0.31 {
		t.Errorf("%v of the calls went to the second level", share)
	}
}

// A level whose endpoints have gone bad since the picker was built passes its calls on, in order.
func TestPriorityNothingOpen(t *testing.T) {
	s := parted(6, func(e *upstream.Endpoint) { e.Priority = uint32(e.Index / 2) })
	p := WithPriorities(new(First)).Build(s)
	var tried []int
	for _, want := range []int{1, 0, 3, 2, 5, 4} { // parted is in reverse order.
		i, ok := pick(p, PickInfo{Tried: tried})
		if !ok || i != want {
			t.Fatalf("tried %v: picked %d, %v, want %d", tried, i, ok, want)
		}
		tried = append(tried, i)
	}
	if i, ok := pick(p, PickInfo{Tried: tried}); ok {
		t.Errorf("picked %d", i)
	}
	for _, e := range s.Endpoints {
		e.State.SetUsable(e.Index == 4)
	}
	if i, ok := pick(p, PickInfo{}); !ok || i != 4 {
		t.Errorf("picked %d, %v", i, ok)
	}
}

// With a hash policy a key stays at its level, or a spilling level would spread each client's calls over two endpoints.
func TestPriorityOfKey(t *testing.T) {
	from, err := newSources([]HashKey{{Source: "header", Name: "k"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, child := range []Policy{
		&RingHash{Hashing: Hashing{hashing: hashing{from: from}}},
		&Maglev{Hashing: Hashing{hashing: hashing{from: from}}},
		&Rendezvous{Hashing{hashing: hashing{from: from}}},
	} {
		s := healthy(50, 100)
		p, again := WithPriorities(child).Build(s), WithPriorities(child).Build(s)
		second, used := 0, make(map[int]bool)
		const keys = 4000
		for k := range keys {
			in := PickInfo{Call: &call.Call{Metadata: metadata{"k": {fmt.Sprint(k)}}}}
			i, _ := pick(p, in)
			second += i / 100
			used[i] = true
			for range 3 {
				if j, _ := pick(again, in); j != i {
					t.Fatalf("%T: key %d: picked %d and %d", child, k, i, j)
				}
			}
		}
		if share := float64(second) / keys; share < 0.27 || share > 0.33 {
			t.Errorf("%T: %v of the keys are at the second level", child, share)
		}
		// The keys of a level are spread over all of it.
		if len(used) < 145 {
			t.Errorf("%T: only %d of 150 endpoints are used", child, len(used))
		}
	}
}

func BenchmarkPriority(b *testing.B) {
	for _, levels := range []int{1, 3} {
		b.Run(fmt.Sprintf("levels=%d/10000", levels), func(b *testing.B) {
			s := parted(10_000, func(e *upstream.Endpoint) {
				e.Priority = uint32(e.Index % levels)
				e.State.SetUsable(e.Index%2 == 0)
			})
			policy := WithPriorities(new(Random))
			p := policy.Build(s)
			b.Run("pick", func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					p.Pick(PickInfo{})
				}
			})
			b.Run("build", func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					policy.Build(s)
				}
			})
		})
	}
}
