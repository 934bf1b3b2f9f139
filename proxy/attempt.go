package proxy

import (
	"errors"
	"time"
	"weak"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// attempt is one try of a call on one endpoint. It receives what the upstream sends, and is told of the stream it waits for.
type attempt struct {
	f     *Flight
	end   cluster.Endpoint
	pick  selection.Pick
	trial upstream.Trial      // set if the endpoint is on probation, and this is its one call
	conns *transport.Endpoint // end's, or the part of them that is for this call

	// ticket and head are the transport's while the attempt waits.
	ticket transport.Ticket
	head   *[]h2.Field

	stream *h2.Stream
	live   bool // what comes from its stream counts
	waits  bool // it is parked, or about to be told of a stream
	broken bool // nothing can be written any more
	ended  bool // END_STREAM was sent
	sent   int64
	work   *upstream.Work // nil unless it is counted

	// An answer that is not gRPC stays the attempt's.
	httpStatus  int
	contentType string
	excerpt     []byte
	foreign     bool

	// What is to be known of it.
	timed    bool
	answered bool
	told     bool
	asked    time.Duration // from the start to the last piece of the request that was sent before the answer began
	openedAt time.Time     // when the stream was opened, if the call had to wait for it
	outcome  call.Attempt
}

// attempt begins an attempt on a picked endpoint. It returns nil if the endpoint is on probation and has its one call already, which
// does not count in a panic.
func (f *Flight) attempt(pick selection.Pick) *attempt {
	a := &f.first
	if a.f != nil {
		a = new(attempt)
	}
	// One by one: a literal of this size would be made on the stack first, which would have to grow.
	a.f, a.end, a.pick, a.live = f, f.choice.view.Endpoints[pick.Index], pick, true
	var ok bool
	if a.trial, ok = a.end.State.TryBegin(); !ok {
		if !f.choice.view.Panic {
			*a = attempt{}
			return nil
		}
		a.end.State.Begin()
	}
	needs := pick.Needs()
	a.timed = needs.FirstMessage || f.p.latency
	if needs.Work {
		a.work = a.end.State.Work()
	}
	if a.outcome.Start = f.Call.Start; f.choice.waited || f.Call.Result.Attempts > 0 {
		a.outcome.Start = time.Now()
	}
	for i := range f.atts {
		if f.atts[i] == nil {
			f.atts[i] = a
			break
		}
	}
	f.on.Store(a.end.Endpoint)
	f.Call.Result.Attempts++
	f.Call.Result.Upstream = a.end.Address()
	return a
}

// remove takes an attempt out of those that are under way.
func (f *Flight) remove(a *attempt) {
	a.live = false
	a.end.State.End()
	switch a {
	case f.atts[0]:
		f.atts[0], f.atts[1] = f.atts[1], nil
	case f.atts[1]:
		f.atts[1] = nil
	}
	f.on.Store(nil)
	if b := f.atts[0]; b != nil {
		f.on.Store(b.end.Endpoint)
	}
}

// Head implements transport.Opener. It fills in the time that is left (gRFC A31, PROTOCOL-HTTP2.md: the next hop gets what remains).
func (a *attempt) Head() ([]h2.Field, bool, h2.Receiver) {
	if !a.f.Call.Deadline.IsZero() {
		for i := range *a.head {
			if e := &(*a.head)[i]; e.Name == "grpc-timeout" {
				e.Value = grpcwire.FormatTimeout(time.Until(a.f.Call.Deadline))
				break
			}
		}
	}
	return *a.head, false, a
}

// Opened implements transport.Opener.
func (a *attempt) Opened(s *h2.Stream) {
	a.f.push(&event{kind: evOpened, att: a, stream: s}, nil)
}

// Refused implements transport.Opener.
func (a *attempt) Refused(err *transport.Error) {
	a.f.push(&event{kind: evRefused, att: a, err: err}, nil)
}

// RecvHead implements h2.Receiver.
func (a *attempt) RecvHead(s *h2.Stream, fields []h2.Field, end bool) {
	if v, _ := field(fields, ":status"); len(v) == 3 && v[0] == '1' {
		return // informational: gRPC has no use for it, and it is not final
	}
	a.f.push(&event{kind: evHead, att: a, stream: s, fields: fields, end: end}, s.Conn())
}

// RecvData implements h2.Receiver.
func (a *attempt) RecvData(s *h2.Stream, p []byte, end bool) {
	a.f.push(&event{kind: evBody, att: a, stream: s, data: p, end: end}, s.Conn())
}

// RecvTrailers implements h2.Receiver.
func (a *attempt) RecvTrailers(s *h2.Stream, fields []h2.Field) {
	a.f.push(&event{kind: evTrailers, att: a, stream: s, fields: fields}, s.Conn())
}

// RecvReset implements h2.Receiver. It may come from any goroutine.
func (a *attempt) RecvReset(s *h2.Stream, err *h2.Error) {
	kind := evFailed
	if err.Kind == h2.KindMemory {
		kind = evMemory // what is held waits for a client that does not read, and must not wait longer
	}
	a.f.push(&event{kind: kind, att: a, stream: s, err: transport.FromStream(err, a.end.Address())}, nil)
}

// RecvWriteReady implements h2.WriteReadier.
func (a *attempt) RecvWriteReady(s *h2.Stream) {
	a.f.push(&event{kind: evReady, att: a, stream: s}, nil)
}

// opened takes an attempt's stream, and sends what has come of the request.
func (f *Flight) opened(a *attempt, s *h2.Stream) {
	waited := a.waits
	a.waits = false
	switch {
	case !a.live && waited: // it was given up when it was about to be told
		s.Reset(h2.Cancel)
		f.touch(s.Conn(), false)
		f.dropHead(a)
		f.granting--
		f.finished()
		return
	case !a.live || a.stream != nil: // its events were faster
		return
	}
	a.stream = s
	f.dropHead(a)
	f.unwait()
	f.choice.since = time.Time{}
	if f.choice.queued && !f.Call.Deadline.IsZero() {
		a.openedAt = time.Now()
	}
	if f.phase == choosing {
		f.phase = sending
	}
	f.touch(s.Conn(), true)
	f.keeps(0) // while there was no stream, more may have come than is kept for another try
	f.feed(a)
}

// failed handles the end of an attempt's stream that is not the end of an answer.
func (f *Flight) failed(a *attempt, err *transport.Error) {
	switch {
	case f.answer.complete || a.foreign && f.phase != committed && f.foreignEnd(a, nil):
		// After the answer's end a reset means only that the rest of the request is not wanted (RFC 9113 section 8.1).
		return
	case f.phase == committed:
		f.endAnswer(a, f.judge(fromTransport(err), err))
		return
	}
	f.remove(a)
	f.fruitless(a, err)
	c := &f.choice
	c.hasTried(a)
	if why := f.decide(err); why != nil {
		c.last, c.never = a, f.judge(why, err)
	} else {
		f.logAttempt(err)
		c.since = time.Time{}
	}
	switch b := f.atts[0]; {
	case b == nil:
		f.phase = choosing
		f.choose()
	case b.stream == nil:
		f.phase = choosing
	}
}

// decide tells whether a call whose attempt has failed may be sent again: it returns why it must not.
func (f *Flight) decide(err *transport.Error) *Failure {
	c := &f.choice
	if !err.Unprocessed || !f.replay.keep {
		return fromTransport(err)
	}
	c.lastErr = err
	if err.Kind == transport.KindGoAway && err.Code != h2.NoError {
		// The upstream ends the connection for what somebody has sent on it, perhaps this call. It gets another try where it
		// can harm nobody who has not been suspected as well, and no third one.
		if f.suspect {
			return f.exhausted()
		}
		f.suspect = true
	}
	// gRFC A6: a call that left and was not processed is sent again once. That is for upstreams that are too busy for it: if
	// all were asked, they would be all the busier. One that shuts down says nothing of the others.
	refused := err.Kind == transport.KindReset
	if err.Sent && (c.again || refused && c.refused) {
		return f.exhausted()
	}
	c.refused = c.refused || refused
	return nil
}

// abort ends an attempt that is under way.
func (f *Flight) abort(a *attempt, code h2.ErrCode) {
	f.remove(a)
	f.choice.last = a
	switch {
	case a.stream != nil:
		closed := a.stream.Closed()
		if a.stream.Reset(code); !closed { // else there is nothing to flush
			f.touch(a.stream.Conn(), false)
		}
	case a.waits && a.conns.Leave(&a.ticket):
		a.waits = false
	case a.waits: // it is about to be told
		f.granting++
		return
	}
	f.dropHead(a)
}

// giveUp ends an attempt that the call does without, since another one is better.
func (f *Flight) giveUp(a *attempt) {
	f.abort(a, h2.Cancel)
	if f.isStudied(a) {
		o := &a.outcome
		o.Code, o.EndedBy, o.Source = grpcwire.Canceled, call.EndedByProxy, call.SourceProxy
		f.tell(a, time.Now())
	}
}

// responded notes that the answer has begun with its first message, or has ended.
func (f *Flight) responded(a *attempt) {
	if a.answered {
		return
	}
	a.answered = true
	if a.timed {
		a.outcome.Served = time.Since(a.outcome.Start) - a.asked
		a.pick.Responded(a.outcome.Served)
	}
	if a.trial != 0 && f.p.cfg.Health != nil {
		f.p.cfg.Health.Responded(a.end.State, a.trial)
	}
}

// fruitless tells of an attempt after which the call may be tried elsewhere.
func (f *Flight) fruitless(a *attempt, err *transport.Error) {
	if !f.isStudied(a) {
		return
	}
	why := fromTransport(err)
	o := &a.outcome
	o.Code, o.Source, o.EndedBy = why.Code, why.Source, endedBy(err, why.EndedBy)
	f.blame(a, why)
	f.tell(a, time.Now())
}

// over tells of the attempt that the call ended with.
func (f *Flight) over(a *attempt, now time.Time) {
	r := &f.Call.Result
	if !a.openedAt.IsZero() {
		// Those that wait now, where it has waited, are served as far as they have so much time left.
		a.conns.Took(now.Sub(a.openedAt), r.EndedBy == call.EndedByUpstream)
	}
	if a.told || !f.isStudied(a) {
		return
	}
	o := &a.outcome
	o.Code, o.EndedBy, o.Source = r.Code, r.EndedBy, r.Source
	o.SentBytes, o.SentMessages = r.SentBytes, r.SentMessages
	o.ReceivedBytes, o.ReceivedMessages = r.ReceivedBytes, r.ReceivedMessages
	if why := f.result; why != nil {
		o.EndedBy = endedBy(why.Err, o.EndedBy)
		f.blame(a, why)
	}
	if (o.EndedBy == call.EndedByDeadline || o.EndedBy == call.EndedByClient) && r.FirstByte == 0 && a.stream != nil {
		o.Connection = a.stream.Conn()
	}
	f.tell(a, now)
}

// isStudied tells whether anybody wants to know how the attempt went.
func (f *Flight) isStudied(a *attempt) bool {
	return f.p.attempts || a.trial != 0 || a.pick.Needs().Attempts
}

func (f *Flight) tell(a *attempt, now time.Time) {
	a.told = true
	o := &a.outcome
	o.Latency = now.Sub(o.Start)
	a.pick.Done(o)
	if f.p.cfg.Health != nil {
		f.p.cfg.Health.Observe(a.end.State, o, a.trial)
	}
}

// blame says what has led to a status that the upstream did not send itself.
func (f *Flight) blame(a *attempt, why *Failure) {
	o := &a.outcome
	o.HTTPStatus = why.httpStatus
	var e *transport.Error
	if !errors.As(why.Err, &e) {
		if why.EndedBy == call.EndedByUpstream && why.Source == call.SourceProxy {
			o.Cause = call.CauseAnswer // it made no sense
		}
		return
	}
	switch e.Kind {
	case transport.KindDial, transport.KindTLS, transport.KindALPN, transport.KindNotHTTP2:
		o.Cause, o.Incident = call.CauseConnect, e // all that wait for a dial get the same error
		if f.p.cfg.ClientConns {
			// The connection would have been this client's own, and its address is the first thing that the upstream
			// learns: that may be why it does not want it.
			o.Cause, o.Incident = call.CauseRefused, nil
		}
	case transport.KindBackoff, transport.KindGoAway:
		o.Cause = call.CauseRefused
	case transport.KindReset:
		o.Cause = call.CauseAnswer
		if e.Code == h2.RefusedStream {
			o.Cause = call.CauseRefused
		}
	case transport.KindTimeout:
		o.Cause = call.CauseSilence
		if a.stream != nil {
			o.Incident = weak.Make(a.stream.Conn())
		}
	case transport.KindConnLost:
		o.Cause = call.CauseLost
	case transport.KindProtocol:
		o.Cause = call.CauseAnswer
	case transport.KindHeaderListSize, transport.KindRequestTooLarge:
		o.Cause = call.CauseSize
	case transport.KindQueueFull, transport.KindQueueTimeout, transport.KindElsewhere, transport.KindCanceled, transport.KindMemory, transport.KindLocal:
		// Not the upstream's.
	}
}

// endedBy says who ended an attempt: where an upstream or the way to it has failed, the proxy made the status, but that is not
// who ended it.
func endedBy(err error, otherwise call.EndedBy) call.EndedBy {
	var e *transport.Error
	if errors.As(err, &e) && e.Side == transport.SideUpstream {
		return call.EndedByUpstream
	}
	return otherwise
}

var (
	_ h2.Receiver      = (*attempt)(nil)
	_ h2.WriteReadier  = (*attempt)(nil)
	_ transport.Opener = (*attempt)(nil)
)
