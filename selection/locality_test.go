package selection

import (
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// place is the locality of so many endpoints, some of which cannot be used.
type group struct {
	where  upstream.Locality
	n, bad int
}

func located(groups ...group) *upstream.Snapshot {
	s := new(upstream.Snapshot)
	for g, group := range groups {
		for i := range group.n {
			e := upstream.Endpoint{
				Index: len(s.Endpoints), Address: fmt.Sprintf("10.0.%d.%d:1", g, i), Weight: 1, Locality: group.where, State: new(upstream.State),
			}
			e.State.SetUsable(i >= group.bad)
			s.Endpoints = append(s.Endpoints, e)
		}
	}
	return s
}

func TestLocalityShares(t *testing.T) {
	zone := func(name string) upstream.Locality { return upstream.Locality{Zone: name} }
	full := func(region, zone, sub string) upstream.Locality {
		return upstream.Locality{Region: region, Zone: zone, SubZone: sub}
	}
	tests := []struct {
		name   string
		policy Locality
		groups []group
		want   []float64 // percent of the calls for each group
	}{
		{"enough here", Locality{here: zone("a")}, []group{{zone("a"), 10, 0}, {zone("b"), 10, 0}, {zone("c"), 10, 0}}, []float64{100, 0, 0}},
		// Envoy's example: 20 percent of the calls come from here, 10 percent of the endpoints are here: half of the calls stay.
		{"half here", Locality{here: zone("a"), Share: 20, OverprovisioningFactor: 1}, []group{{zone("a"), 1, 0}, {zone("b"), 9, 0}}, []float64{50, 50}},
		{"with room to spare", Locality{here: zone("a"), Share: 20}, []group{{zone("a"), 1, 0}, {zone("b"), 9, 0}}, []float64{70, 30}},
		// A third of the calls come from each zone, and 1/21 of the endpoints are here: 1.4 × 3/21.
		{"few here", Locality{here: zone("a")}, []group{{zone("a"), 1, 0}, {zone("b"), 10, 0}, {zone("c"), 10, 0}}, []float64{20, 40, 40}},
		{"half of them bad", Locality{here: zone("a")}, []group{{zone("a"), 10, 5}, {zone("b"), 10, 0}, {zone("c"), 10, 0}}, []float64{84, 8, 8}},
		{"some of them bad", Locality{here: zone("a")}, []group{{zone("a"), 10, 2}, {zone("b"), 10, 0}, {zone("c"), 10, 0}}, []float64{100, 0, 0}},
		{"all of them bad", Locality{here: zone("a")}, []group{{zone("a"), 10, 10}, {zone("b"), 10, 0}, {zone("c"), 10, 0}}, []float64{0, 50, 50}},
		{"none here", Locality{here: zone("z")}, []group{{zone("a"), 10, 0}, {zone("b"), 30, 0}}, []float64{25, 75}},
		{"no localities known", Locality{here: zone("z")}, []group{{zone(""), 10, 0}}, []float64{100}},
		{"too few to be preferred", Locality{here: zone("a"), MinEndpoints: 3}, []group{{zone("a"), 2, 0}, {zone("b"), 8, 0}}, []float64{20, 80}},
		{"enough to be preferred", Locality{here: zone("a"), MinEndpoints: 2}, []group{{zone("a"), 2, 0}, {zone("b"), 2, 0}}, []float64{100, 0}},
		{
			"nearest first",
			Locality{here: full("eu", "eu-1", "r7"), Share: 25, OverprovisioningFactor: 1},
			// Up to here are 10, 15, 20 and 100 percent of the endpoints.
			[]group{{full("eu", "eu-1", "r7"), 10, 0}, {full("eu", "eu-1", "r8"), 5, 0}, {full("eu", "eu-2", "r7"), 5, 0}, {full("us", "eu-1", "r7"), 80, 0}},
			[]float64{40, 20, 20, 20},
		},
		{
			"sub-zone is not looked at",
			Locality{here: full("eu", "eu-1", "")},
			[]group{{full("eu", "eu-1", "r7"), 5, 0}, {full("eu", "eu-1", "r8"), 5, 0}, {full("eu", "eu-2", "r7"), 10, 0}},
			[]float64{50, 50, 0},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := located(tt.groups...)
			policy := &tt.policy
			policy.nested = nested{new(Random)}
			p := policy.Build(s)
			const n = 40_000
			counts := make([]float64, len(tt.groups))
			for range n {
				i, ok := pick(p, PickInfo{})
				if !ok {
					t.Fatal("nothing picked")
				}
				at := slices.IndexFunc(tt.groups, func(g group) bool { return g.where == s.Endpoints[i].Locality })
				counts[at] += 100.0 / n
			}
			for g, want := range tt.want {
				// Four standard deviations are one percent.
				if math.Abs(counts[g]-want) > 1 || want == 0 && counts[g] != 0 {
					t.Errorf("%+v got %.1f percent, want %v", tt.groups[g], counts[g], want)
				}
			}
		})
	}
}

// What is near is tried first, and what is far away before giving up.
func TestLocalityNothingOpen(t *testing.T) {
	here := upstream.Locality{Region: "eu", Zone: "eu-1"}
	s := located(group{upstream.Locality{Region: "us"}, 1, 0}, group{here, 1, 0}, group{upstream.Locality{Region: "eu", Zone: "eu-2"}, 1, 0})
	p := (&Locality{here: here, nested: nested{new(First)}}).Build(s)
	var tried []int
	for _, want := range []int{1, 2, 0} {
		i, ok := pick(p, PickInfo{Tried: tried})
		if !ok || i != want {
			t.Fatalf("tried %v: picked %d, %v, want %d", tried, i, ok, want)
		}
		tried = append(tried, i)
	}
	if i, ok := pick(p, PickInfo{Tried: tried}); ok {
		t.Errorf("picked %d", i)
	}
}
