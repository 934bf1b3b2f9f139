package selection

import (
	"slices"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func subsetOf(size, index int) *DeterministicSubset {
	return &DeterministicSubset{Size: size, index: index, seed: 7, nested: nested{new(RoundRobin)}}
}

// picked are the endpoints that calls go to, sorted.
func picked(p Picker, in PickInfo) []int {
	var list []int
	for range 1000 {
		i, ok := pick(p, in)
		if !ok {
			break
		}
		if at, found := slices.BinarySearch(list, i); !found {
			list = slices.Insert(list, at, i)
		}
	}
	return list
}

func sorted(list []int) []int { return slices.Sorted(slices.Values(list)) }

// A policy says that it uses exactly those endpoints that it picks.
func TestUses(t *testing.T) {
	for name, p := range map[string]*DeterministicSubset{"by identity": subsetOf(3, -1), "by index": subsetOf(3, 1)} {
		t.Run(name, func(t *testing.T) {
			s := parted(12, nil)
			all := WithPriorities(p).(Selective)
			chosen := all.Uses(s)
			if len(chosen) < 3 || len(chosen) == 12 {
				t.Fatalf("%d of 12 are used", len(chosen))
			}
			if got := picked(all.Build(s), PickInfo{}); !slices.Equal(got, sorted(chosen)) {
				t.Errorf("picked %v, uses %v", got, chosen)
			}
			if !p.WatchesHealth() {
				t.Error("it takes no notice when the chosen become unusable")
			}
			state := func(index int) *upstream.State { return s.Endpoints[11-index].State }
			for _, i := range chosen[1:] {
				state(i).SetUsable(false)
			}
			state(chosen[0]).Set(upstream.Connecting)
			if got := all.Uses(s); !slices.Equal(got, chosen) {
				t.Errorf("uses %v while one of %v may be good", got, chosen)
			}
			picker := all.Build(s)
			if got := picked(picker, PickInfo{}); got != nil {
				t.Errorf("picked %v while the first answer is waited for", got)
			}
			if got := picked(picker, PickInfo{Disregard: upstream.Unhealthy | upstream.Connecting}); !slices.Equal(got, sorted(chosen)) {
				t.Errorf("picked %v in a panic", got)
			}
			if got := picked(picker, PickInfo{Tried: chosen[:1]}); len(got) != 12-len(chosen) {
				t.Errorf("picked %v though nothing is left to wait for", got)
			}
			state(chosen[0]).Change(upstream.Unhealthy, upstream.Connecting, "")
			if got := all.Uses(s); got != nil {
				t.Errorf("uses %v though none of them is usable", got)
			}
			if got := picked(picker, PickInfo{}); len(got) != 12-len(chosen) {
				t.Errorf("picked %v, want all others", got)
			}
		})
	}
	few := subsetOf(3, -1)
	if few.Uses(parted(3, nil)) != nil || few.Build(parted(3, nil)) == nil || few.WatchesHealth() {
		t.Error("with no more endpoints than it may use, it does not use all")
	}
	if p := WithPriorities(new(Random)).(Selective); p.Uses(healthy(50, 50)) != nil {
		t.Error("a policy that uses all says it does not")
	}
}

// Each level has its subset; of a level with few endpoints all are used.
func TestUsesOfLevels(t *testing.T) {
	s := parted(14, func(e *upstream.Endpoint) { e.Priority = uint32(min(e.Index/6, 2)) }) // 6, 6 and 2
	used := WithPriorities(subsetOf(3, -1)).(Selective).Uses(s)
	var levels [3]int
	for _, i := range used {
		levels[min(i/6, 2)]++
	}
	if levels != [3]int{3, 3, 2} {
		t.Errorf("of the levels' endpoints %v are used", levels)
	}
}

// A subset of a subset.
func TestUsesOfNested(t *testing.T) {
	p := subsetOf(6, -1)
	p.child = subsetOf(2, -1)
	s := parted(12, nil)
	used := p.Uses(s)
	if len(used) != 2 || !slices.Equal(picked(p.Build(s), PickInfo{}), sorted(used)) {
		t.Errorf("uses %v, picks %v", used, picked(p.Build(s), PickInfo{}))
	}
}
