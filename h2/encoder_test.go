package h2

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
)

// blockOf encodes one header block.
func blockOf(e *encoder, fields []Field) []byte {
	b := e.begin(nil)
	for _, f := range fields {
		b = e.field(b, f)
	}
	return b
}

func sameFields(a, b []Field) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Name != b[i].Name || a[i].Value != b[i].Value {
			return false
		}
	}
	return true
}

// Whatever is encoded, Go's decoder gets it back, through evictions and changes of the table's size.
func TestEncoderRoundTrip(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	names := []string{":path", ":status", "grpc-timeout", "x-a", "x-b", "content-type", "authorization", "cookie", "traceparent"}
	for range 5 {
		e := newEncoder()
		d := hpack.NewDecoder(4096, nil)
		for i := range 2000 {
			if rnd.IntN(50) == 0 {
				for range rnd.IntN(3) + 1 {
					e.setPeerMax(uint32(rnd.IntN(6000)))
				}
			}
			var fields []Field
			for range rnd.IntN(12) {
				name := names[rnd.IntN(len(names))]
				if rnd.IntN(4) == 0 {
					name = fmt.Sprintf("x-%d", rnd.IntN(300))
				}
				value := fmt.Sprint(rnd.IntN(40))
				if rnd.IntN(10) == 0 {
					value = strings.Repeat("v\xff", rnd.IntN(3000))
				}
				fields = append(fields, Field{Name: name, Value: value, Sensitive: rnd.IntN(20) == 0})
			}
			got, err := d.DecodeFull(blockOf(e, fields))
			if err != nil {
				t.Fatalf("block %d: %v", i, err)
			}
			if !sameFields(got, fields) {
				t.Fatalf("block %d: %v became %v", i, fields, got)
			}
			if e.size > e.max {
				t.Fatalf("the table has %d of %d bytes", e.size, e.max)
			}
		}
	}
}

func TestEncoderIndexing(t *testing.T) {
	e := newEncoder()
	d := hpack.NewDecoder(4096, nil)
	decode := func(b []byte) Field {
		t.Helper()
		f, err := d.DecodeFull(b)
		if err != nil || len(f) != 1 {
			t.Fatal(f, err)
		}
		return f[0]
	}
	encode := func(name, value string, sensitive bool) []byte {
		b := blockOf(e, []Field{{Name: name, Value: value, Sensitive: sensitive}})
		if f := decode(b); f.Name != name || f.Value != value || f.Sensitive != (b[0]&0xf0 == 0x10) {
			t.Fatalf("%q=%q came back as %+v", name, value, f)
		}
		return b
	}
	if b := encode(":method", "POST", false); len(b) != 1 || b[0] != 0x83 {
		t.Errorf("%x", b)
	}
	if b := encode(":path", "/pkg.Svc/Method", false); b[0] != 0x44 {
		t.Errorf("%x", b)
	}
	if b := encode(":path", "/pkg.Svc/Method", false); len(b) != 1 || b[0] != 0x80|62 {
		t.Errorf("a repeated field is not one byte: %x", b)
	}
	// Never-indexed stays never-indexed, on its way through a proxy too; credentials are so by themselves.
	for range 2 {
		for name, sensitive := range map[string]bool{"authorization": false, "proxy-authorization": false, "x-secret": true, ":path": true} {
			if b := encode(name, "/", sensitive); b[0]&0xf0 != 0x10 {
				t.Errorf("%s: %x", name, b)
			}
		}
	}
	if encode("cookie", "a=b", false)[0]&0xf0 != 0x10 || encode("cookie", strings.Repeat("a", 20), false)[0]&0xc0 != 0x40 {
		t.Error("cookie")
	}
	// The first value of a field that never repeats brings its name into the table; the others stay out.
	encode("grpc-timeout", "1S", false)
	first := e.next
	for i := range 1000 {
		b := encode("grpc-timeout", fmt.Sprintf("%dm", i), false)
		if b[0]&0xf0 != 0 || len(b) > 7 {
			t.Fatalf("grpc-timeout: %x", b)
		}
		encode("content-length", fmt.Sprint(i), false)
		encode(":path", fmt.Sprintf("/?q=%d", i), false)
	}
	if e.next != first {
		t.Error("values that never repeat got into the table")
	}
	if b := encode("x-huge", strings.Repeat("x", 3000), false); b[0] != 0 || e.next != first {
		t.Error("a field that would take most of the table got into it")
	}
}

func TestEncoderTableSize(t *testing.T) {
	e := newEncoder()
	blockOf(e, []Field{{Name: "x-a", Value: "1"}})
	e.setPeerMax(65536) // more than ours: no update
	if b := blockOf(e, []Field{{Name: "x-a", Value: "1"}}); len(b) != 1 {
		t.Errorf("%x", b)
	}
	e.setPeerMax(0)
	if b := blockOf(e, []Field{{Name: "x-a", Value: "1"}}); b[0] != 0x20 || b[1]&0xc0 == 0x80 {
		t.Errorf("%x", b)
	}
	e.setPeerMax(100)
	e.setPeerMax(10)
	e.setPeerMax(4096)
	if b := blockOf(e, nil); string(b) != "\x20\x3f\xe1\x1f" {
		t.Errorf("%x", b)
	}
	if b := blockOf(e, nil); len(b) != 0 {
		t.Errorf("%x", b)
	}
}

func BenchmarkEncode(b *testing.B) {
	fields := append(requestHead[:6:6], Field{Name: "user-agent", Value: "grpc-go/1.83.2"}, Field{Name: "grpc-timeout", Value: "999990u"})
	b.Run("ours", func(b *testing.B) {
		e := newEncoder()
		var dst []byte
		b.ReportAllocs()
		for b.Loop() {
			dst = e.begin(dst[:0])
			for _, f := range fields {
				dst = e.field(dst, f)
			}
		}
		b.ReportMetric(float64(len(dst)), "wire-B")
	})
	b.Run("hpack", func(b *testing.B) {
		var dst writer
		e := hpack.NewEncoder(&dst)
		b.ReportAllocs()
		for b.Loop() {
			dst = dst[:0]
			for _, f := range fields {
				_ = e.WriteField(f)
			}
		}
		b.ReportMetric(float64(len(dst)), "wire-B")
	})
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }
