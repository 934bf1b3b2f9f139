package grpcproxy

import (
	"net/http"
	"net/url"
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
	if hopByHop(canonical) {
		return f
	}
	lower, known := lowerOf[canonical]
	if !known {
		if lower = strings.ToLower(canonical); !validName(lower) {
			return f
		}
	}
	for _, v := range values {
		f = append(f, h2.Field{Name: lower, Value: fieldText(v)})
	}
	return f
}

// validName tells names that RFC 9113 section 8.2.1 allows (tokens, of RFC 9110 section 5.6.2) from those that make a
// request malformed.
func validName(lower string) bool {
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

// pathField is what :path says (RFC 9113 section 8.3.1: path and query of the target). net/url makes the path fit to be sent,
// but leaves the query alone, in which clients and handlers in front may have put anything.
func pathField(u *url.URL) string {
	p := u.RequestURI()
	for i := range len(p) {
		if mustEscape(p, i) {
			return escapePath(p)
		}
	}
	return p
}

// mustEscape tells bytes that RFC 3986 allows in neither path nor query. Brackets are not among them, as in net/url.
func mustEscape(p string, i int) bool {
	switch c := p[i]; c {
	case '"', '#', '<', '>', '\\', '^', '`', '{', '|', '}':
		return true
	case '%':
		return i+2 >= len(p) || !isHex(p[i+1]) || !isHex(p[i+2])
	default:
		return c <= ' ' || c >= 0x7f
	}
}

func isHex(c byte) bool { return '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'f' }

func escapePath(p string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(p) {
		if c := p[i]; mustEscape(p, i) {
			b.Write([]byte{'%', hex[c>>4], hex[c&15]})
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// validAuthority tells what :authority can say (RFC 9113 section 8.3.1: host and port, without userinfo; RFC 3986 section 3.2)
// from what servers take for a malformed request.
func validAuthority(s string) bool {
	host, port, more := strings.Cut(s, ":")
	colons := false
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 0 || end+1 < len(s) && s[end+1] != ':' {
			return false
		}
		host, colons = s[1:end], true
		_, port, more = strings.Cut(s[end:], ":")
	}
	for i := range len(host) {
		switch c := host[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte("-._~!$&'()*+,;=%", c) >= 0, colons && c == ':':
		default:
			return false
		}
	}
	if more && strings.Trim(port, "0123456789") != "" {
		return false
	}
	return host != ""
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
