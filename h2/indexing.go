package h2

import "strings"

// How a field is written when it is not in a table yet.
const (
	indexAdd   = iota // literal with incremental indexing
	indexSkip         // literal without indexing: not worth a place in the table
	indexNever        // never indexed, here and by everyone behind us (RFC 7541 section 6.2.3)
)

// indexing decides whether a field gets a place in the dynamic table. The table is small (4 KiB, some 60 fields):
// what differs from call to call, or from client to client, would only push out what repeats.
func indexing(f Field) int {
	if f.Sensitive {
		return indexNever
	}
	switch f.Name {
	case "authorization", "proxy-authorization":
		// RFC 7541 section 7.1.3: a shared table would let one client probe for another's credentials.
		return indexNever
	case "cookie":
		if len(f.Value) < 20 { // the rule of nghttp2: short cookies can be guessed
			return indexNever
		}
	case ":path":
		if strings.IndexByte(f.Value, '?') >= 0 {
			return indexSkip
		}
	case "grpc-timeout", "traceparent", "tracestate", "x-request-id", "grpc-trace-bin", "grpc-tags-bin",
		"b3", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "uber-trace-id", "x-cloud-trace-context",
		"x-amzn-trace-id", "x-correlation-id", "x-datadog-trace-id", "x-datadog-parent-id",
		"x-forwarded-for", "x-real-ip", "forwarded", "x-envoy-upstream-service-time", "x-envoy-expected-rq-timeout-ms",
		"grpc-message", "grpc-status-details-bin", "endpoint-load-metrics-bin", "grpc-server-stats-bin",
		"content-length", "content-range", "range", "date", "age", "etag", "expires", "last-modified",
		"if-none-match", "if-match", "if-modified-since", "location", "set-cookie":
		return indexSkip
	}
	return indexAdd
}

// staticPair returns the index of a whole field of the static table (RFC 7541 appendix A), 0 if it is none.
func staticPair(name, value string) byte {
	switch name {
	case ":method":
		switch value {
		case "GET":
			return 2
		case "POST":
			return 3
		}
	case ":path":
		switch value {
		case "/":
			return 4
		case "/index.html":
			return 5
		}
	case ":scheme":
		switch value {
		case "http":
			return 6
		case "https":
			return 7
		}
	case ":status":
		switch value {
		case "200":
			return 8
		case "204":
			return 9
		case "206":
			return 10
		case "304":
			return 11
		case "400":
			return 12
		case "404":
			return 13
		case "500":
			return 14
		}
	case "accept-encoding":
		if value == "gzip, deflate" {
			return 16
		}
	}
	return 0
}

// staticNames has the first index of each name of the static table (RFC 7541 appendix A).
var staticNames = map[string]byte{
	":authority": 1, ":method": 2, ":path": 4, ":scheme": 6, ":status": 8, "accept-charset": 15,
	"accept-encoding": 16, "accept-language": 17, "accept-ranges": 18, "accept": 19,
	"access-control-allow-origin": 20, "age": 21, "allow": 22, "authorization": 23, "cache-control": 24,
	"content-disposition": 25, "content-encoding": 26, "content-language": 27, "content-length": 28,
	"content-location": 29, "content-range": 30, "content-type": 31, "cookie": 32, "date": 33, "etag": 34,
	"expect": 35, "expires": 36, "from": 37, "host": 38, "if-match": 39, "if-modified-since": 40,
	"if-none-match": 41, "if-range": 42, "if-unmodified-since": 43, "last-modified": 44, "link": 45, "location": 46,
	"max-forwards": 47, "proxy-authenticate": 48, "proxy-authorization": 49, "range": 50, "referer": 51,
	"refresh": 52, "retry-after": 53, "server": 54, "set-cookie": 55, "strict-transport-security": 56,
	"transfer-encoding": 57, "user-agent": 58, "vary": 59, "via": 60, "www-authenticate": 61,
}
