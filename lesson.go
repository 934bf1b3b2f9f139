package grpcproxy

import (
	"errors"
	"sync/atomic"
	"time"
	"weak"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// loadReportKey is the trailer in which servers report their load with a call (gRFC A51, in-band reporting).
const loadReportKey = "endpoint-load-metrics-bin"

// lesson is what policies that learn, and health, are told about an attempt. It costs next to nothing where nobody does.
type lesson struct {
	start time.Time
	// asked is when the last piece of the request was sent before the answer began, in nanoseconds after start.
	asked    atomic.Int64
	answered bool         // the connection reader's
	served   atomic.Int64 // from asked to the answer's first message, in nanoseconds; 0 before it
	report   []byte
	work     *upstream.Work // nil unless counted
	trial    upstream.Trial // set if the endpoint is on probation, and this is its one call
	taught   bool
}

// begin counts the attempt at its endpoint and starts the clock, if anybody wants to know. It returns false if the endpoint
// is on probation and has its one call already, which does not count in a panic.
func (a *attempt) begin() bool {
	var ok bool
	if a.lesson.trial, ok = a.end.State.TryBegin(); !ok {
		if !a.view.Panic {
			return false
		}
		a.end.State.Begin()
	}
	needs := a.pick.Needs()
	if needs.Attempts || a.timesAnswer() {
		a.lesson.start = time.Now()
	}
	if needs.Work {
		a.lesson.work = a.end.State.Work()
	}
	return true
}

// timesAnswer tells whether anybody wants to know how long the answer's first message takes.
func (a *attempt) timesAnswer() bool { return a.pick.Needs().FirstMessage || a.x.h.observes.latency }

// asked notes that a piece of the request was sent.
func (a *attempt) asked() {
	if a.timesAnswer() {
		a.lesson.asked.Store(int64(time.Since(a.lesson.start)))
	}
}

// responded notes that the answer has begun with its first message, or has ended.
func (a *attempt) responded(yes bool) {
	l := &a.lesson
	if !yes || l.answered {
		return
	}
	l.answered = true
	if a.timesAnswer() {
		served := time.Since(l.start) - time.Duration(l.asked.Load())
		l.served.Store(int64(served))
		a.pick.Responded(served)
	}
	if l.trial != 0 {
		a.x.h.HealthChecks.Responded(a.end.State, l.trial)
	}
}

// worked counts work, if that is wanted.
func (a *attempt) worked(messages int64, bytes int) {
	if w := a.lesson.work; w != nil {
		w.Add(uint64(messages), uint64(bytes))
	}
}

// takeReport returns the fields without the load report, which it keeps, if the policy wants that.
func (a *attempt) takeReport(fields []h2.Field) []h2.Field {
	needs := a.pick.Needs()
	if !needs.LoadReports {
		return fields
	}
	for i, f := range fields {
		if f.Name != loadReportKey {
			continue
		}
		if raw, err := grpcwire.DecodeBin(f.Value); err == nil {
			a.lesson.report = raw
		}
		if needs.ForwardLoadReports {
			return fields
		}
		return append(append(make([]h2.Field, 0, len(fields)-1), fields[:i]...), fields[i+1:]...)
	}
	return fields
}

// failed tells the policy of an attempt after which the call may be tried elsewhere.
func (a *attempt) failed(err *transport.Error) {
	if !a.isStudied() {
		return
	}
	f := fromTransport(err)
	r := call.Attempt{Code: f.code, Source: f.source, EndedBy: endedBy(err, f.endedBy)}
	a.blame(&r, f)
	a.teach(&r)
}

// over tells the policy of the attempt that the call ended with.
func (a *attempt) over() {
	if !a.isStudied() || a.lesson.taught {
		return
	}
	x := a.x
	res := &x.call.Result
	r := call.Attempt{
		Code: res.Code, EndedBy: res.EndedBy, Source: res.Source,
		SentBytes: res.SentBytes, SentMessages: res.SentMessages,
		ReceivedBytes: res.ReceivedBytes, ReceivedMessages: res.ReceivedMessages,
	}
	if f := x.result; f != nil {
		r.EndedBy = endedBy(f.err, r.EndedBy)
		a.blame(&r, f)
	}
	if (r.EndedBy == call.EndedByDeadline || r.EndedBy == call.EndedByClient) && x.firstByte == 0 && a.stream != nil {
		r.Connection = a.stream.Conn()
	}
	a.teach(&r)
}

// blame says what has led to a status that the upstream did not send itself.
func (a *attempt) blame(r *call.Attempt, f *failure) {
	r.HTTPStatus = f.httpStatus
	var e *transport.Error
	if !errors.As(f.err, &e) {
		if f.endedBy == call.EndedByUpstream && f.source == call.SourceProxy {
			r.Cause = call.CauseAnswer // it made no sense
		}
		return
	}
	switch e.Kind {
	case transport.KindDial, transport.KindTLS, transport.KindALPN, transport.KindNotHTTP2:
		r.Cause, r.Incident = call.CauseConnect, e // all that wait for a dial get the same error
		if a.x.h.Transport.ProxyProtocol != "" {
			// The connection would have been this client's own, and its address is the first thing that the upstream
			// learns: that may be why it does not want it.
			r.Cause, r.Incident = call.CauseRefused, nil
		}
	case transport.KindBackoff, transport.KindGoAway:
		r.Cause = call.CauseRefused
	case transport.KindReset:
		r.Cause = call.CauseAnswer
		if e.Code == h2.RefusedStream {
			r.Cause = call.CauseRefused
		}
	case transport.KindTimeout:
		r.Cause = call.CauseSilence
		if a.stream != nil {
			r.Incident = weak.Make(a.stream.Conn())
		}
	case transport.KindConnLost:
		r.Cause = call.CauseLost
	case transport.KindProtocol:
		r.Cause = call.CauseAnswer
	case transport.KindHeaderListSize, transport.KindRequestTooLarge:
		r.Cause = call.CauseSize
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

// isStudied tells whether anybody wants to know how the attempt went.
func (a *attempt) isStudied() bool {
	return a.pick.Needs().Attempts || a.x.h.observes.attempts || a.lesson.trial != 0
}

func (a *attempt) teach(r *call.Attempt) {
	l := &a.lesson
	l.taught = true
	r.LoadReport = l.report
	if !l.start.IsZero() {
		r.Start, r.Latency = l.start, time.Since(l.start)
		r.Served = time.Duration(l.served.Load())
	}
	a.pick.Done(r)
	a.x.h.HealthChecks.Observe(a.end.State, r, l.trial)
}
