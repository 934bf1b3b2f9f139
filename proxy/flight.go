package proxy

import (
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// phase is how far a flight is.
//
//	            client's data   upstream's answer   a failed attempt     the client's reset
//	choosing    is kept         -                   another one          ends it
//	sending     is sent, kept   commits to it       another one, or end  ends it
//	committed   is sent         goes to the client  ends it              ends it
//	closing     is dropped      -                   -                    ends it
//	over        -               -                   -                    -
type phase uint8

const (
	// choosing: there is no attempt, or it is parked at its endpoint.
	choosing phase = iota
	// sending: an attempt has a stream.
	sending
	// committed: the response head of an attempt went to the client.
	committed
	// closing: all of the answer was handed to the client's side, which has not sent it all.
	closing
	// over: the call has its Result.
	over
)

// Flight is one call. It owns no goroutine and never waits: whatever happens to it comes as an event, from both connections and from
// its timer, and one goroutine at a time handles them (run).
//
// The inbound that has the client's side fills Call and Request and calls Serve.
type Flight struct {
	// Call describes the call. Serve fills in service, method and deadline. Its Result is final when Downstream.Done is called.
	Call    call.Call
	Request Request

	p *Proxy
	d Downstream
	// recycler is told, once, if nobody will touch the flight any more.
	recycler Recycler

	mu      sync.Mutex // LOCKS: guards events and running only; it is never held while anything else is called
	events  []event
	spare   []event // what events is to be when run takes it
	running bool

	// on is the endpoint of the current attempt, and moved counts what has moved on the call, for those who look from outside.
	on    atomic.Pointer[transport.Endpoint]
	moved atomic.Int64

	drained drainEntry
	timer   timer

	progress
}

// progress is what belongs to run.
type progress struct {
	reader *h2.Conn // on whose reading goroutine run runs
	phase  phase
	result *Failure // why the call has no whole answer from the upstream
	late   *Failure // what would have cut the call, had its answer not been complete

	choice choice
	first  attempt
	atts   [2]*attempt // that are under way
	replay replay
	answer answer
	// contentType is the request's, for answers that the proxy makes.
	contentType string
	suspect     bool // may have ended a connection, or be about to
	// granting is how many attempts were given up just when they were about to be told of a stream.
	granting int

	flushUp   *h2.Conn // to be flushed
	flushSoon bool
	flushDown bool
}

// Serve begins the call. d hears of what comes of it. reader is the connection on whose reading goroutine this runs, if it is one.
func (p *Proxy) Serve(f *Flight, d Downstream, reader *h2.Conn) {
	f.p, f.d = p, d
	f.recycler, _ = d.(Recycler)
	f.replay.keep = true
	f.push(&event{kind: evStart}, reader)
}

// The client's side tells the flight what happens there.

// Data takes a piece of the request, end that it is the last one.
func (f *Flight) Data(p []byte, end bool, reader *h2.Conn) {
	f.push(&event{kind: evData, data: p, end: end}, reader)
}

// Writable tells that Downstream.Data takes more.
func (f *Flight) Writable() { f.push(&event{kind: evWritable}, nil) }

// Sent tells that so much of what Downstream.Data has taken has left.
func (f *Flight) Sent(n int) { f.push(&event{kind: evSent, n: n}, nil) }

// Cut ends the call: the client is gone, its request cannot be read, the proxy has to stop. A call whose answer has been handed to
// the client's side is left to it, unless the client does not take it.
func (f *Flight) Cut(why *Failure) { f.push(&event{kind: evCut, failure: why}, nil) }

// Abandon ends a call whose client cannot be told anything any more. why is ClientGone, or what else has made it so.
func (f *Flight) Abandon(why *Failure, reader *h2.Conn) {
	f.push(&event{kind: evAbandon, failure: why}, reader)
}

// event is something that happens to a flight.
type event struct {
	kind    eventKind
	end     bool
	n       int
	data    []byte
	fields  []h2.Field
	att     *attempt
	stream  *h2.Stream
	failure *Failure
	err     *transport.Error
}

type eventKind uint8

const (
	evStart eventKind = iota
	evData
	evWritable
	evSent
	evCut
	evAbandon  // by the client
	evHead     // of an answer, with end
	evBody     // of an answer, with end
	evTrailers // of an answer
	evFailed   // an attempt's stream
	evReady    // an attempt's stream takes more
	evMemory   // too much of an answer is held
	evOpened   // a parked attempt has a stream
	evRefused  // a parked attempt gets none
	evNews     // from the cluster
	evTick     // of the timer
)

// keep makes an event last: what receivers are given is theirs only as long as they run.
func (e *event) keep() {
	if len(e.data) > 0 {
		e.data = AppendPooled(nil, e.data)
	} else {
		e.data = nil // it may be an end of somebody else's memory, which must not get into the pools
	}
	if e.fields != nil {
		e.fields = append(make([]h2.Field, 0, len(e.fields)), e.fields...)
	}
}

// push adds an event. Who finds nobody running runs the flight until there is none left; bytes are copied only for those who
// find somebody.
func (f *Flight) push(e *event, reader *h2.Conn) {
	f.mu.Lock()
	if f.running {
		e.keep()
		f.events = append(f.events, *e)
		f.mu.Unlock()
		return
	}
	f.running = true
	f.mu.Unlock()
	f.run(e, reader)
}

func (f *Flight) run(e *event, reader *h2.Conn) {
	f.reader = reader
	f.step(e)
	for {
		f.mu.Lock()
		if len(f.events) == 0 {
			done := f.d == nil
			if f.flushUp == nil && !f.flushDown && (!done || f.recycler == nil) {
				f.events, f.spare = nil, nil
				f.running = false
				f.mu.Unlock()
				return
			}
			f.mu.Unlock()
			f.flush()
			if done && f.recycle() {
				return
			}
			continue
		}
		events := f.events
		f.events, f.spare = f.spare, nil
		f.mu.Unlock()
		for i := range events {
			f.step(&events[i])
			PutBuffer(events[i].data)
		}
		clear(events)
		f.spare = events[:0]
	}
}

// step handles one event. A panic in a policy, a rule or an observer ends the call, not the process.
func (f *Flight) step(e *event) {
	defer func() {
		if p := recover(); p != nil {
			f.panicked(p)
		}
	}()
	f.handle(e)
}

func (f *Flight) panicked(p any) {
	f.p.cfg.Logger.Error("panic in a call", zap.String("path", f.Call.Path), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
	if f.phase == over {
		return
	}
	defer func() { _ = recover() }() // whoever panics when he is told of the end is not told any more
	defer func() {
		if f.phase != over {
			f.finish()
		}
	}()
	f.result = Fail(grpcwire.Internal, ReasonAborted, "the proxy panicked")
	f.d.Reset(h2.InternalError)
	f.leave(h2.InternalError)
}

func (f *Flight) handle(e *event) {
	if f.phase == over {
		f.afterwards(e)
		return
	}
	switch e.kind {
	case evStart:
		f.start()
	case evData:
		f.take(e.data, e.end)
	case evWritable:
		f.drainAnswer()
	case evSent:
		f.sent(e.n)
	case evCut:
		f.cut(e.failure)
	case evAbandon:
		f.abandon(f.notTheClient(e.failure))
	case evNews:
		f.news()
	case evTick:
		f.tick()
	case evOpened:
		f.opened(e.att, e.stream)
	case evRefused:
		f.refused(e.att, e.err)
	default:
		f.upstreams(e)
	}
}

// upstreams handles what comes from an attempt's stream.
func (f *Flight) upstreams(e *event) {
	a := e.att
	if !a.live {
		if e.kind == evBody && e.stream != nil {
			e.stream.Consumed(len(e.data))
		}
		return
	}
	if a.stream == nil { // it is ahead of evOpened
		f.opened(a, e.stream)
	}
	switch e.kind {
	case evHead:
		f.head(a, e.fields, e.end)
	case evBody:
		f.body(a, e.data, e.end)
	case evTrailers:
		f.trailers(a, e.fields)
	case evFailed:
		f.failed(a, e.err)
	case evReady:
		f.feed(a)
	case evMemory:
		f.cut(fromTransport(e.err))
	case evStart, evData, evWritable, evSent, evCut, evAbandon, evOpened, evRefused, evNews, evTick: // not from a stream
	}
}

// afterwards handles what comes when the call is over.
func (f *Flight) afterwards(e *event) {
	switch e.kind {
	case evOpened:
		f.opened(e.att, e.stream)
	case evRefused:
		f.refused(e.att, e.err)
	case evBody:
		e.stream.Consumed(len(e.data))
	case evStart, evData, evWritable, evSent, evCut, evAbandon, evHead, evTrailers, evFailed, evReady, evMemory, evNews, evTick: // too late
	}
}

// touch notes that something was written to an upstream's connection. soon: more may follow at once.
func (f *Flight) touch(c *h2.Conn, soon bool) {
	if f.flushUp != nil && f.flushUp != c {
		f.flush()
	}
	f.flushUp, f.flushSoon = c, soon
}

// quietConn is how many streams a connection may have for its frames to be sent one by one.
const quietConn = 4

// flush lets what was written leave: at the end of the reader's batch, or now.
func (f *Flight) flush() {
	if c := f.flushUp; c != nil {
		f.flushUp = nil
		switch {
		case f.reader != nil:
			f.reader.FlushAfter(c)
		case f.flushSoon || c.Streams() > quietConn:
			c.FlushSoon()
		default:
			c.Flush()
		}
	}
	if f.flushDown {
		f.flushDown = false
		f.d.Flush(f.reader)
	}
}

// start settles what the call is, and looks for its endpoint.
func (f *Flight) start() {
	c := &f.Call
	if c.Start.IsZero() {
		c.Start = time.Now()
	}
	f.choice.tried = f.choice.triedBuf[:0]
	f.contentType, _ = field(f.Request.Fields, "content-type")
	if why := f.classify(); why != nil {
		f.conclude(why)
		return
	}
	f.startTimer()
	if why := f.p.drain.enter(f); why != nil {
		f.conclude(why)
		return
	}
	f.choice.view = f.p.cfg.Cluster.View()
	f.choose()
}

// classify splits the path and settles the deadline. It refuses what no upstream could make sense of.
func (f *Flight) classify() *Failure {
	c := &f.Call
	var ok bool
	if c.Service, c.Method, ok = grpcwire.SplitMethod(c.Path); !ok {
		// grpc-go's server: "malformed method name" is UNIMPLEMENTED.
		return Fail(grpcwire.Unimplemented, ReasonBadPath, badPath(c.Path)+f.Request.PathHint)
	}
	if f.Request.Refusal != nil {
		return f.Request.Refusal
	}
	if v, ok := field(f.Request.Fields, "grpc-timeout"); ok {
		d, err := grpcwire.ParseTimeout(v)
		if err != nil {
			// grpc-go's server answers a malformed grpc-timeout with INTERNAL.
			return Fail(grpcwire.Internal, ReasonBadTimeout, err.Error())
		}
		if own := c.Start.Add(d); c.Deadline.IsZero() || own.Before(c.Deadline) {
			c.Deadline = own
		}
	}
	// gRFC A31: the effective deadline is the earlier of the client's and the route's.
	if m := f.p.cfg.MaxTimeout; m > 0 {
		if latest := c.Start.Add(m); c.Deadline.IsZero() || latest.Before(c.Deadline) {
			c.Deadline = latest
		}
	}
	return nil
}

// WriteGrace is how long a client may still take in what is there for it when its call is cut. It is shorter than what is kept of a
// grace period for the last frames.
const WriteGrace = 100 * time.Millisecond

// cut ends the call from outside. One whose answer is complete is left to it, for as long as the client takes it.
func (f *Flight) cut(why *Failure) {
	switch {
	case !f.answer.complete:
		f.conclude(why)
	case f.late == nil:
		f.late = why
		f.timer.late = time.Now().Add(WriteGrace)
		f.arm()
	}
}

// notTheClient tells what else ends a call in the way of a client that goes away.
func (f *Flight) notTheClient(gone *Failure) *Failure {
	why := gone
	switch {
	case f.late != nil:
		why = f.late
	case f.deadlineNear():
		why = deadlineExceeded()
		why.Err = gone.Err
	}
	return why
}

// abandon ends the call without a status for the client.
func (f *Flight) abandon(why *Failure) {
	f.result = why
	f.leave(h2.Cancel)
	f.d.Reset(h2.Cancel)
	f.flushDown = true
	f.finish()
}

// conclude ends the call on both sides with a status.
func (f *Flight) conclude(why *Failure) {
	if why.EndedBy == call.EndedByClient {
		why = f.notTheClient(why)
	}
	f.result = why
	f.leave(h2.Cancel)
	a := &f.answer
	switch {
	case f.phase != committed:
		f.d.Head(f.refusal(why), true)
	case !a.rest.empty() || !a.framing.AtBoundary():
		// Inside a message a status would be read as the message's own end: reset.
		f.d.Reset(h2.InternalError)
	default:
		// linkerd2-proxy's way: an answer that has begun ends with a status too.
		f.d.Trailers(why.appendTo(nil, f.Call.Result.Attempts, f.p.cfg.ExposeUpstream), true)
	}
	f.flushDown = true
	f.finish()
}

// leave ends the call on the upstreams' side. What still comes from there means nothing any more.
func (f *Flight) leave(code h2.ErrCode) {
	f.unwait()
	if a := f.atts[1]; a != nil {
		f.giveUp(a)
	}
	if a := f.atts[0]; a != nil {
		f.abort(a, code)
	}
}

// finish makes the Result, and tells everyone who wants to know.
func (f *Flight) finish() {
	f.phase = over
	f.timer.stop()
	f.p.drain.leave(f)
	c := &f.Call
	r := &c.Result
	now := time.Now()
	r.Latency = now.Sub(c.Start)
	r.SentBytes, r.SentMessages = f.replay.left, f.replay.framing.Messages()
	r.ReceivedMessages = f.answer.framing.Messages()
	if why := f.result; why != nil {
		r.Code, r.Message, r.Reason = why.Code, why.Message, why.Reason
		r.EndedBy, r.Source = why.EndedBy, why.Source
	}
	f.replay.release()
	f.answer.rest.release()
	defer f.finished() // even if somebody panics who is told
	defer f.tellObservers(f.p.cfg.Observers)
	defer f.logFailure() // whoever reads it finds the call counted
	if a := f.choice.last; a != nil {
		f.over(a, now)
		if f.gaveUp(a) {
			f.p.cancels.note(c.ClientIP, now)
		}
	}
}

// tellObservers tells all of them, even if one panics.
func (f *Flight) tellObservers(all []Observer) {
	if len(all) > 0 {
		defer f.tellObservers(all[1:])
		all[0].Over(&f.Call)
	}
}

// finished tells the client's side that nothing will be called any more: no attempt is about to be told of a stream.
func (f *Flight) finished() {
	if d := f.d; d != nil && f.phase == over && f.granting == 0 {
		f.flush()
		f.d = nil
		d.Done()
	}
}
