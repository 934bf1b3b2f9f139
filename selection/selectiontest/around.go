package selectiontest

import (
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// RunAround tests whether a policy that chooses by way of another one lets that one do what it can: whether it is told of the
// attempts, may add to answers, and gets what a policy may ask for besides. The function makes a policy around another one. The
// endpoints, of which there are some, are changed by change, if it is not nil, so that the policy has something to choose by.
// Calls have no properties.
func RunAround(t *testing.T, around func(child selection.Policy) selection.Policy, change func(e *upstream.Endpoint)) {
	a := surroundings{around, change}
	t.Run("picks", a.testPicks)
	t.Run("interests", a.testInterests)
	t.Run("no audience", a.testNoAudience)
	t.Run("allocations", a.testAllocations)
	t.Run("policy", a.testPolicy)
}

type surroundings struct {
	around func(child selection.Policy) selection.Policy
	change func(e *upstream.Endpoint)
}

func (a surroundings) snapshot() *upstream.Snapshot {
	s := Snapshot(6)
	for i := range s.Endpoints {
		if a.change != nil {
			a.change(&s.Endpoints[i])
		}
	}
	slices.Reverse(s.Endpoints)
	return s
}

// each picks each endpoint, one after the other.
func each(t *testing.T, p selection.Picker, s *upstream.Snapshot, f func(pick selection.Pick)) {
	t.Helper()
	var tried []int
	for {
		pick, ok := p.Pick(selection.PickInfo{Tried: tried})
		if !ok {
			break
		}
		if slices.Contains(tried, pick.Index) {
			t.Fatalf("picked %d again, after %v", pick.Index, tried)
		}
		tried = append(tried, pick.Index)
		f(pick)
	}
	if len(tried) == 0 {
		t.Fatalf("none of %d endpoints is picked", len(s.Endpoints))
	}
}

// testPicks: what the child picks is reported to it, once and with its own token, and it adds to the answer.
func (a surroundings) testPicks(t *testing.T) {
	child, s := new(probe), a.snapshot()
	each(t, a.around(child).Build(s), s, func(pick selection.Pick) {
		child.check(t, pick)
		if pick.AnyWillDo {
			t.Errorf("%d: any other will do, which the policy within did not say", pick.Index)
		}
	})
}

// testInterests: the child is told of what others pick as well.
func (a surroundings) testInterests(t *testing.T) {
	child, s := new(probe), a.snapshot()
	p := a.around(child).Build(s)
	each(t, p, s, func(pick selection.Pick) { child.check(t, selection.InterestIn(p, pick.Index)) })
}

// testNoAudience: a call does not pay for what nobody needs.
func (a surroundings) testNoAudience(t *testing.T) {
	s := a.snapshot()
	own := a.around(new(selection.Random)).Build(s)
	around := a.around(&probe{deaf: true}).Build(s)
	want, _ := own.Pick(selection.PickInfo{})
	each(t, around, s, func(pick selection.Pick) {
		if pick.Needs() != want.Needs() {
			t.Errorf("needs %+v around a policy that needs nothing, %+v around random", pick.Needs(), want.Needs())
		}
	})
}

func (a surroundings) testAllocations(t *testing.T) {
	p := a.around(new(probe)).Build(a.snapshot())
	if got := testing.AllocsPerRun(200, func() { p.Pick(selection.PickInfo{}) }); got != 0 {
		t.Errorf("%v allocations", got)
	}
}

// testPolicy: what the child asks for besides, the policy around it asks for.
func (a surroundings) testPolicy(t *testing.T) {
	child := &probe{asks: true}
	p := a.around(child)
	if w, ok := p.(selection.HealthWatcher); !ok || !w.WatchesHealth() {
		t.Error("the policy within watches health: it must be a HealthWatcher")
	}
	if r, ok := p.(selection.LoadReportReceiver); !ok || r.ReportInterval() != time.Minute {
		t.Error("the policy within wants load reports: it must be a LoadReportReceiver with the same interval")
	} else if r.ReceiveLoadReport(new(upstream.State), []byte("x")); child.reports != 1 {
		t.Errorf("the policy within got %d load reports of 1", child.reports)
	}
	if k, ok := p.(selection.Keyed); !ok {
		t.Error("the policy within hashes a key: it must be Keyed")
	} else if hash, ok := k.KeyHash(nil); !ok || hash != 42 {
		t.Errorf("the hash of the key is %d, %v; the policy within says 42", hash, ok)
	}
	if b, ok := p.(selection.Binding); !ok || !b.BindsClients() {
		t.Error("the policy within binds clients: it must be Binding")
	}
}

// probe is a policy that picks the first open endpoint and writes down what it is told.
type probe struct {
	deaf bool // it needs nothing
	asks bool // for all that a policy may ask for

	responded, done []uint64 // tokens
	reports         int
}

// tokenOf is what the probe knows the endpoint by.
func tokenOf(index int) uint64 { return 1<<40 + uint64(index) }

// check tells that the attempt is over, and fails unless the probe alone hears of it, and adds to the answer.
func (p *probe) check(t *testing.T, pick selection.Pick) {
	t.Helper()
	p.responded, p.done = nil, nil
	if n := pick.Needs(); !n.Attempts || !n.FirstMessage || !n.Work {
		t.Errorf("%d: needs are %+v, of which some of the policy within are missing", pick.Index, n)
	}
	pick.Responded(time.Second)
	pick.Done(new(call.Attempt))
	var added []string
	pick.Annotate(new(call.Call), func(name, value string) {
		if name == "x-probe" {
			added = append(added, value)
		}
	})
	want := []uint64{tokenOf(pick.Index)}
	if !slices.Equal(p.responded, want) || !slices.Equal(p.done, want) {
		t.Errorf("%d: the policy within heard of %d and %d, want %d", pick.Index, p.responded, p.done, want)
	}
	if !slices.Equal(added, []string{strconv.Itoa(pick.Index)}) {
		t.Errorf("%d: the policy within added %q", pick.Index, added)
	}
}

func (p *probe) Build(s *upstream.Snapshot) selection.Picker {
	k := &probing{first: new(selection.First).Build(s), s: s}
	if !p.deaf {
		k.audience = &selection.Audience{
			Learner: p, Needs: selection.Needs{Attempts: true, FirstMessage: true, Work: true}, Annotator: p,
		}
	}
	return k
}

func (p *probe) WatchesHealth() bool { return p.asks }

func (p *probe) ReportInterval() time.Duration {
	if !p.asks {
		return 0
	}
	return time.Minute
}

func (p *probe) ReceiveLoadReport(*upstream.State, []byte) { p.reports++ }

func (p *probe) KeyHash(*call.Call) (uint64, bool) { return 42, p.asks }

func (p *probe) BindsClients() bool { return p.asks }

func (p *probe) Responded(pick selection.Pick, _ time.Duration) {
	p.responded = append(p.responded, pick.Token)
}

func (p *probe) Done(pick selection.Pick, _ *call.Attempt) { p.done = append(p.done, pick.Token) }

func (p *probe) Annotate(_ *call.Call, pick selection.Pick, add func(name, value string)) {
	add("x-probe", strconv.Itoa(pick.Index))
}

type probing struct {
	first    selection.Picker
	s        *upstream.Snapshot
	audience *selection.Audience
}

func (p *probing) Pick(in selection.PickInfo) (selection.Pick, bool) {
	pick, ok := p.first.Pick(in)
	pick.Audience, pick.Token = p.audience, tokenOf(pick.Index)
	return pick, ok
}

func (p *probing) Interests(f func(selection.Pick)) {
	for i := range p.s.Endpoints {
		index := p.s.Endpoints[i].Index
		f(selection.Pick{Index: index, Audience: p.audience, Token: tokenOf(index)})
	}
}
