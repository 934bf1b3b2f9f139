package grpcproxy

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// maxExcerpt is how much of a body that is not gRPC is kept for the status message. Envoy keeps 16 KiB; percent-encoded
// in a header field, that alone exceeds what many clients accept.
const (
	maxExcerpt = 1 << 10
	// excerptTime is how long such a body is waited for.
	excerptTime = time.Second
)

// event is what the responder has to handle next.
type event struct {
	head     []h2.Field
	haveHead bool
	headEnd  bool
	data     []byte
	end      bool
	enough   bool
	trailers []h2.Field
	failed   *transport.Error
	cut      *failure
}

// answer is what is known of the upstream's answer.
type answer struct {
	foreign     bool // not gRPC: its start is kept for the message
	httpStatus  int
	contentType string
	excerpt     []byte
}

// respond carries the answer to the client, up to the call's end.
func (x *exchange) respond() {
	x.conclude(x.relay())
}

// relay handles one event after the other. It returns nil when the upstream's answer was passed on to its end, else
// what ended the call.
func (x *exchange) relay() *failure {
	var (
		ans       answer
		unflushed bool
	)
	for {
		ev := x.next(unflushed)
		unflushed = false
		if ev.cut != nil {
			putBuffer(ev.data)
			return ev.cut
		}
		if ev.haveHead {
			if done, f := x.relayHead(&ans, ev); done || f != nil {
				putBuffer(ev.data)
				return f
			}
			unflushed = true
		}
		if len(ev.data) > 0 {
			if err := x.relayData(&ans, ev.data); err != nil {
				return x.cutOr(clientGone())
			}
			unflushed = true
		}
		switch {
		case ev.end:
			if err := x.flushLast(); err != nil {
				return x.cutOr(clientGone())
			}
			return x.relayEnd(&ans, ev.trailers)
		case ev.failed != nil && x.committed:
			return x.failed(ev.failed)
		case ev.failed != nil && ans.foreign:
			return x.relayForeign(&ans, nil)
		case ev.failed != nil:
			if f := x.retryOrFail(ev.failed); f != nil {
				return f
			}
		case ans.foreign && (ev.enough || len(ans.excerpt) >= maxExcerpt):
			return x.relayForeign(&ans, nil)
		}
	}
}

// next waits for something to do. While it would have to wait and something is unflushed, it flushes first.
func (x *exchange) next(unflushed bool) event {
	x.mu.Lock()
	defer x.mu.Unlock()
	for x.in.empty() {
		if unflushed && x.committed {
			unflushed = false
			if err := x.flushUnlocked(); err != nil {
				x.broken = true
				if x.in.cut == nil {
					x.in.cut = cmp.Or(x.late, clientGone())
				}
			}
			continue
		}
		done := x.r.Context().Done()
		x.waiting = true
		x.mu.Unlock()
		gone := false
		select {
		case <-x.notify:
		case <-done:
			gone = true
		}
		x.mu.Lock()
		if gone {
			if !x.waiting { // the signal came as well
				<-x.notify
			}
			x.waiting = false
			if x.in.cut == nil {
				x.in.cut = clientGone()
			}
		}
	}
	ev := event{
		head: x.in.head, haveHead: x.in.haveHead, headEnd: x.in.headEnd,
		data: x.in.data, end: x.in.end, enough: x.in.enough, trailers: x.in.trailers, failed: x.in.failed, cut: x.in.cut,
	}
	x.in.haveHead, x.in.data, x.in.failed = false, nil, nil
	return ev
}

// flushUnlocked flushes what was written. It is called with mu held, as it is again when it returns or panics.
func (x *exchange) flushUnlocked() error {
	x.writing = true
	x.mu.Unlock()
	defer func() {
		x.mu.Lock()
		x.writing = false
	}()
	return x.flusher.Flush()
}

// flushLast waits until the client has room for the last of the answer's messages. Left to the server, which does the same
// when the handler has returned, they would wait for a client that does not read without any limit: no deadline, no
// timeout and no exit would reach the call any more.
func (x *exchange) flushLast() error {
	if !x.committed || x.call.Result.ReceivedBytes == 0 {
		return nil
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	err := x.flushUnlocked()
	x.broken = x.broken || err != nil
	return err
}

// relayHead handles the response head. done means that it was the whole answer.
func (x *exchange) relayHead(ans *answer, ev event) (done bool, f *failure) {
	status, _ := fieldValue(ev.head, ":status")
	ans.httpStatus, _ = strconv.Atoi(status)
	ans.contentType, _ = fieldValue(ev.head, "content-type")
	isGRPC := ans.httpStatus == http.StatusOK && grpcwire.ContentKind(ans.contentType) == grpcwire.GRPC

	switch {
	case ev.headEnd && (isGRPC || saysFailure(ev.head)):
		x.writeTrailersOnly(ev.head)
		return true, nil
	case isGRPC:
		x.writeHead(withoutStatus(ev.head))
		return false, nil
	case ev.headEnd:
		return true, fromHTTP(ans.httpStatus, ans.contentType, nil, x.call.Result.Upstream)
	}
	ans.foreign = true
	time.AfterFunc(excerptTime, x.enough)
	return false, nil
}

// saysFailure tells whether the end of an answer that is not gRPC has a status that counts. OK is none: what came with it, or
// should have, is not for a gRPC client to read, and without it the call has not succeeded.
func saysFailure(fields []h2.Field) bool {
	v, ok := fieldValue(fields, "grpc-status")
	if !ok {
		return false
	}
	code, valid := grpcwire.ParseStatus(v)
	return !valid || code != grpcwire.OK
}

// withoutStatus takes the status out of a head that does not end its stream: there it does not count, and a client that reads
// it all the same must not take it for the call's.
func withoutStatus(head []h2.Field) []h2.Field {
	return slices.DeleteFunc(head, func(f h2.Field) bool { return isStatusField(f.Name) })
}

func isStatusField(name string) bool {
	return name == "grpc-status" || name == "grpc-message" || name == "grpc-status-details-bin"
}

// enough ends the reading of an answer that is not gRPC, whose body may never end.
func (x *exchange) enough() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.in.enough = true
	if !x.over {
		x.signalLocked()
	}
}

// relayData passes data on, or keeps its start if the answer is not gRPC.
func (x *exchange) relayData(ans *answer, p []byte) error {
	defer putBuffer(p)
	stream := x.att.stream
	if ans.foreign {
		ans.excerpt = append(ans.excerpt, p[:min(len(p), maxExcerpt-len(ans.excerpt))]...)
		stream.Consumed(len(p))
		return nil
	}
	x.mu.Lock()
	x.writing = true
	stop := x.in.cut != nil
	x.mu.Unlock()
	var err error
	if !stop {
		before := x.framing.Messages()
		x.framing.Add(p)
		x.att.worked(x.framing.Messages()-before, len(p))
		x.call.Result.ReceivedBytes += int64(len(p))
		_, err = x.w.Write(p)
	}
	x.mu.Lock()
	x.writing = false
	x.mu.Unlock()
	if err == nil {
		stream.Consumed(len(p))
	} else {
		x.broken = true
	}
	return err
}

// relayEnd handles END_STREAM after the head.
func (x *exchange) relayEnd(ans *answer, trailers []h2.Field) *failure {
	if ans.foreign {
		return x.relayForeign(ans, trailers)
	}
	if trailers == nil {
		return x.incomplete(reasonNoTrailers, "the upstream closed the stream without sending trailers")
	}
	if !x.framing.AtBoundary() && !x.framing.Bad() && !saysFailure(trailers) {
		return x.incomplete(reasonIncomplete, "the upstream's answer ends inside a message")
	}
	x.writeTrailers(trailers)
	return nil
}

// incomplete is an answer of which something is missing, whatever its status.
func (x *exchange) incomplete(reason, message string) *failure {
	return &failure{
		code: grpcwire.Internal, reason: reason, message: message,
		endedBy: call.EndedByUpstream, source: call.SourceProxy, endpoint: x.call.Result.Upstream,
	}
}

// relayForeign ends an answer that is not gRPC. Only without grpc-status the HTTP status counts
// (http-grpc-status-mapping.md).
func (x *exchange) relayForeign(ans *answer, trailers []h2.Field) *failure {
	if saysFailure(trailers) {
		x.writeTrailersOnly(trailers)
		return nil
	}
	return fromHTTP(ans.httpStatus, ans.contentType, ans.excerpt, x.call.Result.Upstream)
}

// retryOrFail handles the end of an attempt before the call was committed.
func (x *exchange) retryOrFail(err *transport.Error) *failure {
	if f := x.retry(err); f != nil {
		return x.judge(f, err)
	}
	return nil
}

// failed handles the end of the attempt after the call was committed.
func (x *exchange) failed(err *transport.Error) *failure {
	return x.judge(fromTransport(err), err)
}

// deadlineSlack is how much earlier than here the deadline may pass at the others: an upstream was told the time that
// remained, rounded down; the client began to count before its call came; and all have clocks of their own.
const deadlineSlack = 5 * time.Millisecond

// judge tells a deadline from a cancellation: a CANCEL seen at or after the call's own deadline is the deadline's.
func (x *exchange) judge(f *failure, err *transport.Error) *failure {
	if err.Kind == transport.KindReset && err.Code == h2.Cancel && x.deadlineNear() {
		return deadlineExceeded()
	}
	return f
}

// deadlineNear tells whether the deadline has passed for somebody.
func (x *exchange) deadlineNear() bool {
	d := x.call.Deadline
	return !d.IsZero() && time.Until(d) < deadlineSlack
}

func (x *exchange) deadlinePassed() bool {
	d := x.call.Deadline
	return !d.IsZero() && !time.Now().Before(d)
}

// writeGrace is how long a client that does not read may still take in what is being written when its call is cut. It
// is shorter than exitMargin.
const writeGrace = 100 * time.Millisecond

// cut ends the call from outside: a timer, a reload, an exit, a request that cannot be read. A call whose answer has come
// to its end is left to it, unless the client does not take it.
func (x *exchange) cut(f *failure) {
	x.mu.Lock()
	if x.over || x.in.cut != nil {
		x.mu.Unlock()
		return
	}
	if x.writing || x.in.end && x.r.ProtoMajor > 1 {
		// The responder waits for a client that does not read, or soon may; trailers could not reach it either. With mu
		// held: once the handler has returned, its deadlines must not be touched.
		_ = x.deadlines.SetWriteDeadline(time.Now().Add(writeGrace))
	}
	if x.in.end {
		x.late = f
		x.mu.Unlock()
		return
	}
	x.in.cut = f
	if x.cancelWait != nil {
		x.cancelWait()
	}
	var stream *h2.Stream
	if x.att != nil {
		stream = x.att.stream
	}
	x.signalLocked()
	x.mu.Unlock()
	if stream != nil {
		// At once, whatever the responder is busy with; conclude does it again, to no effect.
		stream.Reset(h2.Cancel)
		stream.Conn().Flush()
	}
}

// cutOr returns why the proxy ends the call, f if it does not.
func (x *exchange) cutOr(f *failure) *failure {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case x.in.cut != nil:
		return x.in.cut
	case x.late != nil:
		return x.late
	}
	return f
}

// conclude ends the call on both sides. f is nil when the upstream's answer was passed on whole.
func (x *exchange) conclude(f *failure) {
	if f == nil {
		x.leaveUpstream(h2.NoError) // the answer is whole: the rest of the request is not needed
		return
	}
	x.leaveUpstream(h2.Cancel)
	if f.endedBy == call.EndedByClient {
		f = x.notTheClient(f)
	}
	x.result = f
	switch {
	case errors.Is(x.r.Context().Err(), context.Canceled) && x.r.ProtoMajor > 1:
		// Nobody is there to be told. A client of HTTP/1 that has closed its own half may be there still, and would take the
		// server's blank answer for one.
	case !x.committed:
		x.answer(f)
	case !x.broken && x.framing.AtBoundary():
		// linkerd2-proxy's way: an answer that has begun ends with a status too.
		x.setStatus(http.TrailerPrefix, f)
	default:
		// Inside a message a status would be read as the message's own end: reset. Nor can there be one if a write
		// has failed, which HTTP/2 makes a reset by itself, but HTTP/3 does not.
		x.aborted = true
	}
}

// notTheClient tells what else ends a call in the way of a client that goes away: a deadline that passes, and the server.
func (x *exchange) notTheClient(gone *failure) *failure {
	var f *failure
	if x.deadlineNear() {
		f = deadlineExceeded()
	} else if limit, over := x.writeTimeoutOver(); over {
		f = writeTimeout(limit)
	} else {
		return gone
	}
	f.err = gone.err
	return f
}

// leaveUpstream ends the call on the upstream's side. What still comes from there means nothing any more.
func (x *exchange) leaveUpstream(code h2.ErrCode) {
	x.mu.Lock()
	x.over = true
	a := x.att
	putBuffer(x.in.data)
	x.in.data = nil
	x.mu.Unlock()

	// The stream first: it frees a pump that flow control holds up.
	if a != nil && a.stream != nil {
		a.stream.Reset(code)
		a.stream.Conn().Flush()
	}
	x.send.stop()
}
