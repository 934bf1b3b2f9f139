package selection_test

import (
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/selection/selectiontest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// within returns our policy with another one in the place of its child or fallback.
func within(config string) func(child selection.Policy) selection.Policy {
	return func(child selection.Policy) selection.Policy {
		p := mustLoad(config)
		p.(interface{ SetChild(p selection.Policy) }).SetChild(child)
		return p
	}
}

func byPriority(e *upstream.Endpoint) { e.Priority = uint32(e.Index % 2) }

func byZone(e *upstream.Endpoint) { e.Locality.Zone = []string{"a", "b"}[e.Index%2] }

func byVersion(e *upstream.Endpoint) {
	e.Metadata = map[string]string{"v": []string{"1", "2", "3"}[e.Index%3]}
}

const (
	anySubset = `{"policy":"subset","match":[{"key":"v","value":"{http.request.header.v}"}],"fallback":"any"}`
	oneSubset = `{"policy":"subset","match":[{"key":"v","value":"2"}]}`
)

// around are all policies of the package that choose by way of others, as they do it in all ways.
var around = []struct {
	name   string
	around func(child selection.Policy) selection.Policy
	change func(e *upstream.Endpoint)
}{
	{"priority", selection.WithPriorities, byPriority},
	{"one priority", within(`{"policy":"priority"}`), nil},
	{"locality", within(`{"policy":"locality","zone":"a"}`), byZone},
	{"one locality", within(`{"policy":"locality","zone":"a"}`), nil},
	{"subset", within(oneSubset), byVersion},
	{"any subset", within(anySubset), byVersion},
	{"subset by priority", func(p selection.Policy) selection.Policy {
		return selection.WithPriorities(within(oneSubset)(p))
	}, func(e *upstream.Endpoint) { byPriority(e); byVersion(e) }},
	{"locality by priority", func(p selection.Policy) selection.Policy {
		return selection.WithPriorities(within(`{"policy":"locality","zone":"a"}`)(p))
	}, func(e *upstream.Endpoint) { e.Priority = uint32(e.Index / 3); byZone(e) }},
	{"deterministic_subset", within(`{"policy":"deterministic_subset","size":2,"index":"1"}`), nil},
	{"large deterministic_subset", within(`{"policy":"deterministic_subset","size":20,"index":"1"}`), nil},
	{"sticky", within(`{"policy":"sticky"}`), nil},
	{"sticky by priority", func(p selection.Policy) selection.Policy {
		return selection.WithPriorities(within(`{"policy":"sticky"}`)(p))
	}, byPriority},
	{"somebody's", func(p selection.Policy) selection.Policy { return &scribe{child: p} }, nil},
	{"somebody's around priority", func(p selection.Policy) selection.Policy {
		return &scribe{child: selection.WithPriorities(p)}
	}, byPriority},
	{"somebody's by priority", func(p selection.Policy) selection.Policy {
		return selection.WithPriorities(&scribe{child: p})
	}, byPriority},
	{"somebody's around sticky", func(p selection.Policy) selection.Policy {
		return &scribe{child: within(`{"policy":"sticky"}`)(p)}
	}, nil},
	{"somebody's around somebody's", func(p selection.Policy) selection.Policy {
		return &scribe{child: &scribe{child: p}}
	}, nil},
}

func TestAround(t *testing.T) {
	for _, tt := range around {
		t.Run(tt.name, func(t *testing.T) { selectiontest.RunAround(t, tt.around, tt.change) })
	}
}

// A policy that hashes has a key of its own, and apart from that does what others do for its fallback, whether there is a key or not.
func TestHashFallbackHears(t *testing.T) {
	for name, config := range hashPolicies {
		t.Run(name, func(t *testing.T) {
			child := new(scribe)
			child.child = new(selection.Random)
			p := within(config)(child).Build(selectiontest.Snapshot(4))
			for i, c := range []*call.Call{nil, withKey(1), withKey(2)} {
				pick, ok := p.Pick(selection.PickInfo{Call: c})
				if !ok || pick.AnyWillDo != (c == nil) {
					t.Errorf("call %d: picked %+v, %v", i, pick, ok)
				}
				pick.Done(new(call.Attempt))
				if len(child.done) != i+1 || child.done[i] != pick.Index {
					t.Errorf("call %d, to %d: the fallback heard of %v", i, pick.Index, child.done)
				}
			}
		})
	}
}

// Who does not mind which endpoint a call goes to.
func TestAnyWillDo(t *testing.T) {
	const leastRequest = `{"policy":"least_request"}`
	keyless, keyed := new(call.Call), withKey(1)
	keyless.Metadata, keyless.Placeholders = values{}, nil
	for _, tt := range []struct {
		name   string
		policy selection.Policy
		change func(e *upstream.Endpoint)
		call   *call.Call
		want   bool
	}{
		{"round_robin", new(selection.RoundRobin), nil, nil, true},
		{"weighted_round_robin", &selection.WeightedRoundRobin{Weights: []int{1, 2}}, nil, nil, true},
		{"random", new(selection.Random), nil, nil, true},
		{"random_choose", &selection.RandomChoose{Choose: 2}, nil, nil, true},
		{"least_request", new(selection.LeastRequest), nil, nil, true},
		{"least_conn", new(selection.LeastConn), nil, nil, true},
		{"peak_ewma", new(selection.PeakEWMA), nil, nil, true},
		{"orca", new(selection.ORCA), nil, nil, true},
		{"first", new(selection.First), nil, nil, false},
		{"ring_hash", mustLoad(hashPolicies["ring_hash"]), nil, keyed, false},
		{"maglev", mustLoad(hashPolicies["maglev"]), nil, keyed, false},
		{"rendezvous", mustLoad(hashPolicies["rendezvous"]), nil, keyed, false},
		{"a hash without a key", mustLoad(hashPolicies["maglev"]), nil, keyless, true},
		{"sticky, a new session", mustLoad(`{"policy":"sticky"}`), nil, keyless, false},
		{"priorities", selection.WithPriorities(mustLoad(leastRequest)), byPriority, nil, true},
		{"priorities of a hash", selection.WithPriorities(mustLoad(hashPolicies["maglev"])), byPriority, keyed, false},
		{"localities", mustLoad(`{"policy":"locality","zone":"a"}`), byZone, nil, false},
		{"localities by priority", selection.WithPriorities(mustLoad(`{"policy":"locality","zone":"a"}`)), func(e *upstream.Endpoint) {
			e.Priority = uint32(e.Index / 6)
			byZone(e)
		}, nil, false},
		{"a subset", mustLoad(oneSubset), byVersion, nil, true},
		{"a chosen subset", mustLoad(`{"policy":"deterministic_subset","size":2,"index":"1"}`), nil, nil, false},
		{"somebody's", &scribe{child: new(selection.LeastRequest)}, nil, nil, true},
		{"somebody's around first", &scribe{child: new(selection.First)}, nil, nil, false},
		{"priorities of somebody's", selection.WithPriorities(&scribe{child: new(selection.PeakEWMA)}), byPriority, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := selectiontest.Snapshot(12)
			for i := range s.Endpoints {
				if tt.change != nil {
					tt.change(&s.Endpoints[i])
				}
			}
			pick, ok := tt.policy.Build(s).Pick(selection.PickInfo{Call: tt.call})
			if !ok || pick.AnyWillDo != tt.want {
				t.Errorf("picked %+v, %v; any will do: want %v", pick, ok, tt.want)
			}
		})
	}
}

// scribe is a policy as another module may have it. It has any policy choose, writes down how the attempts went, and adds a field
// to answers. It knows nothing of the policy within it.
type scribe struct {
	child selection.Policy

	mu        sync.Mutex
	responded []int
	done      []int
}

func (p *scribe) Build(s *upstream.Snapshot) selection.Picker {
	return &scribbling{p.child.Build(s), s, &selection.Audience{Learner: p, Needs: scribeNeeds, Annotator: p}}
}

var scribeNeeds = selection.Needs{Attempts: true, FirstMessage: true}

func (p *scribe) Responded(pick selection.Pick, _ time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.responded = append(p.responded, pick.Index)
}

func (p *scribe) Done(pick selection.Pick, _ *call.Attempt) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = append(p.done, pick.Index)
}

func (*scribe) Annotate(_ *call.Call, _ selection.Pick, add func(name, value string)) {
	add("x-scribe", "was here")
}

// What the policy within can do, it can.

func (p *scribe) WatchesHealth() bool {
	w, ok := p.child.(selection.HealthWatcher)
	return ok && w.WatchesHealth()
}

func (p *scribe) ReportInterval() time.Duration {
	if r, ok := p.child.(selection.LoadReportReceiver); ok {
		return r.ReportInterval()
	}
	return 0
}

func (p *scribe) ReceiveLoadReport(s *upstream.State, report []byte) {
	if r, ok := p.child.(selection.LoadReportReceiver); ok {
		r.ReceiveLoadReport(s, report)
	}
}

func (p *scribe) KeyHash(c *call.Call) (uint64, bool) {
	if k, ok := p.child.(selection.Keyed); ok {
		return k.KeyHash(c)
	}
	return 0, false
}

func (p *scribe) BindsClients() bool {
	b, ok := p.child.(selection.Binding)
	return ok && b.BindsClients()
}

func (p *scribe) WithPriorities() selection.Policy {
	return &scribe{child: selection.WithPriorities(p.child)}
}

type scribbling struct {
	child    selection.Picker
	s        *upstream.Snapshot
	audience *selection.Audience
}

func (p *scribbling) Pick(in selection.PickInfo) (selection.Pick, bool) {
	pick, ok := p.child.Pick(in)
	pick.Audience = p.audience.And(pick.Audience)
	return pick, ok
}

func (p *scribbling) Interests(f func(selection.Pick)) {
	selection.Interests(p.child, func(pick selection.Pick) {
		pick.Audience = p.audience.And(pick.Audience)
		f(pick)
	})
	for _, list := range [][]upstream.Endpoint{p.s.Endpoints, p.s.Draining} {
		for i := range list {
			f(selection.Pick{Index: list[i].Index, Audience: p.audience})
		}
	}
}

// Around least_request, somebody's policy hears of all calls; what it does not need, nobody finds out.
func TestForeignAroundLeastRequest(t *testing.T) {
	p := &scribe{child: new(selection.LeastRequest)}
	picker := p.Build(selectiontest.Snapshot(20))
	var want []int
	for range 50 {
		pick, ok := picker.Pick(selection.PickInfo{})
		if !ok || !pick.AnyWillDo || pick.Needs() != scribeNeeds {
			t.Fatalf("picked %+v, %v, which needs %+v", pick, ok, pick.Needs())
		}
		pick.Responded(time.Millisecond)
		pick.Done(new(call.Attempt))
		want = append(want, pick.Index)
	}
	if !slices.Equal(p.responded, want) || !slices.Equal(p.done, want) {
		t.Errorf("picked %v, heard of %v and %v", want, p.responded, p.done)
	}
}

// Around peak_ewma, and with levels or sessions between or around, it hears of all calls, and peak_ewma learns from them.
func TestForeignAroundPeakEWMA(t *testing.T) {
	const n, slow = 6, 2
	peak := func() selection.Policy { return new(selection.PeakEWMA) }
	for name, policy := range map[string]func(p *scribe) selection.Policy{
		"alone": func(p *scribe) selection.Policy {
			p.child = peak()
			return p
		},
		"around priority": func(p *scribe) selection.Policy {
			p.child = selection.WithPriorities(peak())
			return p
		},
		"within subset": func(p *scribe) selection.Policy {
			p.child = peak()
			return within(anySubset)(p)
		},
		"within sticky": func(p *scribe) selection.Policy {
			p.child = peak()
			return within(`{"policy":"sticky"}`)(p)
		},
		"around sticky": func(p *scribe) selection.Policy {
			p.child = within(`{"policy":"sticky"}`)(peak())
			return p
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := new(scribe)
			picker := policy(p).Build(selectiontest.Snapshot(n))
			counts, heard := make([]int, n), 0
			for k := range 2000 {
				pick, ok := picker.Pick(selection.PickInfo{})
				if !ok {
					t.Fatal("nothing picked")
				}
				latency := time.Millisecond
				if pick.Index == slow {
					latency = 20 * time.Second
				}
				pick.Responded(latency)
				pick.Done(&call.Attempt{Latency: latency, SentMessages: 1, ReceivedMessages: 1})
				heard++
				if k >= 1000 {
					counts[pick.Index]++
				}
			}
			if counts[slow] > 0 {
				t.Errorf("the slow endpoint was picked %d times of 1000", counts[slow])
			}
			if len(p.responded) != heard || len(p.done) != heard {
				t.Errorf("%d calls, heard of %d and %d", heard, len(p.responded), len(p.done))
			}
		})
	}
}

// Around sticky, somebody's policy adds to answers as well, the client gets its token, and stays where that says.
func TestForeignAroundSticky(t *testing.T) {
	child := within(`{"policy":"sticky"}`)(new(selection.RoundRobin))
	for name, policy := range map[string]selection.Policy{
		"alone":         &scribe{child: child},
		"by priorities": selection.WithPriorities(&scribe{child: child}),
	} {
		t.Run(name, func(t *testing.T) {
			s := selectiontest.Snapshot(6)
			for i := range s.Endpoints {
				byPriority(&s.Endpoints[i])
			}
			picker := policy.Build(s)
			c := &call.Call{Metadata: values{}}
			// Of the lower level, where the fallback would not send the client again.
			first, ok := picker.Pick(selection.PickInfo{Call: c, Tried: []int{0, 2, 4}})
			if !ok || first.AnyWillDo {
				t.Fatalf("picked %+v, %v", first, ok)
			}
			var cookie, scribes int
			add := func(name, value string) {
				if name == "x-scribe" {
					scribes++
					return
				}
				k, err := http.ParseSetCookie(value)
				if err != nil || name != "set-cookie" {
					t.Fatalf("added %s: %s", name, value)
				}
				c.Metadata = values{"cookie": {k.Name + "=" + k.Value}}
				cookie++
			}
			first.Annotate(c, add)
			if cookie != 1 || scribes != 1 {
				t.Fatalf("%d cookies and %d other fields are added", cookie, scribes)
			}
			for range 10 {
				pick, ok := picker.Pick(selection.PickInfo{Call: c})
				if !ok || pick.Index != first.Index || pick.AnyWillDo || pick.Needs() != scribeNeeds {
					t.Fatalf("picked %+v, %v, want %d", pick, ok, first.Index)
				}
				pick.Annotate(c, add)
			}
			if cookie != 1 || scribes != 11 {
				t.Errorf("%d cookies and %d other fields are added", cookie, scribes)
			}
		})
	}
	if err := within(`{"policy":"locality","zone":"a"}`)(&scribe{child: child}).(interface{ Validate() error }).Validate(); err == nil {
		t.Error("sessions within somebody's policy within locality, which breaks them, are not refused")
	}
}

// counter counts the attempts that it hears of.
type counter struct {
	scribe
	heard atomic.Int64
}

func (p *counter) Build(s *upstream.Snapshot) selection.Picker {
	return &scribbling{p.child.Build(s), s, &selection.Audience{Learner: p, Needs: selection.Needs{Attempts: true}}}
}

func (p *counter) Responded(selection.Pick, time.Duration) { panic("it does not need that") }

func (p *counter) Done(selection.Pick, *call.Attempt) { p.heard.Add(1) }

// A pick and its reports cost no allocation with two audiences either, and calls may come at the same time.
func TestForeignCost(t *testing.T) {
	policy := new(counter)
	policy.child = selection.WithPriorities(new(selection.PeakEWMA))
	s := selectiontest.Snapshot(6)
	for i := range s.Endpoints {
		byPriority(&s.Endpoints[i])
	}
	picker := policy.Build(s)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for k := range 1000 {
				pick, ok := picker.Pick(selection.PickInfo{Tried: [][]int{nil, {0, 2, 4}}[k%2]})
				if !ok {
					t.Error("nothing picked")
					return
				}
				pick.Responded(time.Millisecond)
				pick.Done(new(call.Attempt))
			}
		})
	}
	wg.Wait()
	if n := policy.heard.Load(); n != 8000 {
		t.Errorf("heard of %d attempts of 8000", n)
	}
	a := new(call.Attempt)
	if got := testing.AllocsPerRun(200, func() {
		pick, _ := picker.Pick(selection.PickInfo{})
		pick.Responded(time.Millisecond)
		pick.Done(a)
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
}
