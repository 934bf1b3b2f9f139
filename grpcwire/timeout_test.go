package grpcwire

import (
	"math"
	"strings"
	"testing"
	"time"
)

// timeouts are values that are read, and malformed ones (want < 0).
var timeouts = []struct {
	in   string
	want time.Duration
}{
	// "TimeoutUnit → Hour / Minute / Second / Millisecond / Microsecond / Nanosecond".
	{"1H", time.Hour},
	{"2M", 2 * time.Minute},
	{"3S", 3 * time.Second},
	{"4m", 4 * time.Millisecond},
	{"5u", 5 * time.Microsecond},
	{"6n", 6},
	// "at most 8 digits".
	{"99999999n", 99_999_999},
	{"99999999S", 99_999_999 * time.Second},
	{"00000001S", time.Second},
	{"99999999M", 99_999_999 * time.Minute},
	// More than a Duration holds.
	{"2562047H", 2_562_047 * time.Hour},
	{"2562048H", math.MaxInt64},
	{"99999999H", math.MaxInt64},
	{"0n", 0},
	{"0H", 0},
	{"", -1},
	{"1", -1},
	{"S", -1},
	{"n1", -1},
	{"123456789S", -1},
	{"000000001S", -1},
	{"1s", -1},
	{"1h", -1},
	{"1 S", -1},
	{" 1S", -1},
	{"1S ", -1},
	{"-1S", -1},
	{"+1S", -1},
	{"1.5S", -1},
	{"1_0S", -1},
	{"0x1S", -1},
	{"1ms", -1},
	{"infinite", -1},
	{"10SS", -1},
}

func TestParseTimeout(t *testing.T) {
	for _, tt := range timeouts {
		got, err := ParseTimeout(tt.in)
		switch {
		case tt.want < 0 && err == nil:
			t.Errorf("ParseTimeout(%q) = %v, want an error", tt.in, got)
		case tt.want < 0 && !strings.HasPrefix(err.Error(), "malformed grpc-timeout "):
			t.Errorf("ParseTimeout(%q): %v", tt.in, err)
		case tt.want >= 0 && (err != nil || got != tt.want):
			t.Errorf("ParseTimeout(%q) = %v, %v; want %v", tt.in, got, err, tt.want)
		}
	}
	if _, err := ParseTimeout(strings.Repeat("1", 1<<20)); err == nil || len(err.Error()) > 200 {
		t.Error("a huge value is repeated in the error")
	}
}

func TestFormatTimeout(t *testing.T) {
	tests := []struct {
		d    time.Duration
		want string
	}{
		{math.MinInt64, "0n"},
		{-1, "0n"},
		{0, "0n"},
		{1, "1n"},
		{99_999_999, "99999999n"},
		// One more digit: the next unit, rounded up.
		{100_000_000, "100000u"},
		{100_000_001, "100001u"},
		{time.Second, "1000000u"},
		{99_999_999 * time.Microsecond, "99999999u"},
		{99_999_999*time.Microsecond + 1, "100000m"},
		{100 * time.Second, "100000m"},
		{99_999_999 * time.Millisecond, "99999999m"},
		{99_999_999*time.Millisecond + 1, "100000S"},
		{99_999_999 * time.Second, "99999999S"},
		{99_999_999*time.Second + 1, "1666667M"},
		{99_999_999 * time.Minute, "99999999M"},
		{99_999_999*time.Minute + 1, "1666667H"},
		{math.MaxInt64, "2562048H"},
	}
	for _, tt := range tests {
		if got := FormatTimeout(tt.d); got != tt.want {
			t.Errorf("FormatTimeout(%d) = %q, want %q", tt.d, got, tt.want)
		}
		if got := string(AppendTimeout([]byte("x"), tt.d)); got != "x"+tt.want {
			t.Errorf("AppendTimeout(%d) = %q", tt.d, got)
		}
	}
}

// FuzzTimeout: parse(format(d)) is never shorter than d and less than one unit longer; what parses, formats to
// something that means no less.
func FuzzTimeout(f *testing.F) {
	for _, tt := range timeouts {
		f.Add(tt.in, int64(tt.want))
	}
	f.Fuzz(func(t *testing.T, s string, n int64) {
		ds := []time.Duration{time.Duration(n)}
		if d, err := ParseTimeout(s); err == nil {
			if d < 0 {
				t.Fatalf("ParseTimeout(%q) = %v", s, d)
			}
			ds = append(ds, d)
		}
		for _, d := range ds {
			v := FormatTimeout(d)
			got, err := ParseTimeout(v)
			if err != nil {
				t.Fatalf("%v is formatted as %q: %v", d, v, err)
			}
			d = max(d, 0)
			if unit := timeoutUnit(v[len(v)-1]); got < d || got-d >= unit {
				t.Errorf("%v came back as %v from %q", d, got, v)
			}
		}
	})
}

func BenchmarkParseTimeout(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseTimeout("4999872u"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppendTimeout(b *testing.B) {
	b.ReportAllocs()
	buf := make([]byte, 0, 16)
	for b.Loop() {
		buf = AppendTimeout(buf[:0], 4999872*time.Microsecond+5)
	}
}
