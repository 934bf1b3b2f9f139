package selectiontest_test

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/selection/selectiontest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// policyFunc is a policy that picks with a function; next is a number of the picker.
type policyFunc func(s *upstream.Snapshot, next *atomic.Int64, in selection.PickInfo) (int, bool)

func (f policyFunc) Build(s *upstream.Snapshot) selection.Picker { return &picker{s: s, f: f} }

type picker struct {
	s    *upstream.Snapshot
	f    policyFunc
	next atomic.Int64
}

func (p *picker) Pick(in selection.PickInfo) (selection.Pick, bool) {
	index, ok := p.f(p.s, &p.next, in)
	return selection.Pick{Index: index}, ok
}

// walk goes from i to the next open endpoint.
func walk(s *upstream.Snapshot, i int, tried []int) (int, bool) {
	for range s.Endpoints {
		i %= len(s.Endpoints)
		if s.Endpoints[i].State.Usable() && !slices.Contains(tried, i) {
			return i, true
		}
		i++
	}
	return 0, false
}

var sink []int

// broken are policies with one fault each, and the tests that must find it.
var broken = map[string]struct {
	policy selection.Policy
	traits selectiontest.Traits
	finds  []string
}{
	"panics without endpoints": {policyFunc(func(s *upstream.Snapshot, _ *atomic.Int64, _ selection.PickInfo) (int, bool) {
		return 0, s.Endpoints[0].State.Usable()
	}), selectiontest.Traits{}, []string{"nothing_to_pick"}},
	"ignores tried": {policyFunc(func(s *upstream.Snapshot, _ *atomic.Int64, _ selection.PickInfo) (int, bool) {
		return walk(s, 0, nil)
	}), selectiontest.Traits{}, []string{"nothing_to_pick", "only_open_endpoints", "exhaustion", "parallel"}},
	"ignores usable": {policyFunc(func(s *upstream.Snapshot, _ *atomic.Int64, in selection.PickInfo) (int, bool) {
		for i := range s.Endpoints {
			if !slices.Contains(in.Tried, i) {
				return i, true
			}
		}
		return 0, false
	}), selectiontest.Traits{}, []string{"nothing_to_pick", "only_open_endpoints", "comes_back"}},
	"allocates": {policyFunc(func(s *upstream.Snapshot, _ *atomic.Int64, in selection.PickInfo) (int, bool) {
		sink = slices.Clone(append(in.Tried, len(s.Endpoints)))
		return walk(s, 0, in.Tried)
	}), selectiontest.Traits{}, []string{"allocations"}},
	"neighbour takes all": {policyFunc(func(s *upstream.Snapshot, next *atomic.Int64, in selection.PickInfo) (int, bool) {
		return walk(s, int(next.Add(1)), in.Tried)
	}), selectiontest.Traits{Even: true, Exact: true}, []string{"even", "even/neighbours_unusable", "begins_anywhere", "exact", "exact_in_parallel"}},
	"last": {policyFunc(func(s *upstream.Snapshot, _ *atomic.Int64, in selection.PickInfo) (int, bool) {
		for i, e := range slices.Backward(s.Endpoints) {
			if e.State.Usable() && !slices.Contains(in.Tried, i) {
				return i, true
			}
		}
		return 0, false
	}), selectiontest.Traits{Ordered: true}, []string{"ordered"}},
	"does not count": {policyFunc(func(s *upstream.Snapshot, next *atomic.Int64, in selection.PickInfo) (int, bool) {
		return walk(s, int(next.Add(1)), in.Tried)
	}), selectiontest.Traits{Least: true}, []string{"least"}},
	"allocates an audience": {spendthrift{}, selectiontest.Traits{}, []string{"allocations"}},
	"allocates to learn": {forgetful(func(_ *learner, index int) {
		sink = append([]int(nil), index, len(sink))
	}), selectiontest.Traits{}, []string{"learning_allocations"}},
	"takes an index for a place": {forgetful(func(l *learner, index int) {
		l.latencies[index].Load()
	}), selectiontest.Traits{}, []string{"learning_about_parts"}},
	"forgets": {forgetful(nil), selectiontest.Traits{Remembers: true}, []string{"remembers"}},
}

// forgetful is a policy that picks by latencies, which only its picker knows. The function is run for each of them.
type forgetful func(l *learner, index int)

type learner struct {
	s         *upstream.Snapshot
	latencies []atomic.Int64
	each      func(l *learner, index int)
	audience  selection.Audience
}

func (f forgetful) Build(s *upstream.Snapshot) selection.Picker {
	l := &learner{s: s, latencies: make([]atomic.Int64, len(s.Endpoints)), each: f}
	l.audience.Learner, l.audience.Needs = l, selection.Needs{Attempts: true, FirstMessage: true}
	return l
}

func (l *learner) Pick(in selection.PickInfo) (pick selection.Pick, ok bool) {
	least := int64(0)
	for i := range l.s.Endpoints {
		e := &l.s.Endpoints[i]
		if !e.State.Usable() || slices.Contains(in.Tried, e.Index) {
			continue
		}
		if x := l.latencies[i].Load() + e.State.Active(); !ok || x < least {
			pick, least, ok = selection.Pick{Index: e.Index, Audience: &l.audience, Token: uint64(i)}, x, true
		}
	}
	return pick, ok
}

func (l *learner) Responded(p selection.Pick, latency time.Duration) {
	l.latencies[p.Token].Store(int64(latency))
	if l.each != nil {
		l.each(l, p.Index)
	}
}

func (*learner) Done(selection.Pick, *call.Attempt) {}

// spendthrift is a policy that makes an audience for each pick.
type spendthrift struct{ selection.Random }

func (p spendthrift) Build(s *upstream.Snapshot) selection.Picker {
	return &spending{Picker: p.Random.Build(s)}
}

type spending struct {
	selection.Picker
	last atomic.Pointer[selection.Audience]
}

func (p *spending) Pick(in selection.PickInfo) (selection.Pick, bool) {
	pick, ok := p.Picker.Pick(in)
	pick.Audience = new(selection.Audience)
	p.last.Store(pick.Audience)
	return pick, ok
}

const faultVar = "SELECTIONTEST_FAULT"

// TestFault runs the suite on one of the broken policies, in a process of TestSuiteFindsFaults.
func TestFault(t *testing.T) {
	b, ok := broken[os.Getenv(faultVar)]
	if !ok {
		t.Skip("for TestSuiteFindsFaults")
	}
	selectiontest.Run(t, func() selection.Policy { return b.policy }, b.traits)
}

func TestSuiteFindsFaults(t *testing.T) {
	for name, b := range broken {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestFault$", "-test.count=1")
			cmd.Env = append(os.Environ(), faultVar+"="+name)
			out, err := cmd.CombinedOutput()
			if err == nil {
				t.Fatalf("the suite passes:\n%s", out)
			}
			for _, test := range b.finds {
				if !strings.Contains(string(out), "--- FAIL: TestFault/"+test+" ") {
					t.Errorf("%s passes:\n%s", test, out)
				}
			}
		})
	}
}
