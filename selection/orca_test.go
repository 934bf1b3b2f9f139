package selection

import (
	"encoding/binary"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/orca"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// loadReport is an OrcaLoadReport with cpu_utilization, mem_utilization, rps_fractional and eps.
func loadReport(cpu, mem, qps, eps float64) []byte {
	var b []byte
	for _, f := range []struct {
		number byte
		x      float64
	}{{1, cpu}, {2, mem}, {6, qps}, {7, eps}} {
		b = binary.LittleEndian.AppendUint64(append(b, f.number<<3|1), math.Float64bits(f.x))
	}
	return b
}

func TestORCAWeight(t *testing.T) {
	for _, tt := range []struct {
		load          orca.Load
		penalty, want float64
	}{
		{orca.Load{Utilization: 0.5, QPS: 100}, 1, 200},
		{orca.Load{Utilization: 0.5, QPS: 100, EPS: 50}, 1, 100},
		{orca.Load{Utilization: 0.5, QPS: 100, EPS: 50}, 0, 200},
		{orca.Load{Utilization: 0.5, QPS: 100, EPS: 50}, 3, 50},
		{orca.Load{Utilization: 2, QPS: 100}, 1, 50},
		{orca.Load{QPS: 100, EPS: 50}, 1, 0},
		{orca.Load{Utilization: 0.5}, 1, 0},
		{orca.Load{Utilization: -0.5, QPS: 100}, 1, 0},
		{orca.Load{Utilization: 0.5, QPS: -100}, 1, 0},
		{orca.Load{Utilization: 0.5, QPS: 100, EPS: -50}, 1, 200},
		{orca.Load{Utilization: 0.5, QPS: math.Inf(1)}, 1, 0},
		{orca.Load{Utilization: math.Inf(1), QPS: 1}, 1, 0},
		{orca.Load{Utilization: math.NaN(), QPS: 1}, 1, 0},
		{orca.Load{Utilization: 0.5, QPS: 100, EPS: math.NaN()}, 1, 0},
	} {
		if got := weightOf(tt.load, tt.penalty); got != tt.want {
			t.Errorf("%+v, penalty %v: %v, want %v", tt.load, tt.penalty, got, tt.want)
		}
	}
}

func TestORCASchedule(t *testing.T) {
	for _, tt := range []struct {
		weights []float64
		want    []uint32
	}{
		{[]float64{0, 0, 0}, nil},
		{[]float64{5, 0, 0}, nil},
		{[]float64{5}, nil},
		{[]float64{1, 3}, []uint32{21845, 65535}},
		{[]float64{100, 300, 0}, []uint32{21845, 65535, 43690}}, // the mean
		{[]float64{7, 7}, []uint32{1, 1}},
		{[]float64{1e-300, 1e300}, []uint32{1, 65535}}, // nobody is left out
		{[]float64{1, 1, 0, 4}, []uint32{16384, 16384, 32768, 65535}},
	} {
		s := schedule(tt.weights)
		if s == nil {
			if tt.want != nil {
				t.Errorf("%v: round robin", tt.weights)
			}
			continue
		}
		var got []uint32
		for i := range tt.weights {
			got = append(got, s.weight(i))
		}
		for i, w := range tt.want {
			if uint64(got[i])*uint64(tt.want[0]) != uint64(w)*uint64(got[0]) {
				t.Errorf("%v: shares %v, want %v", tt.weights, got, tt.want)
				break
			}
		}
	}
}

// orcaBed is endpoints that report, seen through a picker, in a synctest bubble.
type orcaBed struct {
	t *testing.T
	s *upstream.Snapshot
	p *ORCA
	Picker
}

func newORCABed(t *testing.T, n int, p *ORCA) *orcaBed {
	t.Helper()
	if err := p.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	b := &orcaBed{t: t, p: p, s: snapshot(make([]int, n)...)}
	b.Picker = p.Build(b.s)
	return b
}

// report lets the endpoints report the queries per second, with half of their capacity in use, each 500 ms for some time.
func (b *orcaBed) report(d time.Duration, qps ...float64) {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		for i, q := range qps {
			b.done(i, 0.5, 0, q, 0)
		}
	}
}

// done tells the picker of an attempt that brought a report.
func (b *orcaBed) done(i int, cpu, mem, rps, eps float64) {
	InterestIn(b.Picker, i).Done(&call.Attempt{LoadReport: loadReport(cpu, mem, rps, eps)})
}

// shares are the parts in a hundred of picks that each endpoint gets, after the time in which turns are dealt anew.
func (b *orcaBed) shares() []int {
	b.t.Helper()
	time.Sleep(defaultWeightUpdate)
	b.Pick(PickInfo{})
	synctest.Wait()
	counts := make([]int, len(b.s.Endpoints))
	for range 10_000 {
		i, ok := pick(b.Picker, PickInfo{})
		if !ok {
			b.t.Fatal("nothing picked")
		}
		counts[i]++
	}
	for i := range counts {
		counts[i] = (counts[i] + 50) / 100
	}
	return counts
}

func (b *orcaBed) want(when string, want ...int) {
	b.t.Helper()
	for i, got := range b.shares() {
		if got < want[i]-1 || got > want[i]+1 {
			b.t.Errorf("%s: endpoint %d has %d %% of the calls, want %d", when, i, got, want[i])
		}
	}
}

func TestORCABlackout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newORCABed(t, 2, new(ORCA))
		b.want("nothing known", 50, 50)
		b.report(8*time.Second, 100, 300)
		b.want("in the blackout period", 50, 50)
		b.report(2*time.Second, 100, 300)
		b.want("after it", 25, 75)

		// A58: it "takes effect […] immediately after we establish a connection to an endpoint".
		b.s.Endpoints[1].State.SetConnected(time.Now())
		b.want("connected anew", 50, 50)
		b.report(8*time.Second, 100, 300)
		b.want("in the blackout period of the new connection", 50, 50)
		b.report(2*time.Second, 100, 300)
		b.want("after it", 25, 75)
		// An idle connection is closed; what is known stays known until the next one is made.
		b.s.Endpoints[1].State.SetConnected(time.Time{})
		b.want("without a connection", 25, 75)
	})
}

func TestORCANoBlackout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newORCABed(t, 2, &ORCA{BlackoutPeriod: -1})
		b.report(time.Millisecond, 100, 300)
		b.want("after one report", 25, 75)
	})
}

func TestORCAExpiration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newORCABed(t, 3, new(ORCA))
		b.report(12*time.Second, 100, 100, 400)
		b.want("all report", 17, 17, 67)
		time.Sleep(defaultExpiration - 10*time.Second)
		b.want("nobody does any more", 17, 17, 67)
		b.report(12*time.Second, 100, 100)
		b.want("the third has expired: the mean", 33, 33, 33)
		b.report(8*time.Second, 100, 100, 400)
		b.want("it reports again: blackout period", 33, 33, 33)
		b.report(4*time.Second, 100, 100, 400)
		b.want("after it", 17, 17, 67)
		time.Sleep(defaultExpiration)
		b.want("all have expired", 33, 33, 33)
	})
}

func TestORCAParameters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		two, none := 2.0, 0.0
		b := newORCABed(t, 2, &ORCA{BlackoutPeriod: -1, ErrorUtilizationPenalty: &two, MetricNames: []string{"mem_utilization"}})
		b.done(0, 0.1, 0.5, 100, 25) // 0.5 + 0.25×2 in use
		b.done(1, 0.9, 0.25, 100, 0)
		b.want("penalty 2, by memory", 20, 80)
		b = newORCABed(t, 2, &ORCA{BlackoutPeriod: -1, ErrorUtilizationPenalty: &none})
		b.done(0, 0.25, 0, 100, 100)
		b.done(1, 0.75, 0, 100, 0)
		b.want("no penalty", 75, 25)
		if got := InterestIn(b.Picker, 0).Needs(); got != (Needs{Attempts: true, LoadReports: true}) {
			t.Errorf("needs %+v", got)
		}
		b.p.ForwardReports = true
		if !InterestIn(b.p.Build(b.s), 0).Needs().ForwardLoadReports {
			t.Error("reports are not forwarded")
		}
	})
}

func TestORCAOutOfBand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if got := new(ORCA).ReportInterval(); got != 0 {
			t.Errorf("asked for reports each %v", got)
		}
		b := newORCABed(t, 2, &ORCA{BlackoutPeriod: -1, EnableOOBLoadReport: true})
		if got := b.p.ReportInterval(); got != 10*time.Second {
			t.Errorf("asked for reports each %v", got)
		}
		// A58: "While enable_oob_load_report is set, per-call load reports are never parsed".
		b.report(time.Millisecond, 100, 300)
		b.want("reports of calls", 50, 50)
		b.p.ReceiveLoadReport(b.s.Endpoints[0].State, loadReport(0.5, 0, 100, 0))
		b.p.ReceiveLoadReport(b.s.Endpoints[1].State, loadReport(0.5, 0, 300, 0))
		b.want("reports out of band", 25, 75)
		if got := InterestIn(b.Picker, 0).Needs(); got != (Needs{LoadReports: true}) {
			t.Errorf("needs %+v", got)
		}
	})
}

// Weights are used at once by the next picker, and no sooner than after the update period by the one there is.
func TestORCAUpdatePeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newORCABed(t, 2, &ORCA{BlackoutPeriod: -1, WeightUpdatePeriod: caddy.Duration(time.Minute)})
		b.report(time.Second, 100, 300)
		b.want("old picker", 50, 50)
		again := &orcaBed{t: t, p: b.p, s: b.s, Picker: b.p.Build(b.s)}
		again.want("new picker", 25, 75)
		time.Sleep(time.Minute)
		b.want("old picker, after a minute", 25, 75)
	})
}

func BenchmarkORCADone(b *testing.B) {
	p := new(ORCA)
	pick := InterestIn(p.Build(snapshot(0, 0, 0)), 1)
	a := &call.Attempt{LoadReport: loadReport(0.5, 0, 100, 0)}
	b.ReportAllocs()
	for b.Loop() {
		pick.Done(a)
	}
}

func BenchmarkORCADeal(b *testing.B) {
	const n = 10_000
	s := snapshot(make([]int, n)...)
	p := &ORCA{BlackoutPeriod: -1}
	l := p.Build(s).(*orcaPicker)
	for i := range n {
		l.Done(Pick{Index: i, Token: uint64(i)}, &call.Attempt{LoadReport: loadReport(0.5, 0, float64(1+i%100), 0)})
	}
	b.ReportAllocs()
	for b.Loop() {
		l.deal()
	}
}
