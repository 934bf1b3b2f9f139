package h2

import "strings"

// headInfo is what the engine itself reads from a header block.
type headInfo struct {
	status    int   // client role: of :status, 0 without
	length    int64 // content-length, -1 without
	head      bool  // server role: :method is HEAD
	crumbs    int   // cookie fields
	strict    bool  // server role: no control characters in values
	malformed string
}

// nameBytes has the bytes a field name may have: those of an HTTP token without upper case (RFC 9113 section 8.2.1).
var nameBytes = func() (t [256]bool) {
	for c := 'a'; c <= 'z'; c++ {
		t[c] = true
	}
	for _, c := range "0123456789!#$%&'*+-.^_`|~" {
		t[c] = true
	}
	return t
}()

func validName(s string) bool {
	if s == "" {
		return false
	}
	for i := range len(s) {
		if !nameBytes[s[i]] {
			return false
		}
	}
	return true
}

// trimValue takes blanks off both ends of a field's value.
//
// RFC 9113 section 8.2.1: "A field value MUST NOT start or end with an ASCII whitespace character", and a message that has one
// is malformed. But they carry no meaning (RFC 9110 section 5.5: they are excluded before a value is evaluated), and are sent all
// the same: grpc-go writes the status message "no such user: " as it is. Were that refused, whoever makes a service echo a blank
// would make its answer look like a fault of the upstream. So they are taken off what comes and what goes, as HTTP/1.1 does.
func trimValue(s string) string {
	if n := len(s); n == 0 || s[0] > ' ' && s[n-1] > ' ' {
		return s
	}
	return trimBlanks(s)
}

func trimBlanks(s string) string {
	for len(s) > 0 && blank(s[0]) {
		s = s[1:]
	}
	for len(s) > 0 && blank(s[len(s)-1]) {
		s = s[:len(s)-1]
	}
	return s
}

func blank(c byte) bool { return c == ' ' || c == '\t' }

// validValue: RFC 9113 section 8.2.1 forbids NUL, LF and CR. RFC 9110 section 5.5 has no other control character in values
// either, but "recipients MAY retain such characters for the sake of robustness": of clients they are not taken (strict), as
// Go's server does not; an upstream is ours.
func validValue(s string, strict bool) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= ' ' && c != 0x7f || c == '\t':
		case strict || c == 0 || c == '\n' || c == '\r':
			return false
		}
	}
	return true
}

// connectionSpecific names what RFC 9113 section 8.2.2 forbids in every message.
func connectionSpecific(name string) bool {
	switch name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return true
	}
	return false
}

// regular checks one field that is not a pseudo-header, takes blanks off its value, and returns what is wrong with it.
func (h *headInfo) regular(f *Field) string {
	if !validName(f.Name) {
		return "field name with a forbidden character"
	}
	if v := trimValue(f.Value); len(v) < len(f.Value) {
		f.Value = v
	}
	if !validValue(f.Value, h.strict) {
		return "field value with a forbidden character"
	}
	switch len(f.Name) {
	case 6:
		if f.Name == "cookie" {
			h.crumbs++
		}
	case 2:
		if f.Name == "te" && f.Value != "trailers" && !strings.EqualFold(f.Value, "trailers") {
			return "te other than trailers"
		}
	case 7, 10, 16, 17:
		if connectionSpecific(f.Name) {
			return "connection-specific field"
		}
	case 14:
		if f.Name == "content-length" {
			n := parseLength(f.Value)
			if n < 0 || h.length >= 0 && n != h.length {
				return "invalid content-length"
			}
			h.length = n
		}
	}
	return ""
}

// checkRequest validates a request head (RFC 9113 sections 8.2, 8.3.1, 8.5).
func checkRequest(fields []Field) headInfo {
	h := headInfo{length: -1, strict: true}
	var method, scheme, path, authority, host string
	var seen uint8
	once := func(bit uint8) bool {
		dup := seen&bit != 0
		seen |= bit
		return !dup
	}
	const mMethod, mScheme, mPath, mAuthority, mHost, mRegular = 1, 2, 4, 8, 16, 32
	for i := range fields {
		f := &fields[i]
		if !strings.HasPrefix(f.Name, ":") {
			seen |= mRegular
			if bad := h.regular(f); bad != "" {
				h.malformed = bad
				return h
			}
			if f.Name == "host" {
				if !once(mHost) && f.Value != host {
					h.malformed = "two different host fields"
					return h
				}
				if f.Value != "" && !validAuthority(f.Value) { // RFC 9110 section 7.2: it is empty where there is no authority
					h.malformed = "host that is none"
					return h
				}
				host = f.Value
			}
			continue
		}
		ok := seen&mRegular == 0
		switch f.Name {
		case ":method":
			ok = ok && once(mMethod) && validMethod(f.Value)
			method = f.Value
		case ":scheme":
			ok = ok && once(mScheme) && validScheme(f.Value)
			scheme = f.Value
		case ":path":
			ok = ok && once(mPath) && validPath(f.Value)
			path = f.Value
		case ":authority":
			ok = ok && once(mAuthority) && validAuthority(f.Value)
			authority = f.Value
		default:
			ok = false
		}
		if !ok {
			h.malformed = "pseudo-header field out of place, repeated, unknown or invalid"
			return h
		}
	}
	h.head = method == "HEAD"
	switch {
	case method == "":
		h.malformed = "no :method"
	case method == "CONNECT":
		if seen&(mScheme|mPath) != 0 || !hasPort(authority) { // RFC 9113 section 8.5
			h.malformed = "CONNECT with :scheme or :path, or without the host and the port to connect to"
		}
	case scheme == "" || path == "":
		h.malformed = "no :scheme or no :path"
	case path[0] != '/' && (path != "*" || method != "OPTIONS"):
		// RFC 9113 section 8.3.1: the path starts with "/", but for an OPTIONS request that has none.
		h.malformed = ":path that does not begin with a slash"
	case seen&mAuthority != 0 && seen&mHost != 0 && host != authority && !strings.EqualFold(host, authority):
		// RFC 9113 section 8.3.1 lets a server treat it as malformed; routing and strict SNI depend on one name.
		h.malformed = "host differs from :authority"
	}
	return h
}

// checkResponse validates an informational or final response head (RFC 9113 section 8.3.2). A missing :status is let
// through: gRPC maps it to a status of its own.
func checkResponse(fields []Field) headInfo {
	h := headInfo{length: -1}
	for i := range fields {
		f := &fields[i]
		if !strings.HasPrefix(f.Name, ":") {
			if bad := h.regular(f); bad != "" {
				h.malformed = bad
				return h
			}
			continue
		}
		v := f.Value
		if i != 0 || f.Name != ":status" || len(v) != 3 ||
			v[0] < '1' || v[0] > '9' || v[1] < '0' || v[1] > '9' || v[2] < '0' || v[2] > '9' {
			h.malformed = "pseudo-header field out of place, repeated, unknown or invalid"
			return h
		}
		h.status = int(v[0]-'0')*100 + int(v[1]-'0')*10 + int(v[2]-'0')
	}
	if h.status == 101 {
		h.malformed = "status 101 does not exist in HTTP/2"
	}
	return h
}

// checkTrailers validates trailers of either role: no pseudo-header fields (RFC 9113 section 8.1). strict is the server
// role.
func checkTrailers(fields []Field, strict bool) string {
	h := headInfo{length: -1, strict: strict}
	for i := range fields {
		if strings.HasPrefix(fields[i].Name, ":") {
			return "pseudo-header field in trailers"
		}
		if bad := h.regular(&fields[i]); bad != "" {
			return bad
		}
	}
	return ""
}

func validMethod(s string) bool {
	if s == "" {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !nameBytes[c] && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}

// validScheme: RFC 3986 section 3.1.
func validScheme(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
		case i > 0 && (c >= '0' && c <= '9' || c == '+' || c == '-' || c == '.'):
		default:
			return false
		}
	}
	return s != ""
}

// validPath: no blanks and no control characters. What else a path may have is for who routes it to say.
func validPath(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] == 0x7f {
			return false
		}
	}
	return s != ""
}

// authorityBytes has the bytes of a host and a port (RFC 3986 section 3.2). RFC 9113 section 8.3.1: ":authority MUST NOT
// include the deprecated userinfo subcomponent", so there is no "@".
var authorityBytes = func() (t [256]bool) {
	for c := range byte(128) {
		t[c] = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~%!$&'()*+,;=:[]", c) >= 0
	}
	return t
}()

// validAuthority: RFC 9110 section 4.2.1 has an empty host rejected as well.
func validAuthority(s string) bool {
	for i := range len(s) {
		if !authorityBytes[s[i]] {
			return false
		}
	}
	return s != "" && s[0] != ':'
}

// hasPort tells whether an authority ends with a port.
func hasPort(s string) bool {
	i := strings.LastIndexByte(s, ':')
	return i > 0 && i < len(s)-1 && strings.Trim(s[i+1:], "0123456789") == ""
}

// joinCrumbs joins cookie fields: RFC 9113 section 8.2.3 lets clients split them for compression's sake only.
func joinCrumbs(fields []Field) []Field {
	var joined strings.Builder // crumb by crumb, a list full of them would be copied thousands of times
	at, sensitive := -1, false
	out := fields[:0]
	for _, f := range fields {
		switch {
		case f.Name != "cookie":
			out = append(out, f)
			continue
		case at < 0:
			at = len(out)
			out = append(out, f)
		default:
			joined.WriteString("; ")
		}
		joined.WriteString(f.Value)
		sensitive = sensitive || f.Sensitive
	}
	out[at].Value, out[at].Sensitive = joined.String(), sensitive
	return out
}

// parseLength reads a content-length; -1 if it is none.
func parseLength(s string) int64 {
	if s == "" || len(s) > 18 {
		return -1
	}
	var n int64
	for i := range len(s) {
		c := s[i]
		if c < '0' || c > '9' {
			return -1
		}
		n = n*10 + int64(c-'0')
	}
	return n
}
