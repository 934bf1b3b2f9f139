package proxy

import (
	"net/url"
	"testing"
)

// net/url makes the path fit to be sent, but leaves the query alone.
func TestLegalPath(t *testing.T) {
	for target, want := range map[string]string{
		"/pkg.Svc/M":            "/pkg.Svc/M",
		"//Svc/M":               "//Svc/M",
		"/a.B/":                 "/a.B/",
		"/a%20b/M?x=%20y&z":     "/a%20b/M?x=%20y&z",
		"/a b/M?x y":            "/a%20b/M?x%20y",
		"/a/M?\xff<>#\"\\^`{|}": "/a/M?%FF%3C%3E%23%22%5C%5E%60%7B%7C%7D",
		"/a/M?%":                "/a/M?%25",
		"/a/M?%4":               "/a/M?%254",
		"/a/M?%zz%4a":           "/a/M?%25zz%4a",
		"/a/M?":                 "/a/M?",
	} {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			t.Fatal(err)
		}
		if got := LegalPath(u.RequestURI()); got != want {
			t.Errorf("%q becomes %q, want %q", target, got, want)
		}
	}
}
