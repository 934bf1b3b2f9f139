package main

import (
	"math"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
)

func TestTable(t *testing.T) {
	backends := []*backend{{name: "b1", port: 40001}, {name: "b2", port: 40002, delay: 25 * time.Millisecond}}
	s := newStats(backends)
	for range 3 {
		s.record(unary, "b1", codes.OK, 1500*time.Microsecond)
	}
	s.record(unary, "b2", codes.NotFound, time.Millisecond)
	s.record(serverStream, "b2", codes.DeadlineExceeded, 100*time.Millisecond)
	s.record(bidi, "b2", codes.OK, 26*time.Millisecond)
	s.record(bidi, "", codes.Unavailable, time.Millisecond)
	s.record(bidi, "", codes.Canceled, time.Millisecond)
	want := strings.TrimPrefix(`
 BACKEND          CALLS  SHARE            P50    P99      OK NOT_FOUND DEADLINE
 b1 :40001            3   38% ###       1.5ms  1.5ms       3         0        0
 b2 :40002 slow       3   38% ###        26ms   26ms       1         1        1
 unanswered           2   25% ##            -      -       0         0        0
 all                  8  100% ######### 1.5ms   26ms       4         1        1

 RPC KIND         CALLS  SHARE            P50    P99      OK NOT_FOUND DEADLINE
 unary                4   50% #####     1.5ms  1.5ms       3         1        0
 client-stream        0    0%               -      -       0         0        0
 server-stream        1   12% #             -      -       0         0        1
 bidi                 3   38% ###        26ms   26ms       1         0        0
 other statuses: CANCELLED 1, UNAVAILABLE 1
`, "\n")
	if got := strings.Join(tableOf(s.report(), backends), "\n") + "\n"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// Whatever is counted, cells stay apart and lines within 79 characters.
func TestTableWidth(t *testing.T) {
	var backends []*backend
	var r report
	for _, n := range []int64{0, 999, 1000, 999_999, 1_000_000, 999_994_999, 999_995_000, 999_000_000_000} {
		backends = append(backends, &backend{name: "b1", port: 65535, delay: 1})
		r.backends = append(r.backends, row{calls: n, p50: 9949 * time.Microsecond, p99: 999 * time.Second, codes: map[codes.Code]int64{
			codes.OK: n, codes.NotFound: n, codes.DeadlineExceeded: n,
		}})
	}
	r.all.calls = 999_000_000_000
	r.all.codes = map[codes.Code]int64{}
	for c := codes.Code(0); c <= codes.Unauthenticated; c++ {
		r.all.codes[c] = 999_999
	}
	for _, line := range tableOf(r, backends) {
		if n := utf8.RuneCountInString(line); n > columns {
			t.Errorf("%d characters: %q", n, line)
		}
		if strings.HasPrefix(line, " b1") && len(strings.Fields(strings.ReplaceAll(line, "#", ""))) != 10 {
			t.Errorf("cells run together: %q", line)
		}
	}
}

func TestTableWithoutCalls(t *testing.T) {
	backends := []*backend{{name: "b1", port: 1}}
	for _, line := range tableOf(newStats(backends).report(), backends) {
		if strings.Contains(line, "NaN") || strings.Contains(line, "#") {
			t.Errorf("%q", line)
		}
	}
}

func TestCount(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0", 999: "999", 1000: "1,000", 1007: "1,007", 999_999: "999,999", 1_000_000: "1.00M",
		1_234_567: "1.23M", 999_994_999: "999.99M", 999_999_999: "1.00G",
	} {
		if got := count(n); got != want {
			t.Errorf("count(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestMillis(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "-", 40 * time.Microsecond: "0.0ms", 1260 * time.Microsecond: "1.3ms", 9949 * time.Microsecond: "9.9ms",
		9960 * time.Microsecond: "10ms", 26 * time.Millisecond: "26ms", 999_600 * time.Microsecond: "1.0s", 10 * time.Second: "10.0s",
	} {
		if got := millis(d); got != want {
			t.Errorf("millis(%s) = %q, want %q", d, got, want)
		}
	}
}

func TestCodeName(t *testing.T) {
	for code, want := range map[codes.Code]string{
		codes.OK: "OK", codes.Canceled: "CANCELLED", codes.Unknown: "UNKNOWN", codes.DeadlineExceeded: "DEADLINE_EXCEEDED",
		codes.NotFound: "NOT_FOUND", codes.DataLoss: "DATA_LOSS", codes.Unavailable: "UNAVAILABLE", codes.Code(99): "CODE(99)",
	} {
		if got := codeName(code); got != want {
			t.Errorf("codeName(%d) = %q, want %q", code, got, want)
		}
	}
}

func TestClip(t *testing.T) {
	for _, c := range []struct {
		text  string
		width int
		want  string
	}{{"abc", 3, "abc"}, {"abcd", 3, "abc"}, {"äöü", 2, "äö"}, {"abc", -1, ""}} {
		if got := clip(c.text, c.width); got != c.want {
			t.Errorf("clip(%q, %d) = %q, want %q", c.text, c.width, got, c.want)
		}
	}
}

func TestPerSecond(t *testing.T) {
	v := view{elapsed: 2 * time.Second}
	v.report.all.calls = 500
	if got := perSecond(v); got != 250 {
		t.Errorf("got %g", got)
	}
	v.elapsed = 0
	if got := perSecond(v); math.IsInf(got, 0) || math.IsNaN(got) {
		t.Errorf("got %g for no time", got)
	}
}
