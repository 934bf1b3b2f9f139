package grpcwire

import "testing"

func TestParseStatus(t *testing.T) {
	tests := []struct {
		in   string
		want Code
		ok   bool
	}{
		// "Status → "grpc-status" 1*DIGIT ; 0-9".
		{"0", 0, true},
		{"5", NotFound, true},
		{"16", Unauthenticated, true},
		{"00", 0, true},
		{"007", PermissionDenied, true},
		// Numbers above 16 are kept.
		{"17", 17, true},
		{"99", 99, true},
		{"2147483647", 1<<31 - 1, true},
		// Where grpc-go's client says "malformed grpc-status".
		{"2147483648", 0, false},
		{"4294967296", 0, false},
		{"18446744073709551616", 0, false},
		{"18446744073709551621", 0, false},
		{"", 0, false},
		{" 5", 0, false},
		{"5 ", 0, false},
		{"-1", 0, false},
		{"0x5", 0, false},
		{"1_0", 0, false},
		{"OK", 0, false},
		{"5,5", 0, false},
		// Where we are stricter than grpc-go (strconv.ParseInt takes a sign), by the grammar.
		{"+5", 0, false},
	}
	for _, tt := range tests {
		if got, ok := ParseStatus(tt.in); got != tt.want || ok != tt.ok {
			t.Errorf("ParseStatus(%q) = %d, %v; want %d, %v", tt.in, got, ok, tt.want, tt.ok)
		}
	}
	for c := range Code(100) {
		if got, ok := ParseStatus(string(AppendStatus(nil, c))); !ok || got != c {
			t.Errorf("%d came back as %d, %v", c, got, ok)
		}
	}
}

func TestHTTPStatus(t *testing.T) {
	// Envoy, source/common/grpc/status.cc, by code.
	want := []int{200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401}
	for c, status := range want {
		if got := Code(c).HTTPStatus(); got != status {
			t.Errorf("%v: HTTP %d, want %d", Code(c), got, status)
		}
	}
	for _, c := range []Code{17, 99, 1<<32 - 1} {
		if got := c.HTTPStatus(); got != 500 {
			t.Errorf("%v: HTTP %d, want 500", c, got)
		}
	}
}

func TestFromHTTPStatus(t *testing.T) {
	// doc/http-grpc-status-mapping.md, row by row.
	want := map[int]Code{
		400: Internal, 401: Unauthenticated, 403: PermissionDenied, 404: Unimplemented, 429: Unavailable,
		431: Internal, 502: Unavailable, 503: Unavailable, 504: Unavailable,
	}
	for status := -1; status < 1100; status++ {
		code, ok := want[status]
		if !ok {
			code = Unknown // "All other codes"; "200 is UNKNOWN because there should be a grpc-status".
		}
		if got := FromHTTPStatus(status); got != code {
			t.Errorf("HTTP %d: %v, want %v", status, got, code)
		}
	}
}

func TestFromHTTP2(t *testing.T) {
	tests := []struct {
		code uint32
		name string
		want Code
	}{
		// PROTOCOL-HTTP2, "The following mapping from RST_STREAM error codes to GRPC error codes is applied".
		{0x0, "NO_ERROR", Internal},
		{0x1, "PROTOCOL_ERROR", Internal},
		{0x2, "INTERNAL_ERROR", Internal},
		{0x3, "FLOW_CONTROL_ERROR", Internal}, // grpc-go: RESOURCE_EXHAUSTED.
		{0x4, "SETTINGS_TIMEOUT", Internal},
		{0x5, "STREAM_CLOSED", Internal}, // "No mapping"; as grpc-go.
		{0x6, "FRAME_SIZE_ERROR", Internal},
		{0x7, "REFUSED_STREAM", Unavailable},
		{0x8, "CANCEL", Canceled},
		{0x9, "COMPRESSION_ERROR", Internal},
		{0xa, "CONNECT_ERROR", Internal},
		{0xb, "ENHANCE_YOUR_CALM", ResourceExhausted},
		{0xc, "INADEQUATE_SECURITY", PermissionDenied},
		{0xd, "HTTP_1_1_REQUIRED", Internal}, // Not listed; as grpc-go.
		{0xe, "not defined", Unknown},
		{0xff, "not defined", Unknown},
		{1<<32 - 1, "not defined", Unknown},
	}
	for _, tt := range tests {
		if got := FromHTTP2(tt.code); got != tt.want {
			t.Errorf("%s (%#x): %v, want %v", tt.name, tt.code, got, tt.want)
		}
	}
}
