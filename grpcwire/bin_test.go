package grpcwire

import (
	"bytes"
	"strings"
	"testing"
)

// binValues are values of -bin keys and what they mean; a bad one means nil.
var binValues = []struct {
	in   string
	want []byte
}{
	// "Implementations MUST accept padded and un-padded values".
	{"", []byte{}},
	{"AQ", []byte{1}},
	{"AQ==", []byte{1}},
	{"AQI", []byte{1, 2}},
	{"AQI=", []byte{1, 2}},
	{"AQID", []byte{1, 2, 3}},
	{"+/+/", []byte{0xfb, 0xff, 0xbf}},
	{"AR", []byte{1}}, // Bits that are not zero behind the end: grpc-go takes them too.
	{"A", nil},
	{"=", nil},
	{"==", nil},
	{"====", nil},
	{"AQ=", nil},
	{"AQ===", nil},
	{"AQID=", nil},
	{"AQ==AQ==", nil},
	{"-_-_", nil}, // RFC 4648 section 4, not section 5.
	{"AQID,AQID", nil},
	{" AQID", nil},
	{"A*ID", nil},
}

func TestDecodeBin(t *testing.T) {
	for _, tt := range binValues {
		got, err := DecodeBin(tt.in)
		switch {
		case tt.want == nil && err == nil:
			t.Errorf("DecodeBin(%q) = %x, want an error", tt.in, got)
		case tt.want == nil && !strings.HasPrefix(err.Error(), "decoding binary metadata: "):
			t.Errorf("DecodeBin(%q): %v", tt.in, err)
		case tt.want != nil && (err != nil || !bytes.Equal(got, tt.want)):
			t.Errorf("DecodeBin(%q) = %x, %v; want %x", tt.in, got, err, tt.want)
		}
	}
}

func TestEncodeBin(t *testing.T) {
	// "should emit un-padded values".
	for want, in := range map[string][]byte{"": nil, "AQ": {1}, "AQI": {1, 2}, "AQID": {1, 2, 3}, "+/+/": {0xfb, 0xff, 0xbf}} {
		if got := EncodeBin(in); got != want {
			t.Errorf("EncodeBin(%x) = %q, want %q", in, got, want)
		}
		if got := string(AppendBin([]byte("x"), in)); got != "x"+want {
			t.Errorf("AppendBin(%x) = %q", in, got)
		}
	}
}

func FuzzBin(f *testing.F) {
	for _, tt := range binValues {
		f.Add(tt.in, tt.want)
	}
	f.Fuzz(func(t *testing.T, s string, b []byte) {
		e := EncodeBin(b)
		if strings.ContainsAny(e, "=,") {
			t.Errorf("EncodeBin(%x) = %q", b, e)
		}
		padded := e + strings.Repeat("=", -len(e)&3)
		for _, v := range []string{e, padded} {
			if got, err := DecodeBin(v); err != nil || !bytes.Equal(got, b) {
				t.Errorf("%x came back as %x, %v from %q", b, got, err, v)
			}
		}
		if d, err := DecodeBin(s); err == nil && len(d) > len(s)*3/4 {
			t.Errorf("DecodeBin(%q) = %x", s, d)
		}
	})
}

func BenchmarkBin(b *testing.B) {
	raw := bytes.Repeat([]byte{1, 2, 3, 4, 5}, 20)
	value := EncodeBin(raw)
	b.Run("encode", func(b *testing.B) {
		b.ReportAllocs()
		buf := make([]byte, 0, 256)
		for b.Loop() {
			buf = AppendBin(buf[:0], raw)
		}
	})
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := DecodeBin(value); err != nil {
				b.Fatal(err)
			}
		}
	})
}
