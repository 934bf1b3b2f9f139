package grpcproxy

import "sync"

// Buffers for the answer's data: most messages fit a small one, and a quiet stream holds none. Busy streams use large
// ones, bounded by the stream's window.
var (
	smallBuffers = sync.Pool{New: func() any { b := make([]byte, 0, firstChunk); return &b }}
	largeBuffers sync.Pool
)

// appendPooled is append with buffers from the pools.
func appendPooled(b, p []byte) []byte {
	if len(b)+len(p) <= cap(b) {
		return append(b, p...)
	}
	var grown []byte
	if need := len(b) + len(p); need <= firstChunk {
		grown = *smallBuffers.Get().(*[]byte)
	} else {
		if l, ok := largeBuffers.Get().(*[]byte); ok && cap(*l) >= need {
			grown = *l
		} else {
			size := 4 * firstChunk
			for size < need {
				size *= 2
			}
			grown = make([]byte, 0, size)
		}
	}
	grown = append(append(grown[:0], b...), p...)
	putBuffer(b)
	return grown
}

func putBuffer(b []byte) {
	switch c := cap(b); {
	case c == firstChunk:
		b = b[:0]
		smallBuffers.Put(&b)
	case c > firstChunk:
		b = b[:0]
		largeBuffers.Put(&b)
	}
}
