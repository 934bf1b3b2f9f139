package selectiontest

import (
	"encoding/binary"
	"math"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// LoadReport makes an xds.data.orca.v3.OrcaLoadReport with cpu_utilization, rps_fractional and eps.
func LoadReport(cpu, rps, eps float64) []byte {
	var b []byte
	for tag, x := range map[byte]float64{1<<3 | 1: cpu, 6<<3 | 1: rps, 7<<3 | 1: eps} {
		b = binary.LittleEndian.AppendUint64(append(b, tag), math.Float64bits(x))
	}
	return b
}

// attempts are ways an attempt may go.
func attempts() []*call.Attempt {
	now := time.Now()
	return []*call.Attempt{
		{Start: now, Latency: time.Millisecond, SentMessages: 1, ReceivedMessages: 1, LoadReport: LoadReport(0.5, 100, 1)},
		{Start: now, Latency: time.Second, Code: grpcwire.Unavailable, Source: call.SourceProxy},
		{Start: now, Latency: time.Second, Code: grpcwire.Internal, LoadReport: LoadReport(0, 0, 0)},
		{Start: now, Latency: time.Minute, Code: grpcwire.Canceled, EndedBy: call.EndedByClient, LoadReport: []byte("no report")},
		{Start: now, Code: grpcwire.DeadlineExceeded, EndedBy: call.EndedByDeadline, LoadReport: LoadReport(math.NaN(), math.Inf(1), -1)},
		{Start: now, Latency: time.Microsecond, Code: grpcwire.NotFound},
	}
}

// learns tells whether the policy's pickers want to be told how attempts went.
func (s suite) learns() bool {
	pick, ok := s.newPolicy().Build(Snapshot(1)).Pick(selection.PickInfo{})
	return ok && (pick.Needs().Attempts || pick.Needs().FirstMessage)
}

// pickOnly picks the one of the endpoints, all others of which have been tried.
func pickOnly(t *testing.T, p selection.Picker, snap *upstream.Snapshot, place int) selection.Pick {
	t.Helper()
	var others []int
	for i := range snap.Endpoints {
		if i != place {
			others = append(others, snap.Endpoints[i].Index)
		}
	}
	pick, ok := p.Pick(selection.PickInfo{Tried: others})
	if !ok || pick.Index != snap.Endpoints[place].Index {
		t.Fatalf("picked %+v, %v; only %d is left", pick, ok, snap.Endpoints[place].Index)
	}
	return pick
}

// testLearningParallel picks and teaches at the same time. The race detector sees the rest.
func (s suite) testLearningParallel(t *testing.T) {
	const n = 4
	if !s.learns() {
		t.Skip("it does not learn")
	}
	snap := Snapshot(n)
	policy := s.newPolicy()
	p := policy.Build(snap)
	receiver, _ := policy.(selection.LoadReportReceiver)
	ways := attempts()
	var wg sync.WaitGroup
	for range workers() {
		wg.Go(func() {
			for k := range 3000 {
				pick, ok := p.Pick(selection.PickInfo{})
				if !ok {
					t.Error("nothing picked")
					return
				}
				e := &snap.Endpoints[pick.Index]
				e.State.Begin()
				e.State.Work().Add(1, 100)
				if k%4 > 0 {
					pick.Responded(time.Duration(k) * time.Microsecond)
				}
				e.State.End()
				pick.Done(ways[k%len(ways)])
				if receiver != nil && k%8 == 0 {
					receiver.ReceiveLoadReport(e.State, ways[k%len(ways)].LoadReport)
				}
				if k%1000 == 0 {
					policy.Build(snap)
				}
			}
		})
	}
	wg.Wait()
}

func (s suite) testLearningAllocations(t *testing.T) {
	if !s.learns() {
		t.Skip("it does not learn")
	}
	for _, part := range []bool{false, true} {
		snap := Snapshot(3)
		if part {
			for i := range snap.Endpoints {
				snap.Endpoints[i].Index = 10 - i
			}
		}
		p := s.newPolicy().Build(snap)
		for _, a := range attempts() {
			if got := testing.AllocsPerRun(200, func() {
				pick, _ := p.Pick(selection.PickInfo{})
				pick.Responded(time.Millisecond)
				pick.Done(a)
			}); got != 0 {
				t.Errorf("a pick and what it is told, %+v: %v allocations", a, got)
			}
		}
	}
}

// testLearningPart: a picker of a part knows whom its picks are about, by their tokens, and is told of some only when there is a
// newer picker. Whoever is interested in what others pick gets that in the same way.
func (s suite) testLearningPart(t *testing.T) {
	if !s.learns() {
		t.Skip("it does not learn")
	}
	policy := s.newPolicy()
	for _, indexes := range [][]int{{0, 1}, {5, 3}, {7}} {
		snap := Snapshot(len(indexes))
		for place, index := range indexes {
			snap.Endpoints[place].Index = index
		}
		p := policy.Build(snap)
		var picks []selection.Pick
		for place := range indexes {
			picks = append(picks, pickOnly(t, p, snap, place))
		}
		selection.Interests(p, func(pick selection.Pick) {
			if !slices.Contains(indexes, pick.Index) {
				t.Errorf("endpoints %v: interested in %d", indexes, pick.Index)
			}
			picks = append(picks, pick)
		})
		policy.Build(Snapshot(1))
		for _, pick := range picks {
			pick.Responded(time.Second)
			for _, a := range attempts() {
				pick.Done(a)
			}
		}
		if _, ok := p.Pick(selection.PickInfo{}); !ok {
			t.Errorf("endpoints %v: nothing is picked any more", indexes)
		}
	}
}

// testRemembers teaches a picker, in a time that is not real, that one endpoint is slow and busy.
func (s suite) testRemembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// Few picks: a policy may expect each of them to be work, which none of them is.
		const n, slow, picks = 4, 1, 200
		snap := Snapshot(n)
		policy := s.newPolicy()
		learned := policy.Build(snap)
		receiver, _ := policy.(selection.LoadReportReceiver)
		for range 60_000 / 20 {
			for i := range snap.Endpoints {
				state := snap.Endpoints[i].State
				latency, bytes, report := 5*time.Millisecond, 1000, LoadReport(0.1, 100, 0)
				if i == slow {
					latency, bytes, report = 500*time.Millisecond, 100_000, LoadReport(0.9, 100, 0)
				}
				state.Work().Add(1, uint64(bytes))
				pick := pickOnly(t, learned, snap, i)
				pick.Responded(latency)
				pick.Done(&call.Attempt{
					Start: time.Now().Add(-latency), Latency: latency,
					SentMessages: 1, ReceivedMessages: 1, LoadReport: report,
				})
				if receiver != nil && receiver.ReportInterval() > 0 {
					receiver.ReceiveLoadReport(state, report)
				}
			}
			learned.Pick(selection.PickInfo{})
			time.Sleep(20 * time.Millisecond)
		}
		less := func(when string, p selection.Picker, slow int) {
			t.Helper()
			synctest.Wait()
			counts := make([]int, n)
			for range picks {
				if i, ok := pick(p, selection.PickInfo{}); ok {
					counts[i]++
				}
			}
			for i, c := range counts {
				if i != slow && c < 2*counts[slow] {
					t.Errorf("%s: the slow endpoint %d was picked %d times, endpoint %d %d times", when, slow, counts[slow], i, c)
				}
			}
		}
		less("picker that learned", learned, slow)

		// One endpoint is replaced, and the slow one is now the first.
		moved := Snapshot(n)
		moved.Generation++
		states := []*upstream.State{snap.Endpoints[slow].State, snap.Endpoints[0].State, snap.Endpoints[2].State, new(upstream.State)}
		for i := range moved.Endpoints {
			moved.Endpoints[i].State = states[i]
		}
		p := s.newPolicy().Build(moved)
		counts := make([]int, n)
		for range picks {
			if i, ok := pick(p, selection.PickInfo{}); ok {
				counts[i]++
			}
		}
		if counts[1] < 2*counts[0] || counts[2] < 2*counts[0] {
			t.Errorf("picker built anew: the slow endpoint 0 was picked as often as others: %v", counts)
		}
	})
}
