package selection

import (
	"bytes"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func newSubset(t testing.TB, p *Subset) *Subset {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	p.PolicyRaw = []byte(`{"policy":"random"}`)
	if err := p.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	return p
}

// staged has endpoints of the versions 1 and 2 in the stages prod and test, two each, and one that says nothing.
func staged() *upstream.Snapshot {
	return parted(9, func(e *upstream.Endpoint) {
		if e.Index < 8 {
			e.Metadata = map[string]string{"version": fmt.Sprint(e.Index%2 + 1), "stage": []string{"prod", "test"}[e.Index/2%2]}
		}
	})
}

func TestSubset(t *testing.T) {
	version := SubsetMatch{"version", "{http.request.header.X-Version}"}
	stage := SubsetMatch{"stage", "{stage}"}
	prod := SubsetMatch{"stage", "prod"}
	all := []int{0, 1, 2, 3, 4, 5, 6, 7, 8}
	tests := []struct {
		name           string
		policy         Subset
		version, stage string
		want           []int
	}{
		{"one key", Subset{Match: []SubsetMatch{version}}, "2", "", []int{1, 3, 5, 7}},
		{"two keys", Subset{Match: []SubsetMatch{version, stage}}, "2", "test", []int{3, 7}},
		{"fixed value", Subset{Match: []SubsetMatch{version, prod}}, "1", "", []int{0, 4}},
		{"unknown, none", Subset{Match: []SubsetMatch{version}}, "3", "", nil},
		{"missing, none", Subset{Match: []SubsetMatch{version}, Fallback: "none"}, "", "", nil},
		{"one missing, none", Subset{Match: []SubsetMatch{version, stage}}, "2", "", nil},
		{"values run together", Subset{Match: []SubsetMatch{version, stage}}, "2t", "est", nil},
		{"unknown, any", Subset{Match: []SubsetMatch{version}, Fallback: "any"}, "3", "", all},
		{"missing, any", Subset{Match: []SubsetMatch{version}, Fallback: "any"}, "", "", all},
		{"known, any", Subset{Match: []SubsetMatch{version}, Fallback: "any"}, "1", "", []int{0, 2, 4, 6}},
		{"unknown, default", Subset{Match: []SubsetMatch{version, stage}, Fallback: "default", Default: map[string]string{"stage": "test", "version": "1"}}, "3", "prod", []int{2, 6}},
		{"default that is not there", Subset{Match: []SubsetMatch{version}, Fallback: "default", Default: map[string]string{"version": "9"}}, "3", "", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newSubset(t, &tt.policy).Build(staged())
			repl := caddy.NewReplacer()
			c := &call.Call{Metadata: metadata{}, Placeholders: repl}
			if tt.version != "" {
				c.Metadata = metadata{"x-version": {tt.version}}
			}
			repl.Set("stage", tt.stage)
			got := make(map[int]bool)
			for range 500 {
				if i, ok := pick(p, PickInfo{Call: c}); ok {
					got[i] = true
				}
			}
			if len(got) != len(tt.want) {
				t.Errorf("picked %v, want %v", got, tt.want)
			}
			for _, i := range tt.want {
				if !got[i] {
					t.Errorf("%d was not picked", i)
				}
			}
		})
	}
}

// Endpoints which are what the call asks for, but cannot be used, are not replaced by others.
func TestSubsetClosed(t *testing.T) {
	p := newSubset(t, &Subset{Match: []SubsetMatch{{"version", "{http.request.header.x-version}"}}, Fallback: "any"}).Build(staged())
	c := &call.Call{Metadata: metadata{"x-version": {"2"}}}
	if i, ok := pick(p, PickInfo{Call: c, Tried: []int{1, 3, 5, 7}}); ok {
		t.Errorf("picked %d", i)
	}
}

func TestSubsetLimit(t *testing.T) {
	var log bytes.Buffer
	policy := newSubset(t, &Subset{Match: []SubsetMatch{{"id", "{http.request.header.id}"}}, MaxSubsets: 3})
	policy.logger = slog.New(slog.NewTextHandler(&log, nil))
	p := policy.Build(parted(6, func(e *upstream.Endpoint) { e.Metadata = map[string]string{"id": fmt.Sprint(e.Index % 5)} }))
	for id := range 5 {
		_, ok := p.Pick(PickInfo{Call: &call.Call{Metadata: metadata{"id": {fmt.Sprint(id)}}}})
		if known := id == 0 || id >= 3; ok != known { // parted is in reverse order: 5, which is 0, then 4, 3.
			t.Errorf("%d: %v", id, ok)
		}
	}
	if !strings.Contains(log.String(), "max_subsets=3") || !strings.Contains(log.String(), "endpoints=2") {
		t.Errorf("logged %q", &log)
	}
}

func TestSubsetNoAllocation(t *testing.T) {
	p := newSubset(t, &Subset{Match: []SubsetMatch{{"version", "{http.request.header.x-version}"}, {"stage", "prod"}}}).Build(staged())
	c := &call.Call{Metadata: metadata{"x-version": {"2"}}}
	if n := testing.AllocsPerRun(100, func() {
		if _, ok := p.Pick(PickInfo{Call: c}); !ok {
			t.Error("nothing picked")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkSubset(b *testing.B) {
	policy := newSubset(b, &Subset{Match: []SubsetMatch{{"version", "{http.request.header.x-version}"}}})
	s := parted(10_000, func(e *upstream.Endpoint) { e.Metadata = map[string]string{"version": fmt.Sprint(e.Index % 100)} })
	p := policy.Build(s)
	c := &call.Call{Metadata: metadata{"x-version": {"42"}}}
	b.Run("pick/10000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p.Pick(PickInfo{Call: c})
		}
	})
	b.Run("build/10000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			policy.Build(s)
		}
	})
}

// chosen are the endpoints that the policy uses while all can be used.
func chosen(p *DeterministicSubset, s *upstream.Snapshot) map[string]bool {
	r := new(recorder)
	p.child = r
	p.Build(s)
	address := make(map[int]string)
	for _, e := range s.Endpoints {
		address[e.Index] = e.Address
	}
	set := make(map[string]bool)
	for _, i := range r.built[0] {
		set[address[i]] = true
	}
	return set
}

func fleet(n int) *upstream.Snapshot {
	return parted(n, func(e *upstream.Endpoint) { e.Address = fmt.Sprintf("10.0.%d.%d:50051", e.Index/250, e.Index%250) })
}

// byIdentity and byIndex are proxy i of a fleet.
func byIdentity(i, size int) *DeterministicSubset {
	return &DeterministicSubset{Size: size, index: -1, seed: xxhash.Sum64String(fmt.Sprint("proxy-", i))}
}

func byIndex(i, size int) *DeterministicSubset { return &DeterministicSubset{Size: size, index: i} }

// proxiesOf counts the proxies that each endpoint has, and the least and the most of them.
func proxiesOf(t *testing.T, s *upstream.Snapshot, proxies, size int, proxy func(i, size int) *DeterministicSubset) (counts map[string]int, least, most int) {
	t.Helper()
	counts = make(map[string]int)
	for i := range proxies {
		set := chosen(proxy(i, size), s)
		if len(set) != size {
			t.Fatalf("proxy %d uses %d of %d endpoints, not %d", i, len(set), len(s.Endpoints), size)
		}
		for a := range set {
			counts[a]++
		}
	}
	least = math.MaxInt
	for _, e := range s.Endpoints {
		least, most = min(least, counts[e.Address]), max(most, counts[e.Address])
	}
	return counts, least, most
}

// Without numbers, endpoints have as many proxies as chance has it: of 100 that take 20 of 200 endpoints 10, with a
// standard deviation of sqrt(100 × 0.1 × 0.9) = 3.
func TestDeterministicSubsetByIdentity(t *testing.T) {
	s := fleet(200)
	counts, least, most := proxiesOf(t, s, 100, 20, byIdentity)
	variance := 0.0
	for _, e := range s.Endpoints {
		variance += math.Pow(float64(counts[e.Address])-10, 2) / 200
	}
	deviation := math.Sqrt(variance)
	t.Logf("%d to %d proxies for each endpoint, standard deviation %.1f", least, most, deviation)
	if deviation < 2 || deviation > 4 || least < 1 || most > 24 {
		t.Error("this is not the evenness of chance")
	}
}

// With numbers, endpoints have nearly the same number of proxies, however many proxies and endpoints there are, and each
// proxy uses as many as it is to.
func TestDeterministicSubsetByIndex(t *testing.T) {
	if _, least, most := proxiesOf(t, fleet(200), 100, 20, byIndex); least != 9 || most != 11 {
		t.Errorf("100 proxies, 20 of 200 endpoints: %d to %d proxies for each; the documentation says 9 to 11", least, most)
	}
	far := 0.0
	for _, size := range []int{1, 2, 3, 20} {
		for _, n := range []int{size + 1, 2*size - 1, 2 * size, 2*size + 1, 4 * size, 7*size + 1, 10 * size, 13*size + 3} {
			if n <= size {
				continue
			}
			for _, proxies := range []int{1, 2, 3, 10, 16, 37, 50, 64, 100, 150, 256} {
				_, least, most := proxiesOf(t, fleet(n), proxies, size, byIndex)
				mean := float64(proxies*size) / float64(n)
				deviation := max(float64(most)-mean, mean-float64(least))
				far = max(far, deviation)
				allowed := 3.2
				if proxies&(proxies-1) == 0 {
					allowed = 0.999 // A power of two fills the circle evenly.
				}
				if deviation > allowed || mean >= 2 && least == 0 {
					t.Errorf("%d proxies, %d of %d endpoints: %d to %d proxies for each, %.1f on average", proxies, size, n, least, most, mean)
				}
			}
		}
	}
	t.Logf("at most %.1f more or fewer than the average", far)
}

// One endpoint more or less changes little for each proxy, whatever the number of endpoints.
func TestDeterministicSubsetStable(t *testing.T) {
	const proxies, size = 7, 20
	for name, proxy := range map[string]func(i, size int) *DeterministicSubset{"identity": byIdentity, "index": byIndex} {
		moved, most, changes := 0, 0, 0
		for i := range proxies {
			i := i * 43 // up to the 259th of a fleet
			before := chosen(proxy(i, size), fleet(100))
			for n := 101; n <= 300; n++ {
				after := chosen(proxy(i, size), fleet(n))
				lost := 0
				for a := range before {
					if !after[a] {
						lost++
					}
				}
				moved, most, changes = moved+lost, max(most, lost), changes+1
				before = after
			}
		}
		t.Logf("%s: %.2f of %d connections move on average, %d at most", name, float64(moved)/float64(changes), size, most)
		if most > 2 || moved > changes {
			t.Errorf("%s: of %d connections, proxies move %d at most, %d in %d changes", name, size, most, moved, changes)
		}
	}
}

// The rest is used while nothing of the subset can be.
func TestDeterministicSubsetExhausted(t *testing.T) {
	s := fleet(10)
	p := byIdentity(1, 3)
	set := chosen(p, s)
	p.child = new(Random)
	picker := p.Build(s)
	for range 100 {
		i, ok := pick(picker, PickInfo{})
		if !ok || !set[s.Endpoints[9-i].Address] {
			t.Fatalf("picked %d, %v", i, ok)
		}
	}
	for _, e := range s.Endpoints {
		e.State.SetUsable(!set[e.Address])
	}
	if i, ok := pick(picker, PickInfo{}); !ok || set[s.Endpoints[9-i].Address] {
		t.Errorf("picked %d, %v", i, ok)
	}
	// With few endpoints, all are used.
	if got := len(chosen(byIdentity(1, 30), s)); got != 10 {
		t.Errorf("%d endpoints are used", got)
	}
}

func BenchmarkDeterministicSubset(b *testing.B) {
	s := fleet(10_000)
	p := byIdentity(1, 100)
	p.child = new(Random)
	picker := p.Build(s)
	b.Run("pick/10000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			picker.Pick(PickInfo{})
		}
	})
	b.Run("build/10000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p.Build(s)
		}
	})
}
