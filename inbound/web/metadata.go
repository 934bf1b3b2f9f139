package web

import "net/http"

// headerMetadata is request metadata in an http.Header, whose keys are written Like-This.
type headerMetadata http.Header

// Values implements [call.Metadata]. Policies ask it for each call, so it makes the header's form of the key without
// allocating memory.
func (h headerMetadata) Values(key string) []string {
	var buf [64]byte
	if len(key) > len(buf) {
		return http.Header(h).Values(key)
	}
	upper := true
	for i := range len(key) {
		c := key[i]
		switch {
		case upper && 'a' <= c && c <= 'z':
			c -= 'a' - 'A'
		case !upper && 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		}
		buf[i] = c
		upper = c == '-'
	}
	return h[string(buf[:len(key)])]
}
