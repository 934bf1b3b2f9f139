package proxy

import (
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

// The page of statuses marks the reasons that come without details with °.
func TestDocumentedDetails(t *testing.T) {
	page, err := os.ReadFile("../docs/status.md")
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
		if f := (&Failure{Reason: reason}); f.hasDetails() == without {
			t.Errorf("%s: details %v, but the page says the opposite", reason, f.hasDetails())
		}
	}
	if rows < 20 {
		t.Errorf("found %d rows only", rows)
	}
}
