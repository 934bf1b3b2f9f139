package proxy

import "sync"

// backlog is bytes that cannot go on yet, in a buffer from the pools.
type backlog struct {
	buf []byte
	off int // how much of buf has gone on
}

func (b *backlog) bytes() []byte { return b.buf[b.off:] }

func (b *backlog) empty() bool { return len(b.buf) == b.off }

func (b *backlog) add(p []byte) {
	if b.off > 0 && len(b.buf)+len(p) > cap(b.buf) {
		b.compact()
	}
	b.buf = AppendPooled(b.buf, p)
}

// drop takes away what has gone on. Bytes are moved when half of them have, so that each is moved once or twice however small the
// steps are.
func (b *backlog) drop(n int) {
	b.off += n
	switch {
	case b.empty():
		b.release()
	case b.off > len(b.buf)/2:
		b.compact()
	}
}

func (b *backlog) compact() {
	b.buf = b.buf[:copy(b.buf, b.buf[b.off:])]
	b.off = 0
}

func (b *backlog) release() {
	PutBuffer(b.buf)
	*b = backlog{}
}

// smallBuffer is what most requests and answers fit into.
const smallBuffer = 4 << 10

// Buffers for what cannot go on at once. Most messages fit a small one, and a quiet stream has none. Busy streams use large ones,
// bounded by the stream's window.
var (
	smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }}
	largeBuffers sync.Pool
)

// AppendPooled is append with buffers from the pools. Whoever is through with one calls PutBuffer.
func AppendPooled(b, p []byte) []byte {
	if len(b)+len(p) <= cap(b) {
		return append(b, p...)
	}
	var grown []byte
	if need := len(b) + len(p); need <= smallBuffer {
		grown = smallBuffers.Get().(*[smallBuffer]byte)[:0]
	} else if l, ok := largeBuffers.Get().(*[]byte); ok && cap(*l) >= need {
		grown = *l
	} else {
		size := 4 * smallBuffer
		for size < need {
			size *= 2
		}
		grown = make([]byte, 0, size)
	}
	grown = append(append(grown[:0], b...), p...)
	PutBuffer(b)
	return grown
}

// PutBuffer gives a buffer of AppendPooled back.
func PutBuffer(b []byte) {
	switch c := cap(b); {
	case c == smallBuffer:
		smallBuffers.Put((*[smallBuffer]byte)(b[:smallBuffer]))
	case c > smallBuffer:
		putLarge(b[:0])
	}
}

// putLarge is apart from PutBuffer since its slice must be on the heap.
func putLarge(b []byte) { largeBuffers.Put(&b) }
