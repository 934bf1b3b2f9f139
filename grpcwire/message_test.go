package grpcwire

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestEncodeMessage(t *testing.T) {
	for in, want := range map[string]string{
		"":                       "",
		"plain words, ~ and !":   "plain words, ~ and !",
		" leading and trailing ": " leading and trailing ",
		"100%":                   "100%25",
		"%41":                    "%2541",
		"a\nb\tc\x00d\x7fe":      "a%0Ab%09c%00d%7Fe",
		"Größe":                  "Gr%C3%B6%C3%9Fe",
		"日本":                     "%E6%97%A5%E6%9C%AC",
		"😀":                      "%F0%9F%98%80",
		"\u007f\u0080":           "%7F%C2%80",
		// Not UTF-8: each byte becomes U+FFFD, as in grpc-go.
		"a\xffb":       "a%EF%BF%BDb",
		"\xe6\x97":     "%EF%BF%BD%EF%BF%BD",
		"\xed\xa0\x80": "%EF%BF%BD%EF%BF%BD%EF%BF%BD",
		"\ufffd":       "%EF%BF%BD",
	} {
		if got := EncodeMessage(in); got != want {
			t.Errorf("EncodeMessage(%q) = %q, want %q", in, got, want)
		}
	}
}

// encodedMessages are values of grpc-message, right and wrong ones, and what they mean.
var encodedMessages = map[string]string{
	"":                         "",
	"plain":                    "plain",
	"100%25":                   "100%",
	"Gr%C3%B6%C3%9Fe":          "Größe",
	"lower %c3%b6 is read too": "lower ö is read too",
	"%0A":                      "\n",
	"%00":                      "\x00",
	// "decode valid portions while leaving broken %-encodings as-is".
	"%":         "%",
	"%%":        "%%",
	"%4":        "%4",
	"50% of 3":  "50% of 3",
	"%zz%41":    "%zzA",
	"%%41":      "%A",
	"%4%41":     "%4A",
	"%41%":      "A%",
	"%41%4":     "A%4",
	"%+1":       "%+1",
	"%-1":       "%-1",
	"% 1":       "% 1",
	"%0x":       "%0x",
	"Größe":     "Größe", // Should have been escaped.
	"\xff%41":   "\xffA",
	"%FF":       "\xff", // Not UTF-8 once decoded.
	"%25%34%31": "%41",  // Decoded once, not twice.
}

func TestDecodeMessage(t *testing.T) {
	for in, want := range encodedMessages {
		if got := DecodeMessage(in); got != want {
			t.Errorf("DecodeMessage(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestMessageAllocations(t *testing.T) {
	unescaped := strings.Repeat("nothing to do here ", 20)
	broken := "broken % escapes %zz only %4"
	raw := strings.Repeat("ö%\n", 100)
	escaped := EncodeMessage(raw)
	for _, tt := range []struct {
		name string
		max  float64
		f    func()
	}{
		{"encode without escapes", 0, func() { EncodeMessage(unescaped) }},
		{"decode without escapes", 0, func() { DecodeMessage(unescaped) }},
		{"decode broken escapes", 0, func() { DecodeMessage(broken) }},
		{"encode", 1, func() { EncodeMessage(raw) }},
		{"decode", 1, func() { DecodeMessage(escaped) }},
	} {
		if got := testing.AllocsPerRun(100, tt.f); got > tt.max {
			t.Errorf("%s: %v allocations, want at most %v", tt.name, got, tt.max)
		}
	}
}

// FuzzStatusMessage: decode(encode(s)) == s for valid UTF-8 (and s with U+FFFD else); output is printable ASCII
// without stray percent signs; decoding anything neither fails nor grows.
func FuzzStatusMessage(f *testing.F) {
	for in, out := range encodedMessages {
		f.Add(in)
		f.Add(out)
	}
	f.Fuzz(func(t *testing.T, s string) {
		want := s
		if !utf8.ValidString(s) {
			want = string([]rune(s))
		}
		e := EncodeMessage(s)
		for i := range len(e) {
			if e[i] < ' ' || e[i] > '~' {
				t.Fatalf("EncodeMessage(%q) = %q", s, e)
			}
		}
		if got := DecodeMessage(e); got != want {
			t.Errorf("%q came back as %q", s, got)
		}
		d := DecodeMessage(s)
		if len(d) > len(s) || strings.IndexByte(s, '%') < 0 && d != s {
			t.Errorf("DecodeMessage(%q) = %q", s, d)
		}
		if again := DecodeMessage(EncodeMessage(d)); utf8.ValidString(d) && again != d {
			t.Errorf("%q came back as %q", d, again)
		}
	})
}

func BenchmarkEncodeMessage(b *testing.B) {
	for _, tt := range []struct{ name, in string }{
		{"plain", "connecting to the upstream: connection refused"},
		{"utf8", "Verbindung abgelehnt: Größe überschritten, 100%"},
	} {
		b.Run(tt.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				EncodeMessage(tt.in)
			}
		})
	}
}

func BenchmarkDecodeMessage(b *testing.B) {
	for _, tt := range []struct{ name, in string }{
		{"plain", "connecting to the upstream: connection refused"},
		{"utf8", EncodeMessage("Verbindung abgelehnt: Größe überschritten, 100%")},
	} {
		b.Run(tt.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				DecodeMessage(tt.in)
			}
		})
	}
}
