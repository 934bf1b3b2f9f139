package grpcwire

import (
	"fmt"
	"math"
	"strconv"
	"time"
)

// maxTimeoutValue is the largest number in a grpc-timeout. PROTOCOL-HTTP2: "TimeoutValue → {positive integer as ASCII
// string of at most 8 digits}".
const maxTimeoutValue = 99_999_999

// timeoutUnit is the duration of a TimeoutUnit, 0 for what is none. PROTOCOL-HTTP2: "TimeoutUnit → Hour / Minute /
// Second / Millisecond / Microsecond / Nanosecond", written H, M, S, m, u, n.
func timeoutUnit(c byte) time.Duration {
	switch c {
	case 'H':
		return time.Hour
	case 'M':
		return time.Minute
	case 'S':
		return time.Second
	case 'm':
		return time.Millisecond
	case 'u':
		return time.Microsecond
	case 'n':
		return time.Nanosecond
	}
	return 0
}

// ParseTimeout reads the value of a grpc-timeout field: one to eight digits and a unit. Hours beyond what a
// time.Duration holds (about 292 years) give the longest Duration. Zero is accepted, as in grpc-go, and means that
// the call has no time left. A call without the field has no deadline: "If Timeout is omitted a server should assume
// an infinite timeout" (PROTOCOL-HTTP2).
func ParseTimeout(v string) (time.Duration, error) {
	if len(v) < 2 || len(v) > 9 {
		return 0, fmt.Errorf("malformed grpc-timeout %q: want 1 to 8 digits and a unit", clip(v))
	}
	unit := timeoutUnit(v[len(v)-1])
	if unit == 0 {
		return 0, fmt.Errorf("malformed grpc-timeout %q: unit is none of H, M, S, m, u, n", v)
	}
	var n int64
	for i := range len(v) - 1 {
		d := v[i] - '0'
		if d > 9 {
			return 0, fmt.Errorf("malformed grpc-timeout %q: want 1 to 8 digits before the unit", v)
		}
		n = n*10 + int64(d)
	}
	if n > math.MaxInt64/int64(unit) {
		return math.MaxInt64, nil
	}
	return time.Duration(n) * unit, nil
}

// clip shortens a value that a client sent for use in an error.
func clip(v string) string {
	const limit = 32
	if len(v) <= limit {
		return v
	}
	return v[:limit] + "…"
}

// AppendTimeout appends d as the value of a grpc-timeout field: in the smallest unit that needs no more than eight
// digits, rounded up, so that what is read back is never shorter than d and less than one unit longer. Zero and less
// is 0n. These are grpc-go's choices; the protocol leaves them open.
func AppendTimeout(b []byte, d time.Duration) []byte {
	if d <= 0 {
		return append(b, '0', 'n')
	}
	for _, u := range "numSMH" {
		unit := timeoutUnit(byte(u))
		n := d / unit
		if d%unit != 0 { // Not (d+unit-1)/unit, which overflows near the end of the range.
			n++
		}
		// The longest Duration is 2,562,048 hours, so that the last round always ends here.
		if n <= maxTimeoutValue {
			b = strconv.AppendInt(b, int64(n), 10)
			return append(b, byte(u))
		}
	}
	panic("unreachable")
}

// FormatTimeout returns what AppendTimeout appends.
func FormatTimeout(d time.Duration) string {
	var buf [9]byte
	return string(AppendTimeout(buf[:0], d))
}
