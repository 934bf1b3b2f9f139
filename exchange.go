package grpcproxy

import (
	"context"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// exchange is one call on its way through the handler.
//
// Two jobs run at once: the request is pumped to the upstream (pump.go), the answer to the client (respond.go). Most
// calls are unary: their request has ended before the answer begins, so one goroutine, the server's, does both in
// turn. Only when something happens to the answer while the request is still open, a second goroutine is started for
// the answer.
type exchange struct {
	h    *Handler
	cur  *cluster.View
	w    http.ResponseWriter
	r    *http.Request
	body io.ReadCloser
	repl *caddy.Replacer
	call call.Call

	deadlines *http.ResponseController // sets deadlines below Caddy's own
	flusher   *http.ResponseController

	// Selection: which endpoints were tried, and what came of it. Used by one goroutine at a time: before the
	// request is pumped, the server's; then whoever responds.
	tried     []int
	triedBuf  [4]int
	passed    []int     // had no stream or no connection at once
	insists   bool      // all that there are were passed over: wait for one of them
	queued    bool      // has waited for a stream
	back      bool      // has gone back to one that was passed over
	since     time.Time // when it began to wait for a stream or a connection
	lastErr   *transport.Error
	again     bool
	refused   bool     // by REFUSED_STREAM
	suspect   bool     // may have ended a connection, or be about to
	refusal   *failure // no endpoint is asked
	firstTry  attempt
	forwarded forwarded

	send sender

	mu       sync.Mutex
	att      *attempt // whose events count, nil between attempts
	in       inbox
	pumping  bool
	waiting  bool          // the responder waits for notify
	notify   chan struct{} // capacity 1
	done     chan struct{} // closed when a responder of its own is through; nil if there is none
	writing  bool          // the responder is inside a write to the client
	over     bool          // the call has its result; later events mean nothing
	late     *failure      // what would have cut the call, had its answer not been complete
	panicked any           // what a responder of its own panicked with
	ran      bool          // run came to its end, not to a panic
	timer    *time.Timer

	waitCtx    context.Context // bounds waits for a connection; nil until one is needed
	cancelWait context.CancelFunc

	// Progress of the answer; the responder's.
	committed bool // the response head went to the client
	broken    bool // a write to the client has failed
	aborted   bool // the server must reset the client's stream
	result    *failure
	framing   grpcwire.Framing
	firstByte time.Duration

	// For stream_idle_timeout: bytes moved in both directions, and what tick saw of them when.
	moved     atomic.Int64
	movedSeen int64
	idleSince time.Time

	drained drainEntry
}

// inbox is what came from the upstream, or from a timer, and was not handled yet.
type inbox struct {
	head     []h2.Field
	headBuf  [12]h2.Field
	haveHead bool
	headEnd  bool

	data []byte

	end      bool // END_STREAM came, with the head, with data or with trailers
	trailers []h2.Field
	trailBuf [8]h2.Field

	enough bool // an answer that is not gRPC was read for long enough

	failed *transport.Error
	cut    *failure // the proxy ends the call: deadline, reload, exit, limits
}

func (b *inbox) empty() bool {
	return !b.haveHead && len(b.data) == 0 && !b.end && !b.enough && b.failed == nil && b.cut == nil
}

// run carries the call from its first attempt to its end.
func (x *exchange) run() {
	x.notify = make(chan struct{}, 1)
	x.tried = x.triedBuf[:0]
	x.forwarded = x.h.forwarded(x.r, x.call.Peer)
	x.send.init(x)
	defer x.send.release()
	defer x.abandon()
	x.carry()
	x.ran = true
}

func (x *exchange) carry() {
	if f := x.begin(); f != nil {
		x.conclude(f)
		return
	}
	x.mu.Lock()
	x.pumping = true
	if !x.in.empty() {
		x.signalLocked()
	}
	x.mu.Unlock()
	x.pump()

	x.mu.Lock()
	x.pumping = false
	done := x.done
	x.mu.Unlock()
	if done != nil {
		<-done
		if x.panicked != nil {
			panic(x.panicked)
		}
	} else {
		x.respond()
	}
}

// abandon frees everything if the call did not come to an end of its own: something in front of the proxy, which wraps the
// answer's writer or the request's body, has panicked. A responder must not outlive the handler.
func (x *exchange) abandon() {
	if x.ran {
		return
	}
	f := proxyFailure(grpcwire.Internal, reasonAborted, "a handler in front of the proxy aborted the call")
	x.mu.Lock()
	x.pumping = false // no responder is started any more
	done := x.done
	x.mu.Unlock()
	x.cut(f)
	if done != nil {
		<-done
	}
	x.leaveUpstream(h2.Cancel)
	if x.result == nil {
		x.result = f
	}
}

// signalLocked lets the responder know that the inbox has something, starting one if the server's goroutine is still busy
// with the request. mu is held.
func (x *exchange) signalLocked() {
	switch {
	case x.waiting:
		x.waiting = false
		x.notify <- struct{}{}
	case x.pumping && x.done == nil:
		x.done = make(chan struct{})
		go x.respondBeside()
	}
}

// respondBeside responds while the request is still being pumped, and ends the pump when the answer is over.
func (x *exchange) respondBeside() {
	defer close(x.done)
	defer x.stopReading()
	defer func() {
		// A panic of a handler's writer belongs to the server's goroutine, which knows what to do about it.
		if p := recover(); p != nil {
			x.panicked = p
			x.leaveUpstream(h2.Cancel)
		}
	}()
	x.respond()
}

// stopReading releases a pump that reads the request, after send was stopped.
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

// Refresh brings the time that is left up to date when the call has waited for a connection (gRFC A31, PROTOCOL-HTTP2.md:
// the next hop gets what remains).
func (x *exchange) Refresh(fields []h2.Field) {
	d := x.call.Deadline
	if d.IsZero() {
		return
	}
	for i := range fields {
		if fields[i].Name == "grpc-timeout" {
			fields[i].Value = grpcwire.FormatTimeout(time.Until(d))
			return
		}
	}
}

// Wait tells the transport how long the call may wait for a connection.
func (x *exchange) Wait() (<-chan struct{}, time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.waitCtx == nil {
		x.waitCtx, x.cancelWait = context.WithCancel(x.r.Context())
		if x.in.cut != nil {
			x.cancelWait()
		}
	}
	return x.waitCtx.Done(), x.call.Deadline
}
