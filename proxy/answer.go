package proxy

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

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

// answer is what goes to the client.
type answer struct {
	framing  grpcwire.Framing
	rest     backlog // what the client's side has not taken yet
	trailers []h2.Field
	unsent   int64 // taken by the client's side, and not known to have left
	complete bool  // the upstream has said all
}

// head takes the response head of an attempt.
func (f *Flight) head(a *attempt, fields []h2.Field, end bool) {
	f.moved.Add(1)
	if end {
		f.responded(a)
	}
	if f.phase == committed {
		return // h2 lets a second head through as informational only
	}
	status, _ := field(fields, ":status")
	a.httpStatus, _ = strconv.Atoi(status)
	a.contentType, _ = field(fields, "content-type")
	if r := &f.Call.Result; r.FirstByte == 0 {
		r.FirstByte = time.Since(f.Call.Start)
	}
	isGRPC := a.httpStatus == statusOK && grpcwire.ContentKind(a.contentType) == grpcwire.GRPC
	switch {
	case end && (isGRPC || saysFailure(fields)):
		f.trailersOnly(a, fields)
	case isGRPC:
		f.commit(a)
		list := GetFields()
		*list = f.responseRules(a, responseHead(*list, fields, false))
		f.d.Head(*list, false)
		PutFields(list)
		f.flushDown = true
	case end:
		f.commitTo(a)
		f.conclude(fromHTTP(a.httpStatus, a.contentType, nil, a.end.Address()))
	default:
		a.foreign = true
		f.timer.excerpt = time.Now().Add(excerptTime)
		f.arm()
	}
}

// commitTo makes an attempt the one that the call ends with. The other one is ended.
func (f *Flight) commitTo(a *attempt) {
	for _, b := range f.atts {
		if b != nil && b != a {
			f.giveUp(b)
		}
	}
	f.choice.last = a
}

// commit makes an attempt the one that the answer comes from.
func (f *Flight) commit(a *attempt) {
	f.commitTo(a)
	f.phase = committed
	f.replay.letGo()
	f.replay.forget(a.sent)
}

// responseRules adds what the policy wants the client to know, and applies what is configured for response heads.
func (f *Flight) responseRules(a *attempt, fields []h2.Field) []h2.Field {
	if aud := a.pick.Audience; aud != nil && aud.Annotator != nil {
		fields = f.annotated(a, fields)
	}
	if r := f.p.cfg.Rules; r != nil {
		fields = r.Response(&f.Call, fields)
	}
	return fields
}

func (f *Flight) annotated(a *attempt, fields []h2.Field) []h2.Field {
	a.pick.Annotate(&f.Call, func(name, value string) {
		fields = append(fields, h2.Field{Name: strings.ToLower(name), Value: value})
	})
	return fields
}

// trailersOnly passes on an answer that consists of one header block, or an answer that is not gRPC and ends with a status.
func (f *Flight) trailersOnly(a *attempt, fields []h2.Field) {
	f.commitTo(a)
	fields = f.takeReport(a, fields)
	head := responseHead(nil, fields, true)
	if !slices.ContainsFunc(head, func(f h2.Field) bool {
		return f.Name == "content-type" && grpcwire.ContentKind(f.Value) == grpcwire.GRPC
	}) {
		head = slices.DeleteFunc(head, func(f h2.Field) bool { return f.Name == "content-type" })
		head = append(head, f.answerType())
	}
	head = f.wireStatus(a, head)
	head = f.responseRules(a, head)
	f.d.Head(head, true)
	f.flushDown = true
	f.complete(a)
}

// body takes a piece of an attempt's answer.
func (f *Flight) body(a *attempt, p []byte, end bool) {
	f.moved.Add(int64(len(p)))
	if len(p) > 0 || end {
		f.responded(a)
	}
	if a.foreign {
		a.excerpt = append(a.excerpt, p[:min(len(p), maxExcerpt-len(a.excerpt))]...)
		a.stream.Consumed(len(p))
		if end || len(a.excerpt) >= maxExcerpt {
			f.foreignEnd(a, nil)
		}
		return
	}
	if len(p) > 0 {
		before := f.answer.framing.Messages()
		f.answer.framing.Add(p)
		if a.work != nil {
			a.work.Add(uint64(f.answer.framing.Messages()-before), uint64(len(p)))
		}
		f.Call.Result.ReceivedBytes += int64(len(p))
		f.send(a, p)
	}
	if end {
		f.ending(a, nil, false)
	}
}

// send hands messages to the client's side, and keeps what it does not take.
func (f *Flight) send(a *attempt, p []byte) {
	n := &f.answer
	if n.rest.empty() {
		p = p[f.hand(a, p):]
	}
	if len(p) > 0 {
		n.rest.add(p)
	}
}

func (f *Flight) hand(a *attempt, p []byte) int {
	taken, sent := f.d.Data(p)
	if taken > 0 {
		f.flushDown = true
	}
	if !sent {
		f.answer.unsent += int64(taken)
	} else {
		a.stream.Consumed(taken)
	}
	return taken
}

// drainAnswer hands on what the client's side has not taken before.
func (f *Flight) drainAnswer() {
	n := &f.answer
	a := f.choice.last
	if n.rest.empty() || a == nil {
		return
	}
	n.rest.drop(f.hand(a, n.rest.bytes()))
	if n.rest.empty() && n.complete {
		f.sendTrailers(a, n.trailers)
	}
}

// sent gives the upstream credit for what has left.
func (f *Flight) sent(n int) {
	a := f.choice.last
	if a == nil || a.stream == nil {
		return
	}
	f.answer.unsent -= int64(n)
	a.stream.Consumed(n)
	if f.phase == closing && f.answer.unsent == 0 {
		f.complete(a)
	}
}

// trailers takes the end of an attempt's answer.
func (f *Flight) trailers(a *attempt, fields []h2.Field) {
	f.responded(a)
	if a.foreign {
		f.foreignEnd(a, fields)
		return
	}
	f.ending(a, fields, true)
}

// ending handles END_STREAM after the head, which came with trailers or without.
func (f *Flight) ending(a *attempt, fields []h2.Field, trailers bool) {
	n := &f.answer
	switch {
	case !trailers:
		f.endAnswer(a, badAnswer(grpcwire.Internal, ReasonNoTrailers, "the upstream closed the stream without sending trailers", a.end.Address()))
		return
	case !n.framing.AtBoundary() && !n.framing.Bad() && !saysFailure(fields):
		f.endAnswer(a, badAnswer(grpcwire.Internal, ReasonIncomplete, "the upstream's answer ends inside a message", a.end.Address()))
		return
	}
	list := GetFields()
	*list = f.wireStatus(a, trailerFields(*list, f.takeReport(a, fields)))
	f.sendTrailers(a, *list)
	PutFields(list)
}

// endAnswer ends an answer that has begun, and that its upstream does not end, with a status (linkerd2-proxy does so too): behind what
// has come of it, for which the client has as much time as for any answer. Inside a message a status would be read as the message's
// own end.
func (f *Flight) endAnswer(a *attempt, why *Failure) {
	if !f.answer.framing.AtBoundary() {
		f.conclude(why)
		return
	}
	f.result = why
	f.sendTrailers(a, why.appendTo(nil, f.Call.Result.Attempts, f.p.cfg.ExposeUpstream))
}

// sendTrailers ends the answer, when the client's side has taken all of it.
func (f *Flight) sendTrailers(a *attempt, fields []h2.Field) {
	n := &f.answer
	n.complete = true
	if !n.rest.empty() {
		n.trailers = slices.Clone(fields)
		return
	}
	f.d.Trailers(fields, false)
	f.flushDown = true
	if f.phase = closing; n.unsent == 0 {
		f.complete(a)
	}
}

// complete ends a call whose answer was passed on whole: the rest of the request is not needed.
func (f *Flight) complete(a *attempt) {
	f.answer.complete = true
	f.leave(h2.NoError)
	f.finish()
}

// foreignEnd ends an answer that is not gRPC. Only without grpc-status the HTTP status counts (http-grpc-status-mapping.md).
func (f *Flight) foreignEnd(a *attempt, trailers []h2.Field) bool {
	if saysFailure(trailers) {
		f.trailersOnly(a, trailers)
		return true
	}
	f.commitTo(a)
	f.conclude(fromHTTP(a.httpStatus, a.contentType, a.excerpt, a.end.Address()))
	return true
}

// wireStatus reads the upstream's status and repairs one that clients could not read: it becomes UNKNOWN, by gRPC's
// PROTOCOL-HTTP2.md.
func (f *Flight) wireStatus(a *attempt, fields []h2.Field) []h2.Field {
	r := &f.Call.Result
	var values []string
	value, times := "", 0
	for i := range fields {
		if fields[i].Name != "grpc-status" {
			continue
		}
		if times++; times == 2 {
			values = append(values, value)
		}
		if value = fields[i].Value; times > 1 {
			values = append(values, value)
		}
	}
	switch {
	case times > 1: // clients differ in which one they read
		return f.repair(a, fields, ReasonBadStatus, "several grpc-status from the upstream: "+strconv.Quote(strings.Join(values, ", ")))
	case times == 0:
		return f.repair(a, fields, ReasonNoStatus, "the upstream's trailers carry no grpc-status")
	}
	code, valid := grpcwire.ParseStatus(value)
	if !valid {
		return f.repair(a, fields, ReasonBadStatus, "malformed grpc-status from the upstream: "+strconv.Quote(value))
	}
	r.Code, r.EndedBy, r.Source = code, call.EndedByUpstream, call.SourceWire
	if m, ok := field(fields, "grpc-message"); ok {
		r.Message = grpcwire.DecodeMessage(m)
	}
	return fields
}

func (f *Flight) repair(a *attempt, fields []h2.Field, reason, message string) []h2.Field {
	f.result = badAnswer(grpcwire.Unknown, reason, message, a.end.Address())
	fields = slices.DeleteFunc(fields, func(f h2.Field) bool { return isStatusField(f.Name) })
	return f.result.appendTo(fields, f.Call.Result.Attempts, f.p.cfg.ExposeUpstream)
}

// saysFailure tells whether the end of an answer that is not gRPC has a status that counts. OK is none: what came with it, or
// should have, is not for a gRPC client to read, and without it the call has not succeeded.
func saysFailure(fields []h2.Field) bool {
	v, ok := field(fields, "grpc-status")
	if !ok {
		return false
	}
	code, valid := grpcwire.ParseStatus(v)
	return !valid || code != grpcwire.OK
}

func isStatusField(name string) bool {
	return name == "grpc-status" || name == "grpc-message" || name == "grpc-status-details-bin"
}

// judge tells a deadline from a cancellation: a CANCEL seen at or after the call's own deadline is the deadline's.
func (f *Flight) judge(why *Failure, err *transport.Error) *Failure {
	if err.Kind == transport.KindReset && err.Code == h2.Cancel && f.deadlineNear() {
		return deadlineExceeded()
	}
	return why
}

// loadReportKey is the trailer in which servers report their load with a call (gRFC A51, in-band reporting).
const loadReportKey = "endpoint-load-metrics-bin"

// takeReport returns the fields without the load report, which it keeps, if the policy wants that.
func (f *Flight) takeReport(a *attempt, fields []h2.Field) []h2.Field {
	needs := a.pick.Needs()
	if !needs.LoadReports {
		return fields
	}
	for i := range fields {
		if fields[i].Name != loadReportKey {
			continue
		}
		if raw, err := grpcwire.DecodeBin(fields[i].Value); err == nil {
			a.outcome.LoadReport = raw
		}
		if needs.ForwardLoadReports {
			return fields
		}
		return append(slices.Clone(fields[:i]), fields[i+1:]...)
	}
	return fields
}

// logFailure logs a status that the upstream did not send itself.
func (f *Flight) logFailure() {
	why, cfg := f.result, &f.p.cfg
	if why == nil {
		return
	}
	c := cfg.Logger.Check(cfg.Level, "call failed")
	if c == nil {
		return
	}
	r := &f.Call.Result
	c.Write(
		zap.String("path", f.Call.Path), zap.String("status", why.Code.String()), zap.String("message", why.Message),
		zap.String("reason", why.Reason), zap.String("ended_by", why.EndedBy.String()), zap.String("upstream", r.Upstream),
		zap.Int("attempts", r.Attempts), zap.Duration("duration", r.Latency), zap.Error(why.Err),
	)
}
