package grpcproxy

import (
	"net/http"
	"strings"
	"sync"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
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

func lowerName(canonical string) string {
	if l, ok := lowerOf[canonical]; ok {
		return l
	}
	return strings.ToLower(canonical)
}

// hopByHop tells names that concern one connection only and never travel on (RFC 9110 section 7.6.1, and those that
// reverse_proxy takes away), as well as those that are set anew for the next hop.
func hopByHop(canonical string) bool {
	switch canonical {
	case "Connection", "Proxy-Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade", "Te", "Trailer", "Alt-Svc",
		"Proxy-Authenticate", "Proxy-Authorization", "Content-Length", "Host", "Http2-Settings", "Expect":
		return true
	}
	return false
}

// copyFields adds response fields to an http.Header, leaving out what belongs to one connection. Keys get the prefix.
// One array holds all values.
func copyFields(dst http.Header, prefix string, fields []h2.Field) {
	values := make([]string, 0, len(fields))
	for _, f := range fields {
		if strings.HasPrefix(f.Name, ":") {
			continue
		}
		key := canonicalName(f.Name)
		if hopByHop(key) {
			continue
		}
		key = prefix + key
		if have, ok := dst[key]; ok && have != nil {
			dst[key] = append(have, f.Value)
			continue
		}
		values = append(values, f.Value)
		n := len(values)
		dst[key] = values[n-1 : n : n]
	}
}

func fieldValue(fields []h2.Field, name string) (string, bool) {
	for i := range fields {
		if fields[i].Name == name {
			return fields[i].Value, true
		}
	}
	return "", false
}

// fieldLists are scratch space for building header blocks.
var fieldLists = sync.Pool{New: func() any { l := make([]h2.Field, 0, 32); return &l }}

func putFields(l *[]h2.Field) {
	if cap(*l) <= 256 {
		clear(*l) // do not keep callers' strings alive
		*l = (*l)[:0]
		fieldLists.Put(l)
	}
}
