package web

import (
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
)

// exchange is one request and its answer.
//
// Two jobs run at once: the request's body is read and pushed into the flight (read), and what the flight queues for the client is
// written (write). Most calls are unary: their request has ended before the answer begins, so one goroutine, the server's, does both
// in turn. Only when something is to be written while the body is still being read, a second goroutine is started for that. The
// body and the http.ResponseWriter are touched by these two only, never by a connection's reader.
type exchange struct {
	proxy.Flight
	h    *Handler
	w    http.ResponseWriter
	r    *http.Request
	body io.ReadCloser

	deadlines *http.ResponseController // sets deadlines below Caddy's own
	flusher   *http.ResponseController

	mu      sync.Mutex // LOCKS: guards what follows; nothing is called with it held but SetWriteDeadline
	out     outbox
	notify  chan struct{} // capacity 1: there is something for the writer
	waiting bool          // the writer waits for that
	due     bool          // it is to be told at the end of a batch
	reading bool          // the server's goroutine reads the body
	cut     bool          // the client is to be told what is wrong with its request
	beside  chan struct{} // closed when a writer of its own is through; nil if there is none
	writing bool          // the writer is inside a write to the client
	until   time.Time     // the client's time to take what is being written; zero: as long as the call lasts
	ahead   int64         // bytes that were read and have not gone on
	room    chan struct{} // the reader waits for some to go on; nil if it does not
	// result is the call's as it was when the head was queued, and in the end: the flight may be at it meanwhile. Before that it is
	// not noted.
	result call.Result
	noted  bool

	// The writer's.
	unsent    int  // written, and not flushed
	panicked  any  // what one of its own panicked with
	unflushed bool // something was written since the last flush
	broken    bool // nothing can be written any more
	left      bool // the request's context is over
	headSent  bool // the head went to the server
	aborted   bool // the server must reset the client's stream
}

// outbox is what the flight has queued for the client.
type outbox struct {
	head     *[]h2.Field
	data     []byte
	trailers *[]h2.Field
	end      bool // there is nothing after head, data and trailers
	reset    bool
	over     bool // the call is over
}

func (o *outbox) empty() bool {
	return o.head == nil && len(o.data) == 0 && o.trailers == nil && !o.reset && !o.over
}

// run carries the call from its head to its end.
func (x *exchange) run() {
	ran := false
	defer func() {
		if !ran {
			x.abandon()
		}
	}()
	x.h.Proxy.Serve(&x.Flight, x, nil)
	x.mu.Lock()
	over := x.out.over
	x.reading = !over
	if x.reading && !x.out.empty() {
		x.signalLocked()
	}
	x.mu.Unlock()
	if !over {
		x.read()
	}

	x.mu.Lock()
	x.reading = false
	beside := x.beside
	x.mu.Unlock()
	if beside == nil {
		x.write()
	} else if <-beside; x.panicked != nil {
		panic(x.panicked)
	}
	ran = true
}

// abandon ends the call if something in front of the proxy, which wraps the answer's writer or the request's body, has panicked.
// No writer must outlive the handler.
func (x *exchange) abandon() {
	x.Flight.Abandon(aborted(), nil)
	x.mu.Lock()
	x.reading = false // no writer is started any more
	beside := x.beside
	x.mu.Unlock()
	if beside != nil {
		<-beside
	}
	x.awaitOver()
}

// aborted is the end of a call that something in front of the proxy has panicked in.
func aborted() *proxy.Failure {
	return proxy.Fail(grpcwire.Internal, proxy.ReasonAborted, "a handler in front of the proxy aborted the call")
}

// awaitOver waits for the flight, when nothing is written any more.
func (x *exchange) awaitOver() {
	for {
		x.mu.Lock()
		if x.out.over {
			x.mu.Unlock()
			return
		}
		x.waiting = true
		x.mu.Unlock()
		<-x.notify
	}
}

const (
	// smallRead is how much of a request is read at once, as long as that is enough: most messages are small, and an idle stream keeps
	// the buffer. A busy one gets largeRead.
	smallRead = 4 << 10
	largeRead = 64 << 10
	// maxAhead is how much may have been read and not gone on.
	maxAhead = 64 << 10
	// quietReads is how many small reads in a row make a large buffer shrink again.
	quietReads = 32
)

var (
	smallReads = sync.Pool{New: func() any { return new([smallRead]byte) }}
	largeReads = sync.Pool{New: func() any { return new([largeRead]byte) }}
)

// read pushes the request into the flight until it ends, cannot be read, or the call is over.
func (x *exchange) read() {
	small := smallReads.Get().(*[smallRead]byte)
	defer smallReads.Put(small)
	var (
		large *[largeRead]byte
		quiet int
		total int64
	)
	defer func() {
		if large != nil {
			largeReads.Put(large)
		}
	}()
	buf := small[:]
	for x.mayRead() {
		n, err := x.body.Read(buf)
		total += int64(n)
		eof := errors.Is(err, io.EOF)
		if eof && x.r.ProtoMajor == 3 && total < x.r.ContentLength { // which the HTTP/3 server does not look at
			x.Flight.Cut(proxy.RequestLength(bodyShorter))
			return
		}
		if n > 0 || eof {
			x.mu.Lock()
			x.ahead += int64(n)
			x.mu.Unlock()
			x.Flight.Data(buf[:n], eof, nil)
		}
		switch {
		case eof:
			return
		case err != nil:
			x.cutShort(x.unreadable(err))
			return
		case large == nil && n == len(buf):
			large, quiet = largeReads.Get().(*[largeRead]byte), 0
			buf = large[:]
		case large != nil && n > smallRead:
			quiet = 0
		case large != nil:
			if quiet++; quiet >= quietReads {
				largeReads.Put(large)
				large, buf = nil, small[:]
			}
		}
	}
}

// cutShort ends a call whose request cannot be read.
func (x *exchange) cutShort(why *proxy.Failure) {
	if x.nobodyIsThere() {
		x.Flight.Abandon(why, nil)
		return
	}
	x.mu.Lock()
	x.cut = true
	x.mu.Unlock()
	x.Flight.Cut(why)
}

// mayRead waits until there is room for more of the request. It returns false when reading on is pointless.
func (x *exchange) mayRead() bool {
	for {
		x.mu.Lock()
		over := x.out.over || x.out.end
		if over || x.ahead < maxAhead {
			x.mu.Unlock()
			return !over
		}
		room := make(chan struct{})
		x.room = room
		x.mu.Unlock()
		select {
		case <-room:
		case <-x.r.Context().Done():
			x.cutShort(x.gone(x.r.Context().Err()))
			return false
		}
	}
}

// Consumed implements proxy.Downstream.
func (x *exchange) Consumed(n int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.ahead -= int64(n); x.ahead < maxAhead {
		x.roomLocked()
	}
}

func (x *exchange) roomLocked() {
	if x.room != nil {
		close(x.room)
		x.room = nil
	}
}

// signalLocked lets the writer know that the outbox has something, starting one if the server's goroutine is still busy with the
// request.
func (x *exchange) signalLocked() {
	switch {
	case x.waiting:
		x.waiting = false
		x.notify <- struct{}{}
	case x.reading && x.beside == nil:
		x.beside = make(chan struct{})
		go x.writeBeside()
	}
}

// Head implements proxy.Downstream.
func (x *exchange) Head(fields []h2.Field, end bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.out.head, x.out.end = cloned(fields), end
	x.noteResultLocked()
}

func (x *exchange) noteResultLocked() { x.result, x.noted = x.Flight.Call.Result, true }

// cloned are fields for the writer, which gives them back.
func cloned(fields []h2.Field) *[]h2.Field {
	l := proxy.GetFields()
	*l = append(*l, fields...)
	return l
}

// Data implements proxy.Downstream. It takes all: the upstream's windows bound what is queued, and Sent gives them credit.
func (x *exchange) Data(p []byte) (taken int, sent bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.out.data = proxy.AppendPooled(x.out.data, p)
	return len(p), false
}

// Trailers implements proxy.Downstream.
func (x *exchange) Trailers(fields []h2.Field, hurry bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.out.trailers, x.out.end = cloned(fields), true
	if hurry {
		// The writer may wait for a client that does not read, or soon will; trailers could not reach it either. With mu
		// held: once the handler has returned, its deadlines must not be touched.
		x.until = time.Now().Add(proxy.WriteGrace)
		x.limitLocked()
	}
}

// Flush implements proxy.Downstream: it lets the writer know that there is something for it, at the end of the reader's batch of
// frames. Most answers are whole by then, and the writer is woken once.
func (x *exchange) Flush(reader *h2.Conn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case reader == nil:
		x.signalLocked()
	case !x.due:
		x.due = true
		reader.AtBatchEnd(x)
	}
}

// BatchEnd implements h2.BatchEnder.
func (x *exchange) BatchEnd() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.due = false
	if !x.out.empty() {
		x.signalLocked()
	}
}

// Reset implements proxy.Downstream.
func (x *exchange) Reset(h2.ErrCode) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.out.reset = true
	x.until = time.Now()
	x.limitLocked()
}

// Done implements proxy.Downstream.
func (x *exchange) Done() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.out.over = true
	x.noteResultLocked()
	x.roomLocked()
	x.signalLocked()
}

var _ proxy.Downstream = (*exchange)(nil)
