package proxy

import "strings"

// LegalPath makes a target fit to be sent as :path (RFC 9113 section 8.3.1: path and query of the target). Clients and handlers in
// front may have put anything into it, and a server may close the connection, with everybody's calls on it, for what RFC 3986 allows
// in neither.
func LegalPath(p string) string {
	for i := range len(p) {
		if mustEscape(p, i) {
			return escapePath(p)
		}
	}
	return p
}

// legalBytes are those that RFC 3986 allows in path or query, but for the percent sign. Brackets are among them, as in net/url.
var legalBytes = func() (t [256]bool) {
	for c := '!'; c < 0x7f; c++ {
		t[c] = !strings.ContainsRune("\"#<>\\^`{|}%", c)
	}
	return t
}()

// mustEscape tells bytes that are not legal, or a percent sign that does not begin an escape.
func mustEscape(p string, i int) bool {
	if legalBytes[p[i]] {
		return false
	}
	return p[i] != '%' || i+2 >= len(p) || !isHex(p[i+1]) || !isHex(p[i+2])
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
