package selectiontest

import (
	"encoding/binary"
	"math"
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

// testLearningParallel picks and teaches at the same time. The race detector sees the rest.
func (s suite) testLearningParallel(t *testing.T) {
	const n = 4
	snap := Snapshot(n)
	policy := s.newPolicy()
	p := policy.Build(snap)
	l, ok := p.(selection.Learner)
	if !ok {
		t.Skip("it does not learn")
	}
	receiver, _ := policy.(selection.LoadReportReceiver)
	ways := attempts()
	var wg sync.WaitGroup
	for range workers() {
		wg.Go(func() {
			for k := range 3000 {
				i, ok := p.Pick(selection.PickInfo{})
				if !ok {
					t.Error("nothing picked")
					return
				}
				e := &snap.Endpoints[i]
				e.State.Begin()
				e.State.Work().Add(1, 100)
				if k%4 > 0 {
					l.Responded(i, time.Duration(k)*time.Microsecond)
				}
				e.State.End()
				l.Done(i, ways[k%len(ways)])
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
	for _, part := range []bool{false, true} {
		snap := Snapshot(3)
		if part {
			for i := range snap.Endpoints {
				snap.Endpoints[i].Index = 10 - i
			}
		}
		l, ok := s.newPolicy().Build(snap).(selection.Learner)
		if !ok {
			t.Skip("it does not learn")
		}
		index := snap.Endpoints[1].Index
		if got := testing.AllocsPerRun(200, func() { l.Responded(index, time.Millisecond) }); got != 0 {
			t.Errorf("Responded: %v allocations", got)
		}
		for _, a := range attempts() {
			if got := testing.AllocsPerRun(200, func() { l.Done(index, a) }); got != 0 {
				t.Errorf("Done(%+v): %v allocations", a, got)
			}
		}
	}
}

// testLearningOthers: a picker may be told of endpoints that it does not know: those that drain, which a session picked.
func (s suite) testLearningOthers(t *testing.T) {
	for _, indexes := range [][]int{nil, {0, 1}, {5, 3}} {
		snap := Snapshot(len(indexes))
		for place, index := range indexes {
			snap.Endpoints[place].Index = index
		}
		l, ok := s.newPolicy().Build(snap).(selection.Learner)
		if !ok {
			t.Skip("it does not learn")
		}
		for index := range 8 {
			l.Responded(index, time.Second)
			for _, a := range attempts() {
				l.Done(index, a)
			}
		}
		if _, ok := l.Pick(selection.PickInfo{}); ok != (len(indexes) > 0) {
			t.Errorf("endpoints %v: picked %v", indexes, ok)
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
		l, ok := policy.Build(snap).(selection.Learner)
		if !ok {
			t.Fatalf("%T does not learn", l)
		}
		receiver, _ := policy.(selection.LoadReportReceiver)
		for range 60_000 / 20 {
			for i := range snap.Endpoints {
				state := snap.Endpoints[i].State
				latency, bytes, report := 5*time.Millisecond, 1000, LoadReport(0.1, 100, 0)
				if i == slow {
					latency, bytes, report = 500*time.Millisecond, 100_000, LoadReport(0.9, 100, 0)
				}
				state.Work().Add(1, uint64(bytes))
				l.Responded(i, latency)
				l.Done(i, &call.Attempt{
					Start: time.Now().Add(-latency), Latency: latency,
					SentMessages: 1, ReceivedMessages: 1, LoadReport: report,
				})
				if receiver != nil && receiver.ReportInterval() > 0 {
					receiver.ReceiveLoadReport(state, report)
				}
			}
			l.Pick(selection.PickInfo{})
			time.Sleep(20 * time.Millisecond)
		}
		less := func(when string, p selection.Picker, slow int) {
			t.Helper()
			synctest.Wait()
			counts := make([]int, n)
			for range picks {
				if i, ok := p.Pick(selection.PickInfo{}); ok {
					counts[i]++
				}
			}
			for i, c := range counts {
				if i != slow && c < 2*counts[slow] {
					t.Errorf("%s: the slow endpoint %d was picked %d times, endpoint %d %d times", when, slow, counts[slow], i, c)
				}
			}
		}
		less("picker that learned", l, slow)

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
			if i, ok := p.Pick(selection.PickInfo{}); ok {
				counts[i]++
			}
		}
		if counts[1] < 2*counts[0] || counts[2] < 2*counts[0] {
			t.Errorf("picker built anew: the slow endpoint 0 was picked as often as others: %v", counts)
		}
	})
}
