package web

import (
	"net/http"
	"slices"
	"strings"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
)

// names maps between the spelling of http.Header and HTTP/2's for the names that gRPC traffic is made of. Others are
// converted each time.
var (
	canonicalOf = map[string]string{}
	lowerOf     = map[string]string{}
)

func init() {
	for _, lower := range []string{
		"content-type", "user-agent", "grpc-accept-encoding", "grpc-encoding", "grpc-status", "grpc-message",
		"grpc-status-details-bin", "grpc-timeout", "grpc-previous-rpc-attempts", "grpc-trace-bin", "grpc-tags-bin",
		"traceparent", "tracestate", "baggage", "authorization", "date", "server", "accept-encoding", "te",
		"x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "via", "x-request-id", "content-length",
		"x-goog-request-params", "x-user-agent", "cookie",
	} {
		canonical := http.CanonicalHeaderKey(lower)
		canonicalOf[lower] = canonical
		lowerOf[canonical] = lower
	}
}

func canonicalName(lower string) string {
	if c, ok := canonicalOf[lower]; ok {
		return c
	}
	return http.CanonicalHeaderKey(lower)
}

// connectionOptions are the names that a client of HTTP/1 lists in Connection: they are for the proxy alone (RFC 9110
// section 7.6.1).
func connectionOptions(h http.Header) []string {
	var names []string
	for _, v := range h["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			names = append(names, http.CanonicalHeaderKey(strings.TrimSpace(name)))
		}
	}
	return names
}

// appendField adds a field's values to a header block, unless the field concerns one connection only or its name is none:
// names can be made up by handlers in front.
func appendField(f []h2.Field, canonical string, values []string) []h2.Field {
	lower, known := lowerOf[canonical]
	if !known {
		if lower = strings.ToLower(canonical); !ValidName(lower) {
			return f
		}
	}
	if proxy.HopByHop(lower) {
		return f
	}
	for _, v := range values {
		f = append(f, h2.Field{Name: lower, Value: fieldText(v)})
	}
	return f
}

// ValidName tells names that RFC 9113 section 8.2.1 allows (tokens, of RFC 9110 section 5.6.2) from those that make a
// request malformed.
func ValidName(lower string) bool {
	for i := range len(lower) {
		switch c := lower[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-':
		case strings.IndexByte("!#$%&'*+.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return lower != ""
}

// fieldText makes a value fit to be sent. Handlers in front can put anything into it, such as the decoded path, and a
// server may close the connection, with everybody's calls on it, for a malformed one. RFC 9110 section 5.5 lets a proxy
// replace control characters by blanks; RFC 9113 section 8.2.1 forbids blanks at the ends.
func fieldText(v string) string {
	var b []byte
	for i := range len(v) {
		if c := v[i]; c < ' ' && c != '\t' || c == 0x7f {
			if b == nil {
				b = []byte(v)
			}
			b[i] = ' '
		}
	}
	if b != nil {
		v = string(b)
	}
	return strings.Trim(v, " \t")
}

// copyFields adds response fields to an http.Header. Keys get the prefix. One array holds all values.
func copyFields(dst http.Header, prefix string, fields []h2.Field) {
	values := make([]string, 0, len(fields))
	for _, f := range fields {
		key := prefix + canonicalName(f.Name)
		if have, ok := dst[key]; ok && have != nil {
			if key == "Server" || key == "Date" {
				continue // of one value (RFC 9110): a handler in front has set it
			}
			dst[key] = append(have, f.Value)
			continue
		}
		values = append(values, f.Value)
		n := len(values)
		dst[key] = values[n-1 : n : n]
	}
}

// Header is fields as an http.Header.
func Header(fields []h2.Field) http.Header {
	h := make(http.Header, len(fields))
	copyFields(h, "", fields)
	return h
}

// Fields is an http.Header as fields, those that travel on, in the order of their names: maps have none, and the same call is to have
// the same header block each time.
func Fields(h http.Header) []h2.Field {
	fields := make([]h2.Field, 0, len(h))
	for name, values := range h {
		fields = appendField(fields, name, values)
	}
	sortFields(fields)
	return fields
}

// sortFields is stable: values of one name keep their order. Names that differ in case only are one.
func sortFields(fields []h2.Field) {
	slices.SortStableFunc(fields, func(a, b h2.Field) int { return strings.Compare(a.Name, b.Name) })
}
