package orca_test

import (
	"math"
	"strings"
	"testing"

	v3orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	"google.golang.org/protobuf/proto"

	"github.com/caddygrpc/caddy-grpc-proxy/orca"
)

func marshal(t testing.TB, r *v3orcapb.OrcaLoadReport) []byte {
	t.Helper()
	b, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var metricNames = []string{"mem_utilization", "named_metrics.a.b", "utilization.x", "named_metrics.x"}

// utilization is the pseudocode of gRFC A114, "Weight Calculation Logic", for metricNames.
func utilization(r *v3orcapb.OrcaLoadReport) float64 {
	if r.ApplicationUtilization > 0 {
		return r.ApplicationUtilization
	}
	best := 0.0
	for _, x := range []float64{r.MemUtilization, r.NamedMetrics["a.b"], r.Utilization["x"], r.NamedMetrics["x"]} {
		if x > best && !math.IsNaN(x) && !math.IsInf(x, 0) {
			best = x
		}
	}
	if best > 0 {
		return best
	}
	return r.CpuUtilization
}

func TestRead(t *testing.T) {
	plain, err := orca.NewMetrics(nil)
	if err != nil {
		t.Fatal(err)
	}
	named, err := orca.NewMetrics(metricNames)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name         string
		r            *v3orcapb.OrcaLoadReport
		plain, named float64
	}{
		{"empty", &v3orcapb.OrcaLoadReport{}, 0, 0},
		{"cpu", &v3orcapb.OrcaLoadReport{CpuUtilization: 0.3}, 0.3, 0.3},
		{"application", &v3orcapb.OrcaLoadReport{CpuUtilization: 0.3, ApplicationUtilization: 1.5, MemUtilization: 2}, 1.5, 1.5},
		{"memory", &v3orcapb.OrcaLoadReport{CpuUtilization: 0.3, MemUtilization: 0.2}, 0.3, 0.2},
		{"the highest", &v3orcapb.OrcaLoadReport{
			CpuUtilization: 0.9, MemUtilization: 0.2,
			NamedMetrics: map[string]float64{"a.b": 0.4, "a": 9, "x": 0.1}, Utilization: map[string]float64{"x": 0.5, "a.b": 9},
			RequestCost: map[string]float64{"x": 9},
		}, 0.9, 0.5},
		{"nothing positive", &v3orcapb.OrcaLoadReport{
			CpuUtilization: 0.9, ApplicationUtilization: -1, MemUtilization: math.NaN(),
			NamedMetrics: map[string]float64{"a.b": math.Inf(1), "x": -2},
		}, 0.9, 0.9},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.r.RpsFractional, tt.r.Eps = 12.5, 0.5
			b := marshal(t, tt.r)
			for _, c := range []struct {
				m    *orca.Metrics
				want float64
			}{{&plain, tt.plain}, {&named, tt.named}} {
				got, err := c.m.Read(b)
				if want := (orca.Load{Utilization: c.want, QPS: 12.5, EPS: 0.5}); err != nil || got != want {
					t.Errorf("%+v, %v; want %+v", got, err, want)
				}
			}
			if got := testing.AllocsPerRun(100, func() { _, _ = named.Read(b) }); got != 0 {
				t.Errorf("%v allocations", got)
			}
		})
	}
}

func TestMetricNames(t *testing.T) {
	for _, tt := range []struct {
		names []string
		want  string
	}{
		{[]string{"cpu"}, `"cpu" is not the name of a utilization; write cpu_utilization, `},
		{[]string{"cpu_utilization", "rps"}, `"rps" is not`},
		{[]string{"named_metrics."}, `"named_metrics." is not`},
		{[]string{"request_cost.x"}, `"request_cost.x" is not`},
		{[]string{"cpu_utilization.x"}, `"cpu_utilization.x" is not`},
		{[]string{""}, `"" is not`},
		{[]string{"mem_utilization", "mem_utilization"}, `"mem_utilization" is given twice`},
		{strings.Fields(strings.Repeat("mem_utilization ", 17)), "17 names are too many"},
	} {
		if _, err := orca.NewMetrics(tt.names); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, want %q", tt.names, err, tt.want)
		}
	}
}

// FuzzRead reads what the generated code reads, and the same.
func FuzzRead(f *testing.F) {
	f.Add(marshal(f, &v3orcapb.OrcaLoadReport{
		CpuUtilization: 0.5, MemUtilization: 0.1, RpsFractional: 3.5, Eps: 1, ApplicationUtilization: 0.7,
		NamedMetrics: map[string]float64{"a.b": 1, "x": 2}, Utilization: map[string]float64{"x": 0.25}, RequestCost: map[string]float64{"c": 1},
	}))
	f.Add(marshal(f, &v3orcapb.OrcaLoadReport{NamedMetrics: map[string]float64{"a.b": math.NaN()}}))
	f.Add([]byte{0x2a, 0x03, 0x0a, 0x01, 'x', 0x42, 0x00})
	f.Add([]byte{0x09, 1, 2})
	f.Add([]byte{0x0b, 0x0c})
	m, err := orca.NewMetrics(metricNames)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := m.Read(b)
		var r v3orcapb.OrcaLoadReport
		if proto.Unmarshal(b, &r) != nil {
			return // It checks more: text and what we do not look at.
		}
		if err != nil {
			t.Fatalf("%v, but it is a report: %v", err, &r)
		}
		same := func(x, y float64) bool { return x == y || math.IsNaN(x) && math.IsNaN(y) }
		if !same(got.Utilization, utilization(&r)) || !same(got.QPS, r.RpsFractional) || !same(got.EPS, r.Eps) {
			t.Fatalf("%+v, want utilization %v of %v", got, utilization(&r), &r)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	m, err := orca.NewMetrics([]string{"named_metrics.queue"})
	if err != nil {
		b.Fatal(err)
	}
	report := marshal(b, &v3orcapb.OrcaLoadReport{
		CpuUtilization: 0.5, MemUtilization: 0.1, RpsFractional: 100, NamedMetrics: map[string]float64{"queue": 0.4, "other": 1},
	})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := m.Read(report); err != nil {
			b.Fatal(err)
		}
	}
}
