package h2

import (
	"hash/maphash"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// encoder compresses header lists (RFC 7541). hpack.Encoder would do, but for two things a proxy needs: it cannot
// write a literal without indexing (values that never repeat then push the useful ones out of the table), and it
// spends four map lookups per field. This one finds an entry with one hash and one comparison.
//
// The dynamic table is a list of entries with rising sequence numbers; byPair and byName map a hash to the newest
// sequence number with it. A collision forgets an entry, which costs bytes but never correctness, since an entry is
// compared before it is used. Nearly all fields were sent a moment ago with the same strings, which are compared by their
// addresses then: recent finds those.
type encoder struct {
	ents        []encEntry // entries first..next, entry i at ents[i%len(ents)]
	first, next uint64
	size, max   uint32
	lowest      uint32 // smallest max since the last block
	update      bool   // a table size update is due
	byPair      [128]uint64
	byName      [64]uint64
	recent      [32]uint64 // by a hash that costs hardly anything, and misses more
}

type encEntry struct{ name, value string }

var encSeed = maphash.MakeSeed()

func newEncoder() *encoder {
	return &encoder{max: headerTableSize, lowest: headerTableSize, first: 1, next: 1}
}

// setPeerMax follows the peer's SETTINGS_HEADER_TABLE_SIZE. We never use more than the 4,096 bytes of the protocol's
// start, so that only a smaller value, or a way back from one, changes anything.
func (e *encoder) setPeerMax(v uint32) {
	v = min(v, headerTableSize)
	if v == e.max {
		return
	}
	e.max = v
	e.lowest = min(e.lowest, v)
	e.update = true
	e.evict(0)
}

// begin starts a block: RFC 7541 section 4.2 wants the smallest size since the last block signalled, then the final
// one. Where both are due the first is signalled as zero and the table emptied: Go's decoder refuses a second update
// while its table has entries.
func (e *encoder) begin(dst []byte) []byte {
	if !e.update {
		return dst
	}
	e.update = false
	if e.lowest < e.max {
		dst = appendInt(dst, 0x20, 5, 0)
		clear(e.ents)
		e.first, e.size = e.next, 0
	}
	e.lowest = e.max
	return appendInt(dst, 0x20, 5, uint64(e.max))
}

// evict makes room for an entry of the given size.
func (e *encoder) evict(room uint32) {
	for e.first < e.next && e.size+room > e.max {
		old := &e.ents[e.first%uint64(len(e.ents))]
		e.size -= uint32(len(old.name) + len(old.value) + 32)
		*old = encEntry{}
		e.first++
	}
}

// at is the entry with a sequence number, if it has not been evicted and is this field.
func (e *encoder) at(seq uint64, f *Field) bool {
	if seq < e.first || seq >= e.next {
		return false
	}
	ent := &e.ents[seq%uint64(len(e.ents))]
	return ent.name == f.Name && ent.value == f.Value
}

// recentOf is a field's place among the recent ones.
func recentOf(f *Field) uint {
	n, v := uint(len(f.Name)), uint(len(f.Value))
	h := 5*n + 3*v
	if n > 0 {
		h += uint(f.Name[n-1])
	}
	if v > 0 {
		h += uint(f.Value[v-1]) + 7*uint(f.Value[v/2])
	}
	return h % 32
}

// field appends one field, without blanks around its value (see trimValue).
func (e *encoder) field(dst []byte, f Field) []byte {
	if seq := e.recent[recentOf(&f)]; !f.Sensitive && e.at(seq, &f) {
		return appendInt(dst, 0x80, 7, e.index(seq))
	}
	return e.fresh(dst, f)
}

// fresh appends a field that was not sent a moment ago.
func (e *encoder) fresh(dst []byte, f Field) []byte {
	f.Value = trimValue(f.Value)
	if i := staticPair(f.Name, f.Value); i != 0 && !f.Sensitive {
		return append(dst, 0x80|i)
	}
	mode := indexing(f)
	size := uint32(len(f.Name) + len(f.Value) + 32)
	if mode == indexSkip && size <= e.max/8 && !e.hasName(f.Name) {
		// The first of its kind gets a place after all, for the others' sake: they refer to its name, which saves
		// most of their bytes and the decoder a string.
		mode = indexAdd
	}
	if mode != indexAdd || size > e.max/2 {
		// A literal that will not be remembered is paid for with every request: plain bytes cost less time on both
		// sides than Huffman codes, and more only on the wire.
		first := byte(0)
		if mode == indexNever {
			first = 0x10
		}
		dst = e.name(dst, f.Name, first, 4)
		dst = appendInt(dst, 0, 7, uint64(len(f.Value)))
		return append(dst, f.Value...)
	}
	hn := maphash.String(encSeed, f.Name)
	pair := (hn*31 + maphash.String(encSeed, f.Value)) % uint64(len(e.byPair))
	if seq := e.byPair[pair]; e.at(seq, &f) {
		e.recent[recentOf(&f)] = seq
		return appendInt(dst, 0x80, 7, e.index(seq))
	}
	dst = e.name(dst, f.Name, 0x40, 6)
	dst = appendString(dst, f.Value)
	e.add(f, size, pair, hn%uint64(len(e.byName)))
	return dst
}

func (e *encoder) add(f Field, size uint32, pair, name uint64) {
	e.evict(size)
	if n := uint64(len(e.ents)); e.next-e.first == n {
		grown := make([]encEntry, max(16, 2*n))
		for seq := e.first; seq < e.next; seq++ {
			grown[seq%uint64(len(grown))] = e.ents[seq%n]
		}
		e.ents = grown
	}
	// The strings may be parts of a large buffer; the table lives as long as the connection.
	e.ents[e.next%uint64(len(e.ents))] = encEntry{strings.Clone(f.Name), strings.Clone(f.Value)}
	e.byPair[pair], e.byName[name], e.recent[recentOf(&f)] = e.next, e.next, e.next
	e.size += size
	e.next++
}

// index is the wire index of an entry: the newest comes right after the static table.
func (e *encoder) index(seq uint64) uint64 { return 61 + e.next - seq }

// hasName tells whether a name can be written by index.
func (e *encoder) hasName(name string) bool {
	if staticNames[name] != 0 {
		return true
	}
	seq := e.byName[maphash.String(encSeed, name)%uint64(len(e.byName))]
	return seq >= e.first && seq < e.next && e.ents[seq%uint64(len(e.ents))].name == name
}

// name appends the start of a literal: the pattern, and the name by index where it has one.
func (e *encoder) name(dst []byte, name string, pattern byte, bits uint8) []byte {
	if i := staticNames[name]; i != 0 {
		return appendInt(dst, pattern, bits, uint64(i))
	}
	if seq := e.byName[maphash.String(encSeed, name)%uint64(len(e.byName))]; seq >= e.first && seq < e.next {
		if e.ents[seq%uint64(len(e.ents))].name == name {
			return appendInt(dst, pattern, bits, e.index(seq))
		}
	}
	dst = append(dst, pattern)
	return appendString(dst, name)
}

// appendInt appends an integer with a prefix of the given number of bits (RFC 7541 section 5.1).
func appendInt(dst []byte, pattern byte, bits uint8, v uint64) []byte {
	most := uint64(1)<<bits - 1
	if v < most {
		return append(dst, pattern|byte(v))
	}
	dst = append(dst, pattern|byte(most))
	for v -= most; v >= 128; v >>= 7 {
		dst = append(dst, byte(v)|0x80)
	}
	return append(dst, byte(v))
}

// appendString appends a string literal, Huffman coded where that is shorter (RFC 7541 section 5.2).
func appendString(dst []byte, s string) []byte {
	if n := hpack.HuffmanEncodeLength(s); n < uint64(len(s)) {
		return hpack.AppendHuffmanString(appendInt(dst, 0x80, 7, n), s)
	}
	return append(appendInt(dst, 0, 7, uint64(len(s))), s...)
}
