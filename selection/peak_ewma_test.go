package selection

import (
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func TestAverage(t *testing.T) {
	const decay, s = 10e9, int64(1e9)
	var a average
	a.set(100, 0)
	near := func(what string, got, want float64) {
		t.Helper()
		if math.Abs(got-want) > 1e-6*want+1e-9 {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	near("at once", a.at(0, decay), 100)
	near("after a decay time", a.at(10*s, decay), 100/math.E)
	a.add(50, 10*s, decay, true)
	near("a lower value", a.last(), 100/math.E+50*(1-1/math.E))
	a.add(200, 10*s, decay, true)
	near("a peak", a.last(), 200)
	a.add(300, 10*s, decay, false)
	near("no peak, no time", a.last(), 200)
	a.add(300, 20*s, decay, false)
	near("no peak", a.last(), 200/math.E+300*(1-1/math.E))
	near("before its time", a.at(0, decay), a.last())
	a.add(0, 10_000*s, decay, false)
	near("after a long time", a.last(), 0)
}

// server is a simulated endpoint.
type server struct {
	latency time.Duration
	code    grpcwire.Code
}

// simulate has so many callers call the servers, one call after the other, for some time, and returns how many calls each
// server got. It runs in a synctest bubble, in which that takes no time.
func simulate(t *testing.T, p Picker, s *upstream.Snapshot, servers []server, callers int, d time.Duration) []int64 {
	t.Helper()
	end := time.Now().Add(d)
	counts := make([]atomic.Int64, len(servers))
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for time.Now().Before(end) {
				pick, ok := p.Pick(PickInfo{})
				if !ok {
					t.Error("nothing picked")
					return
				}
				i := pick.Index
				counts[i].Add(1)
				oneCall(pick, servers[i], s.Endpoints[i].State)
				time.Sleep(time.Millisecond)
			}
		})
	}
	wg.Wait()
	all := make([]int64, len(servers))
	for i := range counts {
		all[i] = counts[i].Load()
	}
	return all
}

func oneCall(p Pick, e server, state *upstream.State) {
	a := &call.Attempt{Start: time.Now(), Latency: e.latency, Code: e.code, SentMessages: 1}
	state.Begin()
	time.Sleep(e.latency)
	if e.code == grpcwire.OK {
		a.ReceivedMessages = 1
	}
	p.Responded(e.latency)
	state.End()
	p.Done(a)
}

func TestPeakEWMAPrefersFastAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := snapshot(0, 0, 0)
		p := new(PeakEWMA).Build(s)
		servers := []server{{latency: 5 * time.Millisecond}, {latency: 5 * time.Millisecond}, {latency: 50 * time.Millisecond}}
		n := simulate(t, p, s, servers, 6, 30*time.Second)
		if fast, slow := n[0]+n[1], n[2]; slow*10 > fast || slow == 0 {
			t.Errorf("the slow endpoint got %d calls, the fast ones %d", slow, fast)
		}
		if 10*n[0] < 9*n[1] || 10*n[1] < 9*n[0] {
			t.Errorf("equal endpoints got %d and %d calls", n[0], n[1])
		}
		// It becomes as fast as the others. That must be found out, and soon it must have its share.
		servers[2].latency = 5 * time.Millisecond
		simulate(t, p, s, servers, 6, 30*time.Second)
		n = simulate(t, p, s, servers, 6, 10*time.Second)
		if 4*n[2] < 3*n[0] {
			t.Errorf("the endpoint that recovered got %d calls, another %d", n[2], n[0])
		}
	})
}

// An endpoint that fails at once answers sooner than any other, and must not get the calls for that.
func TestPeakEWMAAvoidsFailures(t *testing.T) {
	for _, code := range []grpcwire.Code{grpcwire.Unavailable, grpcwire.Unimplemented} {
		synctest.Test(t, func(t *testing.T) {
			const usual = 500 * time.Millisecond
			s := snapshot(0, 0, 0)
			p := new(PeakEWMA).Build(s)
			servers := []server{{latency: usual}, {latency: usual}, {latency: usual}}
			simulate(t, p, s, servers, 20, 30*time.Second)
			servers[2] = server{latency: 100 * time.Microsecond, code: code}
			// While another endpoint answers once, each caller could fail hundreds of times.
			n := simulate(t, p, s, servers, 20, 30*time.Second)
			if n[2] > n[0]+n[1] {
				t.Errorf("code %d: the endpoint that fails got %d calls, the others %d", code, n[2], n[0]+n[1])
			}
			n = simulate(t, p, s, servers, 20, 30*time.Second)
			if 10*n[2] > n[0]+n[1] {
				t.Errorf("code %d: later, the endpoint that fails got %d calls, the others %d", code, n[2], n[0]+n[1])
			}
			servers[2] = server{latency: usual}
			simulate(t, p, s, servers, 20, 2*time.Minute)
			n = simulate(t, p, s, servers, 20, 30*time.Second)
			if 3*n[2] < 2*n[0] {
				t.Errorf("code %d: the endpoint that recovered got %d calls, another %d", code, n[2], n[0])
			}
		})
	}
}

// Errors that callers make say nothing against the endpoint.
func TestPeakEWMAVerdicts(t *testing.T) {
	for _, tt := range []struct {
		name string
		a    call.Attempt
		want verdict
	}{
		{"OK", call.Attempt{}, success},
		{"not found", call.Attempt{Code: grpcwire.NotFound}, success},
		{"permission denied", call.Attempt{Code: grpcwire.PermissionDenied}, success},
		{"aborted", call.Attempt{Code: grpcwire.Aborted}, success},
		{"internal", call.Attempt{Code: grpcwire.Internal}, failure},
		{"mapped from HTTP 503", call.Attempt{Code: grpcwire.Unavailable, Source: call.SourceHTTP}, failure},
		{"connection broke", call.Attempt{Code: grpcwire.Canceled, Source: call.SourceProxy}, failure},
		{"client left", call.Attempt{Code: grpcwire.Canceled, EndedBy: call.EndedByClient, Source: call.SourceProxy}, undecided},
		{"proxy's limit", call.Attempt{Code: grpcwire.Unavailable, EndedBy: call.EndedByProxy, Source: call.SourceProxy}, undecided},
		{"deadline", call.Attempt{Code: grpcwire.DeadlineExceeded, EndedBy: call.EndedByDeadline, Source: call.SourceProxy}, failure},
		{"deadline of a stream", call.Attempt{Code: grpcwire.DeadlineExceeded, EndedBy: call.EndedByDeadline, ReceivedMessages: 3}, undecided},
	} {
		if got := failed(&tt.a); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// An endpoint that never answers is found out by those who give up on it.
func TestPeakEWMASilentEndpoint(t *testing.T) {
	for _, by := range []call.EndedBy{call.EndedByClient, call.EndedByDeadline} {
		synctest.Test(t, func(t *testing.T) {
			s := snapshot(0, 0)
			p := new(PeakEWMA).Build(s)
			InterestIn(p, 0).Responded(5 * time.Millisecond)
			InterestIn(p, 1).Responded(5 * time.Millisecond)
			InterestIn(p, 0).Done(&call.Attempt{Latency: 3 * time.Second, SentMessages: 1, EndedBy: by, Code: grpcwire.Canceled})
			for range 100 {
				if i, _ := pick(p, PickInfo{}); i != 1 {
					t.Fatal("picked the silent endpoint")
				}
			}
			// What a client stream was waiting for is not known; what has answered is not silent.
			InterestIn(p, 1).Done(&call.Attempt{Latency: time.Hour, SentMessages: 9, EndedBy: by, Code: grpcwire.Canceled, ReceivedMessages: 1})
			if i, _ := pick(p, PickInfo{}); i != 1 {
				t.Error("a stream that ended counts as silence")
			}
		})
	}
}

// An endpoint that was just added gets calls, but not all: that it has none in flight is not taken for speed.
func TestPeakEWMANewEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := snapshot(0, 0, 0)
		servers := []server{{latency: 20 * time.Millisecond}, {latency: 20 * time.Millisecond}, {latency: 20 * time.Millisecond}}
		simulate(t, new(PeakEWMA).Build(old), old, servers, 30, 20*time.Second)
		s := snapshot(0, 0, 0, 0)
		copy(s.Endpoints, old.Endpoints)
		servers = append(servers, server{latency: 20 * time.Millisecond})
		n := simulate(t, new(PeakEWMA).Build(s), s, servers, 30, time.Second)
		got, mean := n[3], (n[0]+n[1]+n[2])/3
		if 2*got < mean || got > 2*mean {
			t.Errorf("the new endpoint got %d calls, the others %d each", got, mean)
		}
	})
}

// Latencies are kept apart by decay time: another policy's numbers mean something else.
func TestPeakEWMAMemory(t *testing.T) {
	s := snapshot(0, 0)
	a := new(PeakEWMA).Build(s).(*peakEWMA)
	b := (&PeakEWMA{FailurePenalty: caddy.Duration(time.Second)}).Build(s).(*peakEWMA)
	c := (&PeakEWMA{Decay: caddy.Duration(time.Second)}).Build(s).(*peakEWMA)
	if a.known[1] != b.known[1] || a.known[1] == c.known[1] || a.known[0] == a.known[1] {
		t.Error("what is remembered is not found again, or another's is")
	}
}
