package web

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
)

// writeBeside writes while the request is still being read, and ends the reading when the call is over.
func (x *exchange) writeBeside() {
	defer close(x.beside)
	defer x.stopReading()
	defer func() {
		// A panic of a handler's writer belongs to the server's goroutine, which knows what to do about it.
		if p := recover(); p != nil {
			x.panicked = p
			x.Flight.Abandon(aborted(), nil)
			x.awaitOver()
		}
	}()
	x.write()
}

// stopReading releases a reader of the request.
func (x *exchange) stopReading() {
	if x.r.ProtoMajor != 2 {
		// An HTTP/1 body cannot be closed while it is read. Closing an HTTP/3 body tells the client that the call was
		// cancelled, before it has the answer; left open, the server asks it to stop with H3_NO_ERROR, as RFC 9114
		// section 4.1 has it. Through Caddy's reader, if it is there, or its next read would lift the deadline.
		_ = x.flusher.SetReadDeadline(time.Unix(1, 0))
		return
	}
	_ = x.body.Close()
}

// write writes what the flight queues until the call is over.
func (x *exchange) write() {
	for {
		o := x.next()
		x.broken = x.broken || o.reset
		if o.head != nil && !x.broken {
			x.writeHead(*o.head)
			x.unflushed = !o.end
		}
		if len(o.data) > 0 {
			x.writeData(o.data)
			proxy.PutBuffer(o.data)
		}
		if o.trailers != nil && x.unsent > 0 && !x.broken {
			x.flush()
		}
		if o.trailers != nil && !x.broken {
			x.writeTrailers(*o.trailers)
		}
		for _, l := range [...]*[]h2.Field{o.head, o.trailers} {
			if l != nil {
				proxy.PutFields(l)
			}
		}
		if o.over {
			x.aborted = x.broken && !x.nobodyIsThere()
			return
		}
	}
}

// nobodyIsThere tells that the client is gone. A client of HTTP/1 that has closed its own half may be there still, and would take the
// server's blank answer for one.
func (x *exchange) nobodyIsThere() bool {
	return x.r.ProtoMajor > 1 && errors.Is(x.r.Context().Err(), context.Canceled)
}

// next waits for something to write. While it would have to wait and something is unflushed, it flushes first.
func (x *exchange) next() outbox {
	for {
		x.mu.Lock()
		if o := x.out; !o.empty() {
			x.out = outbox{end: o.end, over: o.over}
			x.mu.Unlock()
			return o
		}
		x.waiting = !x.unflushed || x.broken
		waits := x.waiting
		x.mu.Unlock()
		if waits {
			x.await()
		} else {
			x.flush()
		}
	}
}

// await waits to be notified, or until the client is gone.
func (x *exchange) await() {
	done := x.r.Context().Done()
	if x.left {
		done = nil // it is known
	}
	select {
	case <-x.notify:
		return
	case <-done:
	}
	x.clientLeft()
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.waiting { // the signal came as well
		<-x.notify
	}
	x.waiting = false
}

// clientLeft ends the call since the request's context is over. If that is not because the client is gone, it can be told.
func (x *exchange) clientLeft() {
	x.left = true
	x.mu.Lock()
	cut := x.cut
	x.mu.Unlock()
	if cut {
		return // HTTP/1's server ends the context of a request that was cut short
	}
	err := x.r.Context().Err()
	if errors.Is(err, context.Canceled) {
		x.fail(err)
	} else {
		x.Flight.Cut(x.gone(err))
	}
}

// fail ends the call since its client cannot be written to.
func (x *exchange) fail(err error) {
	x.broken = true
	x.Flight.Abandon(x.gone(err), nil)
}

// writeData writes a piece of messages. The upstream is given credit for it when it has left: when it was flushed, or more was written
// behind it. Nothing of an answer is left for the server to flush when the handler has returned: it would wait for a client that does
// not read without any limit, and no deadline, no timeout and no exit would reach the call any more.
func (x *exchange) writeData(p []byte) {
	if x.broken {
		return
	}
	x.enterWrite()
	_, err := x.w.Write(p)
	x.leaveWrite()
	if err != nil {
		x.fail(err)
		return
	}
	x.unflushed = true
	x.sent()
	x.unsent = len(p)
}

// sent tells the flight of what has left.
func (x *exchange) sent() {
	if n := x.unsent; n > 0 {
		x.unsent = 0
		x.Flight.Sent(n)
	}
}

// flush flushes what was written.
func (x *exchange) flush() {
	x.enterWrite()
	err := x.flusher.Flush()
	x.leaveWrite()
	if x.unflushed = false; err != nil {
		x.fail(err)
		return
	}
	x.sent()
}

// enterWrite notes that the writer may wait for the client.
func (x *exchange) enterWrite() {
	x.mu.Lock()
	x.writing = true
	x.limitLocked()
	x.mu.Unlock()
}

func (x *exchange) leaveWrite() {
	x.mu.Lock()
	x.writing = false
	x.mu.Unlock()
}

// limitLocked bounds what the writer waits for.
func (x *exchange) limitLocked() {
	if x.writing && !x.until.IsZero() {
		_ = x.deadlines.SetWriteDeadline(x.until)
	}
}

// writeHead hands the server the response head. Where it is the whole answer (Trailers-Only) it stays one HEADERS frame with
// END_STREAM as long as nothing is written or flushed.
func (x *exchange) writeHead(fields []h2.Field) {
	header := x.w.Header()
	Prepare(header, x.r)
	delete(header, "Content-Type")
	copyFields(header, "", fields[1:]) // without :status
	x.headSent = true
	x.w.WriteHeader(http.StatusOK)
}

// writeTrailers sets the trailers; the server sends them when the handler returns. The prefix makes that work without
// announcing them.
func (x *exchange) writeTrailers(fields []h2.Field) {
	hintAtTrailers(x.h.Logger, fields)
	copyFields(x.w.Header(), http.TrailerPrefix, fields)
}
