package selection_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/selection/selectiontest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// mustLoad loads a policy from JSON. What its provisioning starts is stopped with the process.
func mustLoad(config string) selection.Policy {
	ctx, _ := caddy.NewContext(caddy.Context{Context: context.Background()})
	mod, err := ctx.LoadModule(&host{PolicyRaw: json.RawMessage(config)}, "PolicyRaw")
	if err != nil {
		panic(fmt.Sprintf("%s: %v", config, err))
	}
	return mod.(selection.Policy)
}

// loaded is a policy of the list of all, loaded from JSON.
func loaded(name, config string, traits selectiontest.Traits) policy {
	return policy{name, func() selection.Policy { return mustLoad(config) }, traits}
}

// hashPolicies take the metadata key "k" as their key.
var hashPolicies = map[string]string{
	"ring_hash":  `{"policy":"ring_hash","keys":[{"source":"header","name":"k"}]}`,
	"maglev":     `{"policy":"maglev","keys":[{"source":"header","name":"k"}]}`,
	"rendezvous": `{"policy":"rendezvous","keys":[{"source":"header","name":"k"}]}`,
	"header":     `{"policy":"header","field":"k"}`,
}

func init() {
	even := selectiontest.Traits{Even: true, Weighted: true}
	policies = append(policies,
		loaded("ring_hash", hashPolicies["ring_hash"], selectiontest.Traits{}),
		loaded("maglev", hashPolicies["maglev"], selectiontest.Traits{}),
		// Rendezvous with a random key is a weighted draw.
		loaded("rendezvous", hashPolicies["rendezvous"], even),
		loaded("header", hashPolicies["header"], even),
		loaded("query", `{"policy":"query","key":"k"}`, even),
		loaded("ip_hash", `{"policy":"ip_hash"}`, even),
		loaded("client_ip_hash", `{"policy":"client_ip_hash"}`, even),
		loaded("uri_hash", `{"policy":"uri_hash"}`, even),
	)
}

// values is a call's metadata.
type values map[string][]string

func (v values) Values(key string) []string { return v[key] }

// withKey is a call with the key n.
func withKey(n int) *call.Call {
	return &call.Call{Metadata: values{"k": {fmt.Sprint("key", n)}}}
}

// assign picks for each of the keys and returns the addresses, or "" for those without an endpoint.
func assign(p selection.Picker, s *upstream.Snapshot, calls []*call.Call, tried ...int) []string {
	address := make(map[int]string)
	for _, e := range s.Endpoints {
		address[e.Index] = e.Address
	}
	got := make([]string, len(calls))
	for i, c := range calls {
		if index, ok := pick(p, selection.PickInfo{Call: c, Tried: tried}); ok {
			got[i] = address[index]
		}
	}
	return got
}

func keyedCalls(n int) []*call.Call {
	calls := make([]*call.Call, n)
	for i := range calls {
		calls[i] = withKey(i)
	}
	return calls
}

// without is the snapshot without the endpoint at the place, numbered anew.
func without(s *upstream.Snapshot, place int) *upstream.Snapshot {
	t := &upstream.Snapshot{Endpoints: slices.Delete(slices.Clone(s.Endpoints), place, place+1)}
	for i := range t.Endpoints {
		t.Endpoints[i].Index = i
	}
	return t
}

func count(of []string) map[string]int {
	n := make(map[string]int)
	for _, s := range of {
		n[s]++
	}
	return n
}

// When an endpoint goes, its keys move, and they only; when it comes back, they return to it. Whether it has left the
// set, cannot be used or has been tried makes no difference to the others' keys. A Maglev table may move others too when the
// set changes (the paper has it at a few of a hundred for such sizes), and so may a ring: an endpoint's number of points
// depends on the sum of the weights, so that others get, say, 54 points instead of 52.
func TestHashMovement(t *testing.T) {
	const n, keys = 20, 20_000
	for name, config := range hashPolicies {
		t.Run(name, func(t *testing.T) {
			snap := selectiontest.Snapshot(n)
			for i := range snap.Endpoints {
				snap.Endpoints[i].Weight = uint32(1 + i%3)
			}
			policy := mustLoad(config)
			calls := keyedCalls(keys)
			before := assign(policy.Build(snap), snap, calls)
			shares := count(before)
			for gone := range n {
				left := without(snap, gone)
				after := assign(policy.Build(left), left, calls)
				lost := snap.Endpoints[gone].Address
				moved, others := 0, 0
				for k := range calls {
					switch {
					case before[k] == lost:
						moved++
					case before[k] != after[k]:
						others++
					}
				}
				if after := count(after); after[lost] != 0 || after[""] != 0 {
					t.Fatalf("without %s, keys are at %v", lost, after)
				}
				if moved != shares[lost] || moved == 0 {
					t.Fatalf("%s had %d keys, %d moved", lost, shares[lost], moved)
				}
				if allowed := map[string]int{"maglev": keys * 3 / 100, "ring_hash": keys * 8 / 100}[name]; others > allowed {
					t.Errorf("without %s, %d keys of others moved", lost, others)
				}
			}

			p := policy.Build(snap)
			for closed := range n {
				lost := snap.Endpoints[closed].Address
				tried := assign(p, snap, calls, closed)
				snap.Endpoints[closed].State.SetUsable(false)
				unusable := assign(p, snap, calls)
				snap.Endpoints[closed].State.SetUsable(true)
				for k := range calls {
					if tried[k] == lost || unusable[k] == lost || tried[k] != unusable[k] || before[k] != lost && before[k] != tried[k] {
						t.Fatalf("%s is closed: key %d of %s went to %s and %s", lost, k, before[k], tried[k], unusable[k])
					}
				}
				// Its keys are spread, not given to a neighbour.
				var spread []string
				for k := range calls {
					if before[k] == lost {
						spread = append(spread, tried[k])
					}
				}
				for to, share := range count(spread) {
					if share > len(spread)/2 {
						t.Errorf("%d of the %d keys of %s went to %s", share, len(spread), lost, to)
					}
				}
			}
		})
	}
}

// The order in which a source names the endpoints means nothing; neither do other proxies' random numbers.
func TestHashOrder(t *testing.T) {
	for name, config := range hashPolicies {
		t.Run(name, func(t *testing.T) {
			snap := selectiontest.Snapshot(12)
			calls := keyedCalls(2000)
			want := assign(mustLoad(config).Build(snap), snap, calls)
			for range 5 {
				mixed := &upstream.Snapshot{Endpoints: slices.Clone(snap.Endpoints)}
				rand.Shuffle(len(mixed.Endpoints), func(i, j int) {
					mixed.Endpoints[i], mixed.Endpoints[j] = mixed.Endpoints[j], mixed.Endpoints[i]
				})
				for i := range mixed.Endpoints {
					mixed.Endpoints[i].Index = i
				}
				if got := assign(mustLoad(config).Build(mixed), mixed, calls); !slices.Equal(got, want) {
					t.Fatal("keys moved")
				}
			}
		})
	}
}

// gRFC A76: "hash_key" stands for the address, so that an endpoint with a new address keeps its keys.
func TestHashKeyOfEndpoint(t *testing.T) {
	for name, config := range hashPolicies {
		t.Run(name, func(t *testing.T) {
			snap := selectiontest.Snapshot(6)
			for i := range snap.Endpoints {
				snap.Endpoints[i].Metadata = map[string]string{"hash_key": fmt.Sprint("pod-", i)}
			}
			calls := keyedCalls(2000)
			pick := func() []int {
				p := mustLoad(config).Build(snap)
				var got []int
				for _, c := range calls {
					i, _ := pick(p, selection.PickInfo{Call: c})
					got = append(got, i)
				}
				return got
			}
			want := pick()
			for i := range snap.Endpoints {
				snap.Endpoints[i].Address = fmt.Sprintf("10.0.0.%d:50051", 99-i)
			}
			if !slices.Equal(pick(), want) {
				t.Error("keys moved with the address")
			}
			snap.Endpoints[0].Metadata = nil
			if slices.Equal(pick(), want) {
				t.Error("no key moved with the hash_key")
			}
		})
	}
}

// Shares follow the weights: a ring's as far as its number of points allows, with the standard error 1/sqrt(points); a
// Maglev table's within a few percent; rendezvous as chance has it.
func TestHashShares(t *testing.T) {
	const keys = 60_000
	weights := []uint32{1, 1, 2, 4, 8, 8}
	sum := 24.0
	for name, tolerance := range map[string]float64{"ring_hash": 0.5, "maglev": 0.1, "rendezvous": 0.1} {
		t.Run(name, func(t *testing.T) {
			snap := selectiontest.Snapshot(len(weights))
			for i, w := range weights {
				snap.Endpoints[i].Weight = w
			}
			got := count(assign(mustLoad(hashPolicies[name]).Build(snap), snap, keyedCalls(keys)))
			for i, e := range snap.Endpoints {
				want := keys * float64(weights[i]) / sum
				if share := float64(got[e.Address]); math.Abs(share-want) > tolerance*want {
					t.Errorf("weight %d: %v keys, want %v", weights[i], share, want)
				}
			}
		})
	}
	// More points make the shares more even.
	snap := selectiontest.Snapshot(5)
	big := mustLoad(`{"policy":"ring_hash","keys":[{"source":"header","name":"k"}],"min_ring_size":400000,"max_ring_size":8388608}`)
	for address, share := range count(assign(big.Build(snap), snap, keyedCalls(keys))) {
		if want := keys / 5.0; math.Abs(float64(share)-want) > 0.06*want {
			t.Errorf("a ring of 400,000: %s has %d keys, not about %v", address, share, want)
		}
	}
}

// Calls without a key go to the fallback.
func TestHashFallback(t *testing.T) {
	const fallback = `"fallback":{"policy":"first"}`
	for name, config := range hashPolicies {
		t.Run(name, func(t *testing.T) {
			p := mustLoad(config[:len(config)-1] + "," + fallback + "}").Build(selectiontest.Snapshot(5))
			for _, c := range []*call.Call{nil, {}, {Metadata: values{}}, {Metadata: values{"k": {""}}}} {
				for range 20 {
					if i, ok := pick(p, selection.PickInfo{Call: c, Tried: []int{0}}); !ok || i != 1 {
						t.Fatalf("picked %d, %v, not the first", i, ok)
					}
				}
			}
			others := 0
			for _, c := range keyedCalls(50) {
				if i, _ := pick(p, selection.PickInfo{Call: c}); i != 0 {
					others++
				}
			}
			if others == 0 {
				t.Error("calls with a key go to the fallback too")
			}
		})
	}
}

// One key alone, and all its calls are in flight: no endpoint gets more than its bound, and an endpoint is full before the
// next one gets a call.
func TestBoundedLoad(t *testing.T) {
	for _, name := range []string{"ring_hash", "maglev"} {
		for _, factor := range []int{100, 125, 200} {
			t.Run(fmt.Sprintf("%s/%d", name, factor), func(t *testing.T) {
				config := hashPolicies[name]
				policy := mustLoad(fmt.Sprintf(`%s,"balance_factor":%d}`, config[:len(config)-1], factor))
				for _, n := range []int{1, 3, 8, 40} {
					snap := selectiontest.Snapshot(n)
					sum := 0.0
					for i := range snap.Endpoints {
						snap.Endpoints[i].Weight = uint32(1 + i%2)
						sum += float64(1 + i%2)
					}
					closed := 0
					if n > 8 {
						closed = 5
						for i := range closed {
							snap.Endpoints[i].State.SetUsable(false)
							sum -= float64(1 + i%2)
						}
					}
					p := policy.Build(snap)
					c := withKey(n)
					for m := 1; m <= 1000; m++ {
						i, ok := pick(p, selection.PickInfo{Call: c})
						if !ok {
							t.Fatal("nothing picked")
						}
						s := snap.Endpoints[i].State
						s.Begin()
						room := math.Ceil(float64(m) * float64(factor) / 100 * float64(1+i%2) / sum)
						if active := float64(s.Active()); active > max(room, 1) {
							t.Fatalf("%d endpoints, call %d: endpoint %d has %v calls, its bound is %v", n, m, i, active, room)
						}
					}
				}
			})
		}
	}
}

// Without load, bounded load changes nothing.
func TestBoundedLoadIdle(t *testing.T) {
	snap, calls := selectiontest.Snapshot(50), keyedCalls(3000)
	for _, name := range []string{"ring_hash", "maglev"} {
		config := hashPolicies[name]
		bounded := config[:len(config)-1] + `,"balance_factor":120}`
		if !slices.Equal(assign(mustLoad(config).Build(snap), snap, calls), assign(mustLoad(bounded).Build(snap), snap, calls)) {
			t.Errorf("%s: keys differ", name)
		}
	}
}

// The sums of bounded load follow what happens to endpoints, whoever's calls it is.
func TestBoundedLoadFollows(t *testing.T) {
	config := hashPolicies["ring_hash"]
	const n = 100
	snap := selectiontest.Snapshot(n)
	p := mustLoad(config[:len(config)-1] + `,"balance_factor":150}`).Build(snap)
	c := withKey(1)
	home, _ := pick(p, selection.PickInfo{Call: c})
	// 15 calls are its bound if the others have 10 each.
	for i := range snap.Endpoints {
		for range 10 {
			snap.Endpoints[i].State.Begin()
		}
	}
	for range n { // Everything is looked at.
		p.Pick(selection.PickInfo{Call: c})
	}
	for range 4 {
		snap.Endpoints[home].State.Begin()
	}
	if i, _ := pick(p, selection.PickInfo{Call: c}); i != home {
		t.Errorf("14 calls, average 10: picked %d, not %d", i, home)
	}
	for range 3 {
		snap.Endpoints[home].State.Begin()
	}
	if i, _ := pick(p, selection.PickInfo{Call: c}); i == home {
		t.Error("17 calls, average 10: it got one more")
	}
}

func BenchmarkHashPick(b *testing.B) {
	for _, name := range []string{"ring_hash", "maglev", "rendezvous"} {
		for _, factor := range []int{0, 125} {
			if factor > 0 && name == "rendezvous" {
				continue
			}
			for _, n := range []int{3, 100, 10_000} {
				b.Run(fmt.Sprintf("%s/bound=%d/%d", name, factor, n), func(b *testing.B) {
					config := hashPolicies[name]
					if factor > 0 {
						config = fmt.Sprintf(`%s,"balance_factor":%d}`, config[:len(config)-1], factor)
					}
					p := mustLoad(config).Build(selectiontest.Snapshot(n))
					calls := keyedCalls(1024)
					b.ReportAllocs()
					i := 0
					for b.Loop() {
						i++
						p.Pick(selection.PickInfo{Call: calls[i&1023]})
					}
				})
			}
		}
	}
}

func BenchmarkHashBuild(b *testing.B) {
	for _, name := range []string{"ring_hash", "maglev", "rendezvous"} {
		benchmarkBuild(b, name, hashPolicies[name], selectiontest.Snapshot(10_000))
	}
}

// benchmarkBuild measures how long a picker takes to build and how much memory it keeps.
func benchmarkBuild(b *testing.B, name, config string, snap *upstream.Snapshot) {
	b.Run(name, func(b *testing.B) {
		policy := mustLoad(config)
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		kept := policy.Build(snap)
		runtime.GC()
		runtime.ReadMemStats(&after)
		for b.Loop() {
			policy.Build(snap)
		}
		b.ReportMetric(float64(int64(after.HeapAlloc)-int64(before.HeapAlloc))/float64(len(snap.Endpoints)), "B/endpoint")
		runtime.KeepAlive(kept)
	})
}

// BenchmarkRendezvousWeighted: weights need a logarithm for those that may win.
func BenchmarkRendezvousWeighted(b *testing.B) {
	snap := selectiontest.Snapshot(10_000)
	for i := range snap.Endpoints {
		snap.Endpoints[i].Weight = uint32(1 + i%10)
	}
	p := mustLoad(hashPolicies["rendezvous"]).Build(snap)
	calls := keyedCalls(1024)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		p.Pick(selection.PickInfo{Call: calls[i&1023]})
	}
}

// BenchmarkBoundedHot is the worst there is: all calls have one key, and half of the endpoints are full with them.
func BenchmarkBoundedHot(b *testing.B) {
	for _, name := range []string{"ring_hash", "maglev"} {
		for _, n := range []int{100, 10_000} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				config := hashPolicies[name]
				snap := selectiontest.Snapshot(n)
				p := mustLoad(config[:len(config)-1] + `,"balance_factor":125}`).Build(snap)
				in := selection.PickInfo{Call: withKey(1)}
				for range n / 2 {
					i, _ := pick(p, in)
					snap.Endpoints[i].State.Begin()
				}
				b.ReportAllocs()
				for b.Loop() {
					p.Pick(in)
				}
			})
		}
	}
}
