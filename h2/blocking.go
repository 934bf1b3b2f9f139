package h2

import (
	"context"
	"io"
	"sync"
)

// Blocking is a Receiver for code that prefers a goroutine per stream: it collects what arrives and hands it out in
// blocking calls. What it holds is bounded by the stream's window, since bytes are credited when they are read. One
// goroutine may use it at a time. Make one with NewBlocking for each stream.
type Blocking struct {
	// OnInformational is called with 1xx heads, on the connection's reading goroutine. It must not keep the slice.
	OnInformational func(fields []Field)

	mu       sync.Mutex
	news     chan struct{} // holds a token after something has changed
	s        *Stream
	head     []Field
	trailers []Field
	hasHead  bool
	end      bool
	err      *Error
	data     []byte // data[at:] was not read yet
	at       int
}

// NewBlocking makes a Receiver for one stream.
func NewBlocking() *Blocking { return &Blocking{news: make(chan struct{}, 1)} }

func (b *Blocking) changed() {
	select {
	case b.news <- struct{}{}:
	default:
	}
}

// RecvHead is Receiver's.
func (b *Blocking) RecvHead(s *Stream, fields []Field, end bool) {
	if !end && len(fields) > 0 && fields[0].Name == ":status" && fields[0].Value[0] == '1' {
		if b.OnInformational != nil {
			b.OnInformational(fields)
		}
		return
	}
	b.mu.Lock()
	b.s, b.head, b.hasHead, b.end = s, append([]Field(nil), fields...), true, end
	b.mu.Unlock()
	b.changed()
}

// RecvData is Receiver's.
func (b *Blocking) RecvData(s *Stream, p []byte, end bool) {
	b.mu.Lock()
	b.s = s
	b.data = append(b.data, p...)
	b.end = b.end || end
	b.mu.Unlock()
	b.changed()
}

// RecvTrailers is Receiver's.
func (b *Blocking) RecvTrailers(s *Stream, fields []Field) {
	b.mu.Lock()
	b.s, b.trailers, b.end = s, append([]Field{}, fields...), true
	b.mu.Unlock()
	b.changed()
}

// RecvReset is Receiver's.
func (b *Blocking) RecvReset(s *Stream, err *Error) {
	b.mu.Lock()
	b.s, b.err = s, err
	b.mu.Unlock()
	b.changed()
}

// WaitHead waits for the final response head. It fails when the stream is reset before it, or ctx ends; ending the
// stream is then the caller's.
func (b *Blocking) WaitHead(ctx context.Context) ([]Field, error) {
	for {
		b.mu.Lock()
		head, ok, err := b.head, b.hasHead, b.err
		b.mu.Unlock()
		switch {
		case ok:
			return head, nil
		case err != nil:
			return nil, err
		}
		select {
		case <-b.news:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Read is ReadContext without an end. A reset of the stream, and the connection's end, release it.
func (b *Blocking) Read(p []byte) (int, error) { return b.ReadContext(context.Background(), p) }

// ReadContext reads DATA and gives credit for it. After the peer's END_STREAM it returns io.EOF, after a reset the
// *Error, in both cases when everything that came before has been read.
func (b *Blocking) ReadContext(ctx context.Context, p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		b.mu.Lock()
		if n := copy(p, b.data[b.at:]); n > 0 {
			b.at += n
			if b.at == len(b.data) {
				b.at, b.data = 0, b.data[:0]
			} else if b.at > 64<<10 {
				b.data = b.data[:copy(b.data, b.data[b.at:])]
				b.at = 0
			}
			s := b.s
			b.mu.Unlock()
			s.Consumed(n)
			return n, nil
		}
		end, err := b.end, b.err
		b.mu.Unlock()
		switch {
		case end:
			return 0, io.EOF
		case err != nil:
			return 0, err
		}
		select {
		case <-b.news:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// Trailers returns the trailers once Read has returned io.EOF; nil when the stream ended without.
func (b *Blocking) Trailers() []Field {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.trailers
}

// Err says why the stream was reset, nil if it was not.
func (b *Blocking) Err() *Error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

var _ Receiver = (*Blocking)(nil)
