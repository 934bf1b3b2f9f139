package grpcwire

import (
	"math"
	"net/http"
	"strconv"
)

// ParseStatus reads the value of a grpc-status field. It is false for anything but decimal digits that make a number
// below 2^31, which is where grpc-go's client stops too; such an answer counts as UNKNOWN, "malformed grpc-status".
// Numbers above 16 are kept as they are.
//
// PROTOCOL-HTTP2: "Status → "grpc-status" 1*DIGIT ; 0-9".
func ParseStatus(v string) (Code, bool) {
	if v == "" {
		return 0, false
	}
	var n uint64
	for i := range len(v) {
		d := v[i] - '0'
		if d > 9 {
			return 0, false
		}
		n = n*10 + uint64(d)
		if n > math.MaxInt32 {
			return 0, false
		}
	}
	return Code(n), true
}

// AppendStatus appends the value of a grpc-status field.
func AppendStatus(b []byte, c Code) []byte { return strconv.AppendUint(b, uint64(c), 10) }

// HTTPStatus is the HTTP status that says about the same as c: for access logs, for JSON and for other readers that
// know HTTP only. A gRPC answer itself always has HTTP status 200. Codes that are not assigned give 500.
//
// The table is Envoy's (source/common/grpc/status.cc), where CANCELLED is nginx's 499 "client closed request".
func (c Code) HTTPStatus() int {
	switch c {
	case OK:
		return 200
	case InvalidArgument, FailedPrecondition, OutOfRange:
		return 400
	case Unauthenticated:
		return 401
	case PermissionDenied:
		return 403
	case NotFound:
		return 404
	case AlreadyExists, Aborted:
		return 409
	case ResourceExhausted:
		return 429
	case Canceled:
		return 499
	case Unimplemented:
		return 501
	case Unavailable:
		return 503
	case DeadlineExceeded:
		return 504
	default: // UNKNOWN, INTERNAL, DATA_LOSS
		return 500
	}
}

// FromHTTPStatus is the code of an answer that carries no grpc-status at all, by its final HTTP status: something that
// does not speak gRPC answered, such as a proxy or a wrong port. Informational (1xx) answers are not final; the caller
// skips them.
//
// The table is doc/http-grpc-status-mapping.md: "This table is to be used only for clients that received a response
// that did not include grpc-status". "All other codes → UNKNOWN", which includes 200. 431 was added to it later.
func FromHTTPStatus(status int) Code {
	switch status {
	case 400, 431:
		return Internal
	case 401:
		return Unauthenticated
	case 403:
		return PermissionDenied
	case 404:
		return Unimplemented
	case 429, 502, 503, 504:
		return Unavailable
	default:
		return Unknown
	}
}

// HTTP/2 error codes (RFC 9113 section 7), as far as the map below tells them apart.
const (
	http2EnhanceYourCalm    = 0xb
	http2InadequateSecurity = 0xc
	http2HTTP11Required     = 0xd
	http2RefusedStream      = 0x7
	http2Cancel             = 0x8
)

// FromHTTP2 is the code of a stream that ended with RST_STREAM or GOAWAY carrying the HTTP/2 error code (RFC 9113
// section 7) and without a grpc-status.
//
// The table is that of PROTOCOL-HTTP2, "HTTP2 Transport Mapping, Errors". Where that is silent, STREAM_CLOSED (in it
// without a code) and HTTP_1_1_REQUIRED (not in it) are INTERNAL as in grpc-go, and codes that RFC 9113 does not
// define are UNKNOWN. CANCEL is CANCELLED; a caller whose own deadline has passed reports DEADLINE_EXCEEDED instead.
func FromHTTP2(code uint32) Code {
	switch code {
	case http2RefusedStream:
		return Unavailable
	case http2Cancel:
		return Canceled
	case http2EnhanceYourCalm:
		return ResourceExhausted
	case http2InadequateSecurity:
		return PermissionDenied
	}
	if code <= http2HTTP11Required {
		return Internal
	}
	return Unknown
}

// HTTPStatusText names an HTTP status: "Bad Gateway". It is empty for one that has no name.
func HTTPStatusText(status int) string { return http.StatusText(status) }
