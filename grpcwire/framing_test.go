package grpcwire

import (
	"bytes"
	"encoding/binary"
	"math"
	"testing"
)

// frame returns one length-prefixed message of n bytes.
func frame(flag byte, n int) []byte {
	b := make([]byte, prefixLen+n)
	b[0] = flag
	binary.BigEndian.PutUint32(b[1:], uint32(n))
	return b
}

func TestFraming(t *testing.T) {
	tests := []struct {
		name     string
		in       []byte
		messages int64
		boundary bool
		bad      bool
	}{
		{"nothing", nil, 0, true, false},
		{"empty message", frame(0, 0), 1, true, false},
		{"message", frame(0, 10), 1, true, false},
		{"compressed message", frame(1, 10), 1, true, false},
		{"three", bytes.Join([][]byte{frame(0, 1), frame(1, 0), frame(0, 70000)}, nil), 3, true, false},
		{"first byte of a prefix", []byte{0}, 0, false, false},
		{"prefix without its last byte", []byte{0, 0, 0, 0}, 0, false, false},
		{"prefix only", []byte{0, 0, 0, 0, 1}, 0, false, false},
		{"message without its last byte", frame(0, 10)[:14], 0, false, false},
		{"message and a byte", append(frame(0, 10), 1), 1, false, false},
		{"longest length", append([]byte{0, 0xff, 0xff, 0xff, 0xff}, make([]byte, 1000)...), 0, false, false},
		{"flag 2", []byte{2}, 0, false, true},
		{"gRPC-Web trailers", append(frame(0, 3), frame(0x80, 5)...), 1, false, true},
		{"text", []byte("<html>not here</html>"), 0, false, true},
		{"good after bad", append([]byte{2}, frame(0, 3)...), 0, false, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for size := 1; size <= max(1, min(len(tt.in), 40)); size++ {
				var f Framing
				for p := tt.in; len(p) > 0; {
					n := min(size, len(p))
					f.Add(p[:n])
					f.Add(nil)
					p = p[n:]
				}
				if f.Messages() != tt.messages || f.AtBoundary() != tt.boundary || f.Bad() != tt.bad {
					t.Fatalf("pieces of %d: %d messages, boundary %v, bad %v; want %d, %v, %v",
						size, f.Messages(), f.AtBoundary(), f.Bad(), tt.messages, tt.boundary, tt.bad)
				}
			}
		})
	}
}

func TestFramingLongest(t *testing.T) {
	var f Framing
	f.Add([]byte{0, 0xff, 0xff, 0xff, 0xff})
	piece := make([]byte, 1<<20)
	left := uint64(math.MaxUint32)
	for ; left >= uint64(len(piece)); left -= uint64(len(piece)) {
		f.Add(piece)
	}
	if f.AtBoundary() || f.Messages() != 0 {
		t.Fatalf("before the end: %d messages, boundary %v", f.Messages(), f.AtBoundary())
	}
	f.Add(piece[:left])
	if !f.AtBoundary() || f.Messages() != 1 {
		t.Errorf("at the end: %d messages, boundary %v", f.Messages(), f.AtBoundary())
	}
}

// FuzzFraming: any split of the bytes gives the same as a reading of them as a whole.
func FuzzFraming(f *testing.F) {
	f.Add(append(frame(0, 3), frame(1, 0)...), []byte{1, 2, 3})
	f.Add(append(frame(0, 3), 2), []byte{5})
	f.Add([]byte{0, 0, 0, 1, 0, 7}, []byte{0, 1})
	f.Fuzz(func(t *testing.T, stream, cuts []byte) {
		messages, boundary, bad := int64(0), true, false
		for rest := stream; len(rest) > 0; {
			if bad = rest[0] > 1; bad {
				boundary = false
				break
			}
			if len(rest) < prefixLen {
				boundary = false
				break
			}
			n := uint64(binary.BigEndian.Uint32(rest[1:]))
			if uint64(len(rest)-prefixLen) < n {
				boundary = false
				break
			}
			rest = rest[prefixLen+n:]
			messages++
		}
		var fr Framing
		rest := stream
		for _, c := range cuts {
			n := min(int(c), len(rest))
			fr.Add(rest[:n])
			rest = rest[n:]
		}
		fr.Add(rest)
		if fr.Messages() != messages || fr.AtBoundary() != boundary || fr.Bad() != bad {
			t.Errorf("%x cut at %v: %d messages, boundary %v, bad %v; want %d, %v, %v",
				stream, cuts, fr.Messages(), fr.AtBoundary(), fr.Bad(), messages, boundary, bad)
		}
	})
}

func BenchmarkFraming(b *testing.B) {
	small := bytes.Repeat(frame(0, 100), 100)
	b.SetBytes(int64(len(small)))
	b.ReportAllocs()
	var f Framing
	for b.Loop() {
		f.Add(small)
	}
	if !f.AtBoundary() || f.Messages()%100 != 0 {
		b.Fatal("lost the messages")
	}
}
