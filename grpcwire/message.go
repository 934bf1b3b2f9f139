package grpcwire

import (
	"strings"
	"unicode/utf8"
)

const upperHex = "0123456789ABCDEF"

// plain tells whether a byte of a status message stands for itself on the wire. PROTOCOL-HTTP2:
// "Percent-Byte-Unencoded → 1*( %x20-%x24 / %x26-%x7E ) ; space and VCHAR, except %".
func plain(c byte) bool { return c >= ' ' && c <= '~' && c != '%' }

// EncodeMessage percent-encodes a status message for the grpc-message field. The result is printable ASCII. A message
// that needs no encoding is returned as it is, without an allocation.
//
// PROTOCOL-HTTP2: "The value portion of Status-Message is conceptually a Unicode string description of the error,
// physically encoded as UTF-8 followed by percent-encoding." So bytes that are not UTF-8 have no place in it; each is
// replaced by U+FFFD, as in grpc-go.
func EncodeMessage(s string) string {
	first := 0
	for first < len(s) && plain(s[first]) {
		first++
	}
	if first == len(s) {
		return s
	}
	size := first
	for i := first; i < len(s); {
		if s[i] < utf8.RuneSelf {
			if plain(s[i]) {
				size++
			} else {
				size += 3
			}
			i++
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		size += 3 * utf8.RuneLen(r)
		i += n
	}
	var b strings.Builder
	b.Grow(size)
	b.WriteString(s[:first])
	for i := first; i < len(s); {
		c := s[i]
		switch {
		case plain(c):
			b.WriteByte(c)
			i++
		case c < utf8.RuneSelf:
			writeEscape(&b, c)
			i++
		default:
			r, n := utf8.DecodeRuneInString(s[i:]) // U+FFFD, 1 where it is not UTF-8.
			var buf [utf8.UTFMax]byte
			for _, c := range buf[:utf8.EncodeRune(buf[:], r)] {
				writeEscape(&b, c)
			}
			i += n
		}
	}
	return b.String()
}

func writeEscape(b *strings.Builder, c byte) {
	b.WriteByte('%')
	b.WriteByte(upperHex[c>>4])
	b.WriteByte(upperHex[c&15])
}

// DecodeMessage undoes EncodeMessage. It never fails: what is no valid escape stays as it is, and so do bytes that
// should have been escaped. The result need not be UTF-8. A value without an escape is returned as it is, without an
// allocation.
//
// PROTOCOL-HTTP2: "When decoding invalid values, implementations MUST NOT error or throw away the message. […]
// Alternatively, the implementation can decode valid portions while leaving broken %-encodings as-is".
func DecodeMessage(s string) string {
	first := nextEscape(s, 0)
	if first < 0 {
		return s
	}
	var b strings.Builder
	b.Grow(len(s))
	done := 0
	for i := first; i >= 0; i = nextEscape(s, done) {
		b.WriteString(s[done:i])
		b.WriteByte(unhex[s[i+1]]<<4 | unhex[s[i+2]])
		done = i + 3
	}
	b.WriteString(s[done:])
	return b.String()
}

// nextEscape is the index of the first valid escape at or after from, or -1.
func nextEscape(s string, from int) int {
	for {
		i := strings.IndexByte(s[from:], '%')
		if i < 0 || from+i+2 >= len(s) {
			return -1
		}
		from += i
		if unhex[s[from+1]] != notHex && unhex[s[from+2]] != notHex {
			return from
		}
		from++
	}
}

const notHex = 0xff

// unhex holds the value of each hexadecimal digit. Upper case is what is sent; lower case is read as well.
var unhex = func() (t [256]byte) {
	for c := range t {
		t[c] = notHex
	}
	for v := range len(upperHex) {
		t[upperHex[v]] = byte(v)
		t[upperHex[v]|0x20] = byte(v) // Digits have that bit set already.
	}
	return t
}()
