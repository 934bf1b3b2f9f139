package selection

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// recorder is a policy that can do everything and writes down what it is told. Its pickers pick the first open endpoint.
type recorder struct {
	watch    bool
	interval time.Duration
	built    [][]int
	told     []string
}

func (r *recorder) Build(s *upstream.Snapshot) Picker {
	var indexes []int
	for _, e := range s.Endpoints {
		indexes = append(indexes, e.Index)
	}
	r.built = append(r.built, indexes)
	k := &recording{first: first{newCandidates(s)}, recorder: r, name: fmt.Sprint(indexes)}
	k.audience.Learner, k.audience.Annotator, k.audience.Needs = k, k, everything
	return k
}

var everything = Needs{Attempts: true, FirstMessage: true}

func (r *recorder) WatchesHealth() bool           { return r.watch }
func (r *recorder) ReportInterval() time.Duration { return r.interval }
func (r *recorder) ReceiveLoadReport(_ *upstream.State, report []byte) {
	r.told = append(r.told, "report "+string(report))
}

type recording struct {
	first
	*recorder
	name     string
	audience Audience
}

func (r *recording) Pick(in PickInfo) (Pick, bool) {
	pick, ok := r.first.Pick(in)
	pick.Audience = &r.audience
	return pick, ok
}

func (r *recording) Interests(f func(Pick)) {
	for place := range r.states {
		f(Pick{Index: r.index(place), Audience: &r.audience})
	}
}

func (r *recording) Responded(p Pick, _ time.Duration) {
	r.told = append(r.told, fmt.Sprint(r.name, " responded ", p.Index))
}

func (r *recording) Done(p Pick, _ *call.Attempt) {
	r.told = append(r.told, fmt.Sprint(r.name, " done ", p.Index))
}

func (r *recording) Annotate(_ *call.Call, p Pick, add func(name, value string)) {
	add("by", fmt.Sprint(r.name, p.Index))
}

// parted is a snapshot of endpoints 0 to n-1 whose indexes are in disorder, changed by f.
func parted(n int, f func(e *upstream.Endpoint)) *upstream.Snapshot {
	s := new(upstream.Snapshot)
	for i := range n {
		e := upstream.Endpoint{Index: i, Address: fmt.Sprint("10.0.0.", i, ":1"), Weight: 1, State: new(upstream.State)}
		if f != nil {
			f(&e)
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	slices.Reverse(s.Endpoints)
	return s
}

// What a child can do, its parent can, and it is told about its own endpoints, once, though others have picked them.
func TestNestedPassOn(t *testing.T) {
	subset := func(child Policy) Policy {
		return &Subset{
			Match: []SubsetMatch{{"v", "x"}}, Fallback: fallbackAny, nested: nested{child}, wants: sources{{kind: fromPlaceholder, name: "x"}},
		}
	}
	tests := []struct {
		name   string
		policy func(child Policy) Policy
		change func(e *upstream.Endpoint)
		owners []string // of the endpoints 0 to 3
	}{
		{"priority", WithPriorities, func(e *upstream.Endpoint) { e.Priority = uint32(e.Index % 2) }, []string{"[2 0]", "[3 1]", "[2 0]", "[3 1]"}},
		{"one priority", WithPriorities, nil, []string{"[3 2 1 0]", "[3 2 1 0]", "[3 2 1 0]", "[3 2 1 0]"}},
		{"locality", func(child Policy) Policy {
			return &Locality{nested: nested{child}, here: upstream.Locality{Zone: "a"}}
		}, func(e *upstream.Endpoint) {
			if e.Index > 0 {
				e.Locality.Zone = "a"
			}
		}, []string{"[0]", "[3 2 1]", "[3 2 1]", "[3 2 1]"}},
		{"subset", subset, func(e *upstream.Endpoint) {
			if e.Index == 2 {
				e.Metadata = map[string]string{"v": "x"}
			}
		}, []string{"[3 2 1 0]", "[3 2 1 0]", "[2]", "[3 2 1 0]"}},
		{"subset by priority", func(child Policy) Policy { return WithPriorities(subset(child)) }, nil, []string{"[3 2 1 0]", "[3 2 1 0]", "[3 2 1 0]", "[3 2 1 0]"}},
		{"hash", func(child Policy) Policy {
			return &RingHash{Hashing: Hashing{hashing: hashing{nested: nested{child}}}}
		}, nil, []string{"[3 2 1 0]", "[3 2 1 0]", "[3 2 1 0]", "[3 2 1 0]"}},
		{"sticky", func(child Policy) Policy {
			return &Sticky{nested: nested{child}, Cookie: "lb", minter: newMinter([]byte("s"))}
		}, nil, []string{"[3 2 1 0]", "[3 2 1 0]", "[3 2 1 0]", "[3 2 1 0]"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := &recorder{interval: 7 * time.Second}
			p := tt.policy(r)
			picker := p.Build(parted(4, tt.change))
			for i, owner := range tt.owners {
				r.told = nil
				pick := InterestIn(picker, i)
				if pick.Needs() != everything {
					t.Errorf("%d needs %+v", i, pick.Needs())
				}
				pick.Responded(time.Second)
				pick.Done(new(call.Attempt))
				if want := []string{fmt.Sprint(owner, " responded ", i), fmt.Sprint(owner, " done ", i)}; !slices.Equal(r.told, want) {
					t.Errorf("told %q, want %q", r.told, want)
				}
				var by string
				pick.Annotate(new(call.Call), func(name, value string) {
					if name == "by" {
						by += value
					}
				})
				if want := fmt.Sprint(owner, i); by != want {
					t.Errorf("annotated %q, want %q", by, want)
				}
			}
			if pick := InterestIn(picker, 17); pick != (Pick{Index: 17}) {
				t.Errorf("somebody is interested in an endpoint that is not there: %+v", pick)
			}
			r.told = nil
			p.(LoadReportReceiver).ReceiveLoadReport(nil, []byte("x"))
			if !slices.Equal(r.told, []string{"report x"}) {
				t.Errorf("told %q", r.told)
			}
			if d := p.(LoadReportReceiver).ReportInterval(); d != 7*time.Second {
				t.Errorf("report interval %v", d)
			}
			r.watch = true
			if !p.(HealthWatcher).WatchesHealth() {
				t.Error("the child watches health, the parent does not")
			}
		})
	}
}

// What a child cannot do, its parent does not offer, so that calls do not pay for it.
func TestNestedOffersNoMore(t *testing.T) {
	s := parted(4, func(e *upstream.Endpoint) { e.Priority = uint32(e.Index) })
	p := WithPriorities(new(Random))
	picker := p.Build(s)
	if pick, ok := picker.Pick(PickInfo{}); !ok || pick.Audience != nil || InterestIn(picker, pick.Index).Audience != nil {
		t.Errorf("%+v has an audience", pick)
	}
	if p.(LoadReportReceiver).ReportInterval() != 0 {
		t.Error("it asks for load reports")
	}
	p.(LoadReportReceiver).ReceiveLoadReport(nil, nil)
	if p := WithPriorities(new(Random)); p.(HealthWatcher).WatchesHealth() || p.Build(parted(4, nil)) == nil || p.(HealthWatcher).WatchesHealth() {
		t.Error("with one priority, it watches health")
	}
	if !p.(HealthWatcher).WatchesHealth() {
		t.Error("with four priorities, it does not watch health")
	}
}

func TestWithPrioritiesOnce(t *testing.T) {
	p := WithPriorities(new(Random))
	if WithPriorities(p) != p {
		t.Error("levels within levels")
	}
	// Sessions are bound before levels are chosen.
	s, ok := WithPriorities(&Cookie{stickyPolicy: stickyPolicy{nested{&Sticky{nested: nested{new(Random)}}}}}).(*Sticky)
	if !ok {
		t.Fatal("a sticky policy is no longer the outermost")
	}
	if _, ok := s.child.(*Priority); !ok {
		t.Errorf("the fallback is %T", s.child)
	}
}
