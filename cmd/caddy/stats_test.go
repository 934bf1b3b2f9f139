package main

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

func TestQuantile(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[i] = time.Duration(i + 1)
	}
	for _, c := range []struct {
		sorted  []time.Duration
		percent int
		want    time.Duration
	}{
		{nil, 50, 0},
		{hundred[:1], 50, 1},
		{hundred[:1], 99, 1},
		{hundred[:2], 50, 1},
		{hundred[:3], 50, 2},
		{hundred, 50, 50},
		{hundred, 99, 99},
		{hundred, 100, 100},
		{hundred, 0, 1},
	} {
		if got := quantile(c.sorted, c.percent); got != c.want {
			t.Errorf("quantile(%d values, %d) = %d, want %d", len(c.sorted), c.percent, got, c.want)
		}
	}
}

// Percentiles are of the latest calls that ended OK, so they follow a change and ignore deadlines.
func TestTallyKeepsTheLatest(t *testing.T) {
	var sum tally
	for range latest + 10 {
		sum.add(codes.OK, time.Second)
	}
	sum.add(codes.DeadlineExceeded, time.Hour)
	if r := sum.row(); r.p50 != time.Second || r.p99 != time.Second {
		t.Errorf("p50 %s, p99 %s", r.p50, r.p99)
	}
	for range latest {
		sum.add(codes.OK, time.Millisecond)
	}
	r := sum.row()
	if r.p50 != time.Millisecond || r.p99 != time.Millisecond {
		t.Errorf("p50 %s, p99 %s", r.p50, r.p99)
	}
	if r.calls != 2*latest+11 || r.codes[codes.OK] != 2*latest+10 || r.codes[codes.DeadlineExceeded] != 1 {
		t.Errorf("%+v", r)
	}
}

// A report is a copy: later calls do not change it.
func TestReportStays(t *testing.T) {
	s := newStats([]*backend{{name: "b1"}})
	s.record(unary, "b1", codes.OK, 1)
	r := s.report()
	s.record(unary, "b1", codes.OK, 1)
	s.record(bidi, "", codes.Unavailable, 1)
	if r.all.codes[codes.OK] != 1 || r.backends[0].codes[codes.OK] != 1 || r.kinds[unary].codes[codes.OK] != 1 || r.unanswered.calls != 0 {
		t.Errorf("%+v", r)
	}
}

func TestKindNames(t *testing.T) {
	for k, want := range []string{"unary", "client-stream", "server-stream", "bidi", "unknown"} {
		if got := kind(k).String(); got != want {
			t.Errorf("%d is %q, want %q", k, got, want)
		}
	}
}
