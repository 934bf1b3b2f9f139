package healthcheck

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// max_fails within fail_duration, as reverse_proxy has it.
func TestMaxFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 1, &Passive{FailDuration: 10 * testSecond, MaxFails: 3, UnhealthyLatency: testSecond})
		defer g.close()
		s := g.states[0]
		slow := attemptOK
		slow.Latency = time.Second
		g.observe(0, 1, attemptFailed)
		after(4 * time.Second)
		g.observe(0, 1, attemptBroken)
		g.observe(0, 5, attemptOK)
		g.observe(0, 5, attemptCaller)
		after(5 * time.Second)
		if !s.Usable() {
			t.Fatal("unusable with two failures of three")
		}
		g.observe(0, 1, slow)
		if st := s.Status(); s.Usable() || st.Condition != upstream.ConditionEjected || st.Text != "3 failed calls within 10s" {
			t.Fatalf("usable %v, %+v", s.Usable(), st)
		}
		after(time.Second) // the first is 10 s old
		if !s.Usable() {
			t.Fatal("not usable, though the first failure is forgotten")
		}
		g.observe(0, 1, attemptFailed) // with those at 4 s and 9 s
		if s.Usable() {
			t.Fatal("usable with three failures")
		}
		after(3900 * time.Millisecond)
		if s.Usable() {
			t.Fatal("usable too soon")
		}
		after(200 * time.Millisecond)
		if !s.Usable() {
			t.Fatal("not usable again")
		}
		stream := slow
		stream.ReceivedMessages = 2
		g.observe(0, 9, stream)
		if !s.Usable() {
			t.Error("a long stream is taken for a slow call")
		}
	})
}

func TestRequestCount(t *testing.T) {
	g := newGroup(t, 1, &Passive{UnhealthyRequestCount: 2})
	s := g.states[0]
	s.Begin()
	s.Begin()
	if s.Usable() {
		t.Error("usable with as many calls as it may have")
	}
	s.End()
	if !s.Usable() {
		t.Error("not usable with one call less")
	}
	s.Begin()
	g.close()
	if !s.Usable() {
		t.Error("the limit outlives its handler")
	}
}

// Handlers that share an endpoint may have different limits; the lowest is in force, in whatever order they come and go.
func TestLowestLimit(t *testing.T) {
	s := new(upstream.State)
	join := func(limit int) (leave func()) {
		p := &Passive{UnhealthyRequestCount: limit}
		if err := p.Provision(caddy.Context{}); err != nil {
			t.Fatal(err)
		}
		return p.attend("a", s)
	}
	s.Begin()
	s.Begin()
	leaveTwo := join(2)
	leaveThree := join(3)
	if s.Usable() {
		t.Error("a higher limit takes the lower one's place")
	}
	leaveTwo()
	if !s.Usable() {
		t.Error("the lower limit stays")
	}
	leaveTwo = join(2)
	leaveThree()
	if s.Usable() {
		t.Error("the higher limit stays")
	}
	leaveTwo()
	if !s.Usable() {
		t.Error("a limit stays when nobody has one")
	}
}

func TestObserveConcurrently(t *testing.T) {
	g := newGroup(t, 4, &Passive{FailDuration: testSecond, MaxFails: 5, OutlierDetection: &OutlierDetection{Interval: 10 * ms, BaseEjectionTime: 1, MaxEjectionTime: 1, SuccessRate: new(SuccessRate), Latency: new(Latency)}})
	defer g.close()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 20_000 {
				s := g.states[(w+i)%4]
				trial, ok := s.TryBegin()
				if !ok {
					continue
				}
				a := attemptOK
				switch i / 7 % 3 {
				case 0:
					a = attemptFailed
				case 1:
					a = attemptBroken
				}
				s.End()
				g.p.Observe(s, &a, trial)
			}
		})
	}
	wg.Wait()
	for i, s := range g.states {
		if s.Active() != 0 {
			t.Errorf("endpoint %d: %d calls", i, s.Active())
		}
		if s.Has(upstream.OnTrial) {
			t.Errorf("endpoint %d: still on trial", i)
		}
	}
}

func TestObserveAllocates(t *testing.T) {
	g := newGroup(t, 1, &Passive{FailDuration: hour, MaxFails: 10_000, OutlierDetection: &OutlierDetection{ConsecutiveFailures: 1000, ConsecutiveLocalFailures: 1000, Latency: new(Latency)}})
	defer g.close()
	for _, a := range []call.Attempt{attemptOK, attemptFailed, attemptBroken, attemptGone} {
		if n := testing.AllocsPerRun(200, func() { g.p.Observe(g.states[0], &a, 0) }); n != 0 {
			t.Errorf("%+v: %v allocations", a, n)
		}
	}
}

func TestPassiveRefuses(t *testing.T) {
	for _, tc := range []struct {
		p    *Passive
		text string
	}{
		{&Passive{FailDuration: -1}, "fail_duration is -1ns"},
		{&Passive{MaxFails: 3}, "need fail_duration"},
		{&Passive{MaxFails: -3, FailDuration: 1}, "max_fails is -3"},
		{&Passive{UnhealthyLatency: 3}, "need fail_duration"},
		{&Passive{UnhealthyRequestCount: -1}, "unhealthy_request_count"},
		{&Passive{FailureCodes: []grpcwire.CodeText{"NOPE"}}, `"NOPE" is not a gRPC status code`},
		{&Passive{FailureCodes: []grpcwire.CodeText{"OK"}}, "OK is no failure"},
		{&Passive{OutlierDetection: &OutlierDetection{Interval: 1}}, "interval is 1ns"},
		{&Passive{OutlierDetection: &OutlierDetection{MaxEjectionPercent: 101}}, "max_ejection_percent is 101"},
		{&Passive{OutlierDetection: &OutlierDetection{FailurePercentage: &FailurePercentage{Threshold: 101}}}, "threshold is 101"},
		{&Passive{OutlierDetection: &OutlierDetection{SuccessRate: &SuccessRate{Enforcement: 101}}}, "success_rate"},
		{&Passive{OutlierDetection: &OutlierDetection{Latency: &Latency{Factor: 1}}}, "latency.factor"},
	} {
		if err := tc.p.Provision(caddy.Context{}); err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%+v: error %v, want %q in it", tc.p, err, tc.text)
		}
	}
}

func BenchmarkObserve(b *testing.B) {
	g := newGroup(b, 16, &Passive{FailDuration: hour, MaxFails: 10, OutlierDetection: &OutlierDetection{SuccessRate: new(SuccessRate), Latency: new(Latency)}})
	defer g.close()
	b.Run("good", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			g.p.Observe(g.states[0], &attemptOK, 0)
		}
	})
	b.Run("good/parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				g.p.Observe(g.states[1], &attemptOK, 0)
			}
		})
	})
	b.Run("caller", func(b *testing.B) {
		for b.Loop() {
			g.p.Observe(g.states[2], &attemptCaller, 0)
		}
	})
	b.Run("failed", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			g.p.Observe(g.states[3], &attemptFailed, 0)
		}
	})
}

// Handlers that share an endpoint let its ejections be forgotten once per interval, and not each on its own.
func TestSharedDecay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 1, &Passive{OutlierDetection: new(OutlierDetection)})
		defer g.close()
		other := &Passive{OutlierDetection: new(OutlierDetection)}
		if err := other.Provision(caddy.Context{}); err != nil {
			t.Fatal(err)
		}
		defer other.attend("10.0.0.1:1", g.states[0])()
		s := g.states[0]
		g.observe(0, 5, attemptFailed)
		after(30*time.Second + time.Millisecond)
		for _, a := range []call.Attempt{attemptFailed, attemptFailed, attemptOK} { // three ejections
			trial, _ := s.TryBegin()
			g.p.Observe(s, &a, trial)
			s.End()
			after(100 * time.Second)
		}
		// 100 s without an ejection: all are forgotten; three intervals of two handlers would have done too.
		r := recordOf(s)
		r.mu.Lock()
		r.ejections = 4
		r.mu.Unlock()
		after(20*time.Second + time.Millisecond)
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.ejections != 2 {
			t.Errorf("%d ejections are remembered after two intervals, want 2 of 4", r.ejections)
		}
	})
}
