package grpcproxy

import (
	"net/url"
	"os"
	"strings"
	"testing"
)

func TestValidAuthority(t *testing.T) {
	for _, s := range []string{"localhost", "a.example:443", "10.0.0.1:1", "[::1]", "[fe80::1]:50051", "%2Frun%2Fapp.sock", "a_b", "host:"} {
		if !validAuthority(s) {
			t.Errorf("%q is refused", s)
		}
	}
	for _, s := range []string{"", ":50051", "a b", "a/b", "user@host", "a:b", "a:1:2", "::1", "[::1", "[]", "[::1]x", "[::1]:x", "a\x00", "\xc3\xa4"} {
		if validAuthority(s) {
			t.Errorf("%q is taken", s)
		}
	}
}

func TestPathField(t *testing.T) {
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
		if got := pathField(u); got != want {
			t.Errorf("%q becomes %q, want %q", target, got, want)
		}
	}
}

// The page of statuses marks the reasons that come without details with °.
func TestDocumentedDetails(t *testing.T) {
	page, err := os.ReadFile("docs/status.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for line := range strings.Lines(string(page)) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || !strings.Contains(cells[3], "`") {
			continue
		}
		rows++
		reason, without := strings.CutSuffix(strings.TrimSpace(cells[3]), " °")
		reason = strings.Trim(reason, "`")
		if f := (&failure{reason: reason}); f.hasDetails() == without {
			t.Errorf("%s: details %v, but the page says the opposite", reason, f.hasDetails())
		}
	}
	if rows < 20 {
		t.Errorf("found %d rows only", rows)
	}
}
