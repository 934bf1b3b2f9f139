package grpcproxy

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// attempt is one try of a call on one endpoint. It receives what the upstream sends, on the connection's reader.
type attempt struct {
	x      *exchange
	view   *cluster.View // that the pick belongs to
	pick   selection.Pick
	end    cluster.Endpoint
	conns  *transport.Endpoint // end, or the part of it that has the connections for this call
	stream *h2.Stream
	lesson lesson
	// openedAt is when the stream was opened, if the call had to wait for it.
	openedAt time.Time

	// The sender's, under its lock.
	sent  int64
	ended bool
}

// begin starts the next attempt on an endpoint that was not tried yet. On failure it has tried all there is to try.
func (x *exchange) begin() *failure {
	lb := x.h.LoadBalancing
	var news <-chan struct{} // nil until a look at the endpoints has found none
	for {
		if x.deadlinePassed() {
			return deadlineExceeded()
		}
		if f := x.cutOr(nil); f != nil {
			return f
		}
		if x.r.Context().Err() != nil { // a client that is gone already costs no upstream anything
			return x.cutOr(clientGone())
		}
		x.renew()
		if x.cur.Starting != nil && x.await(x.cur.Starting, nil) {
			continue
		}
		pick, ok := x.choose()
		if !ok && len(x.passed) == 0 && x.lastErr != nil && x.lastErr.Sent && !x.again {
			// gRFC A6: a call that left but was certainly not processed may be sent once more, even to the same
			// endpoint (a server that restarts gracefully, say).
			x.again = true
			x.tried = x.tried[:0]
			continue
		}
		if lb.Retries > 0 && x.call.Result.Attempts > lb.Retries {
			return x.exhausted()
		}
		if !ok && (len(x.passed) == 0 || x.insists) {
			pick, ok = x.connecting()
		}
		if !ok && len(x.passed) > 0 {
			x.passed, x.insists = x.passed[:0], true // none is better than those
			continue
		}
		if !ok && news == nil {
			news = x.h.cluster.News()
			continue // from here on nothing that changes is missed
		}
		if !ok {
			if x.h.cluster.Reconsider(x.cur) {
				continue
			}
			if x.awaitNews(news) {
				news = x.h.cluster.News()
				continue
			}
			if f := x.anotherRound(); f != nil {
				return f
			}
			continue
		}
		err, ok := x.try(pick)
		if !ok { // taken by another call meanwhile
			x.tried = append(x.tried, pick.Index)
			continue
		}
		if err == nil {
			return nil
		}
		if x.refusal != nil {
			return x.refusal
		}
		if err.Kind == transport.KindCanceled {
			return x.cutOr(clientGone())
		}
		if err.Kind == transport.KindElsewhere {
			x.passed = append(x.passed, pick.Index)
			continue
		}
		x.lastErr = err
		x.tried = append(x.tried, pick.Index)
		x.logAttempt(err)
	}
}

// try opens a stream on the endpoint. It returns false if the endpoint does not take the call.
func (x *exchange) try(pick selection.Pick) (_ *transport.Error, ok bool) {
	a := &x.firstTry
	if a.x != nil {
		a = new(attempt)
	}
	*a = attempt{x: x, view: x.cur, pick: pick, end: x.cur.Endpoints[pick.Index]}
	if !a.begin() {
		return nil, false
	}
	x.mu.Lock()
	x.att = a // from here on finish ends it, whatever happens
	x.mu.Unlock()
	x.call.Result.Attempts++
	before := x.call.Result.Upstream
	x.call.Result.Upstream = a.end.Address()

	fields := fieldLists.Get().(*[]h2.Field)
	*fields = x.appendFields((*fields)[:0], a)
	defer putFields(fields)

	var (
		stream *h2.Stream
		err    *transport.Error
	)
	if x.refusal = x.h.tooLarge(*fields); x.refusal != nil { // for every endpoint the same, so none is asked
		err = &transport.Error{Kind: transport.KindRequestTooLarge, Side: transport.SideDownstream, Unprocessed: true}
		x.call.Result.Attempts--
		x.call.Result.Upstream = ""
	} else {
		a.conns = x.connections(a, *fields)
		stream, err = a.conns.Open(x, *fields, false, a)
	}
	if err != nil {
		a.end.State.End()
		x.mu.Lock()
		x.att = nil
		x.mu.Unlock()
		if err.Kind == transport.KindElsewhere {
			a.withdraw(before)
		} else {
			a.failed(err)
		}
		return err, true
	}
	a.opened()
	x.mu.Lock()
	a.stream = stream
	cut := x.in.cut != nil
	x.mu.Unlock()
	if cut { // it came too early to reset the stream itself
		stream.Reset(h2.Cancel)
	}
	x.send.attach(a)
	return nil, true
}

// renew takes over the cluster's newest view: a call that waits, or is tried again, must not know only endpoints that have
// gone meanwhile.
func (x *exchange) renew() {
	view := x.h.cluster.View()
	if view == x.cur {
		return
	}
	old := x.cur
	x.cur, x.passed = view, x.passed[:0]
	kept := x.tried[:0]
	for _, i := range x.tried {
		if now := slices.Index(view.Endpoints, old.Endpoints[i]); now >= 0 {
			kept = append(kept, now)
		}
	}
	x.tried = kept
}

// awaitNews waits for the first list of a source of endpoints, or until it is known of one of the endpoints that nothing is
// known about yet how it is doing. It returns false if there is nothing to wait for, or not any more.
func (x *exchange) awaitNews(news <-chan struct{}) bool {
	if x.cur.Pending == nil && !x.verdictIsDue() {
		return false
	}
	return x.await(news, x.cur.Pending)
}

// verdictIsDue tells whether nothing is known yet about one of the endpoints that are left.
func (x *exchange) verdictIsDue() bool {
	for i, e := range x.cur.Live() {
		if e.State.Has(upstream.Connecting) && !slices.Contains(x.tried, i) {
			return true
		}
	}
	return false
}

// await waits for one of two things that let the call find an endpoint, within its deadline and as long as a dial may take.
// It returns false when that time is over.
func (x *exchange) await(one, other <-chan struct{}) bool {
	limit := x.h.Transport.dialTimeout() - time.Since(x.call.Start)
	done, deadline := x.Wait()
	if !deadline.IsZero() {
		limit = min(limit, time.Until(deadline))
	}
	if limit <= 0 {
		return false
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-one:
	case <-other:
	case <-t.C:
	case <-done:
	}
	return true // begin looks at what it was
}

// pickInfo is what the picker is asked with.
func (x *exchange) pickInfo() selection.PickInfo {
	in := selection.PickInfo{Call: &x.call, Tried: x.tried}
	if x.cur.Panic {
		in.Disregard = upstream.Unhealthy | upstream.Ejected | upstream.Failing | upstream.Probation | upstream.OnTrial | upstream.Connecting
	}
	return in
}

// anotherRound waits for the next round of trying, if the configuration and the deadline allow one; else it returns
// why the call fails.
func (x *exchange) anotherRound() *failure {
	for _, e := range x.cur.Live() {
		if e.State.Has(upstream.Backoff) {
			e.For(x.call.ClientIP).Ask() // so that it is found to be back without a call having to suffer for it
		}
	}
	lb := x.h.LoadBalancing
	if time.Since(x.call.Start)+time.Duration(lb.TryInterval) > time.Duration(lb.TryDuration) {
		return x.exhausted()
	}
	done, deadline := x.Wait()
	wait := time.Duration(lb.TryInterval)
	if !deadline.IsZero() {
		wait = min(wait, time.Until(deadline))
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-done:
		return x.cutOr(clientGone())
	}
	x.tried, x.since = x.tried[:0], time.Time{}
	return nil
}

// exhausted says why no endpoint is left.
func (x *exchange) exhausted() *failure {
	if x.lastErr != nil {
		f := fromTransport(x.lastErr)
		if x.lastErr.Kind == transport.KindQueueFull {
			f.code = x.h.queueFull
		}
		if n := x.call.Result.Attempts; n > 1 {
			f.message = "all " + strconv.Itoa(n) + " attempts failed; the last: " + f.message
		}
		return f
	}
	if len(x.cur.Live()) == 0 {
		f := proxyFailure(grpcwire.Unavailable, reasonNoUpstream, "no upstream is known")
		if f.err = x.cur.Err; f.err != nil && x.h.ExposeUpstream {
			f.message += ": " + f.err.Error() // it names names
		} else if f.err != nil {
			f.message += ", since they cannot be looked up"
		}
		return f
	}
	text, because := "none of the "+strconv.Itoa(len(x.cur.Live()))+" upstreams is usable", "; one of them: "
	if len(x.cur.Live()) == 1 {
		text, because = "the only upstream is not usable", ": "
	}
	for _, e := range x.cur.Live() {
		if err := e.LastError(); err != nil && e.State.Has(upstream.Backoff) {
			f := fromTransport(err)
			f.reason = reasonNoUpstream
			f.message = text + because + f.message
			return f
		}
	}
	return proxyFailure(grpcwire.Unavailable, reasonNoUpstream, text+": "+conditions(x.cur.Live()))
}

// conditions says how upstreams are doing that are all of no use: "2 unhealthy, 1 ejected", or "unhealthy" of a single one.
func conditions(ends []cluster.Endpoint) string {
	const busy = "not for this call (at its limit, by the health of its service, or by lb_policy)"
	order := []string{"unhealthy", "ejected", "draining", "connecting", busy}
	counts := make(map[string]int)
	for _, e := range ends {
		c := e.State.Status().Condition.String()
		if !slices.Contains(order, c) {
			c = busy
		}
		counts[c]++
	}
	var parts []string
	for _, c := range order {
		switch {
		case counts[c] > 0 && len(ends) == 1:
			return c
		case counts[c] > 0:
			parts = append(parts, strconv.Itoa(counts[c])+" "+c)
		}
	}
	return strings.Join(parts, ", ")
}

// retry handles the end of an attempt before the call was committed: it begins another one if the upstream has
// certainly not acted on the call and the request can be sent again, else it returns the failure.
func (x *exchange) retry(err *transport.Error) *failure {
	x.mu.Lock()
	a := x.att
	x.att = nil
	x.mu.Unlock()
	replayable := x.send.detach(a)
	a.end.State.End()
	a.failed(err)
	x.lastErr = err
	if !err.Unprocessed || !replayable {
		return fromTransport(err)
	}
	if err.Kind == transport.KindGoAway && err.Code != h2.NoError {
		// The upstream ends the connection for what somebody has sent on it, perhaps this call. It gets another try where it
		// can harm nobody who has not been suspected as well, and no third one.
		if x.suspect {
			return x.exhausted()
		}
		x.suspect = true
	}
	// gRFC A6: a call that left and was not processed is sent again once. That is for upstreams that are too busy for it: if
	// all were asked, they would be all the busier. One that shuts down says nothing of the others.
	refused := err.Kind == transport.KindReset
	if err.Sent && (x.again || refused && x.refused) {
		return x.exhausted()
	}
	x.refused = x.refused || refused
	x.logAttempt(err)
	x.since = time.Time{}
	x.tried = append(x.tried, a.pick.Index) // x.cur is still a.view: only begin changes it
	return x.begin()
}

// RecvHead takes the response head.
func (a *attempt) RecvHead(_ *h2.Stream, fields []h2.Field, end bool) {
	if s, _ := fieldValue(fields, ":status"); len(s) == 3 && s[0] == '1' {
		return // informational: gRPC has no use for it, and it is not final
	}
	x := a.x
	a.responded(end)
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.att != a || x.over {
		return
	}
	x.in.head = append(x.in.headBuf[:0], fields...)
	x.in.haveHead, x.in.headEnd, x.in.end = true, end, end
	x.firstByte = time.Since(x.call.Start)
	x.moved.Add(1)
	x.signalLocked()
}

// RecvData takes a piece of the answer's messages.
func (a *attempt) RecvData(s *h2.Stream, p []byte, end bool) {
	x := a.x
	x.moved.Add(int64(len(p)))
	a.responded(len(p) > 0 || end)
	x.mu.Lock()
	if x.att != a || x.over {
		x.mu.Unlock()
		s.Consumed(len(p))
		return
	}
	x.in.data = appendPooled(x.in.data, p)
	x.in.end = end
	x.signalLocked()
	x.mu.Unlock()
}

// RecvTrailers takes the end of the answer.
func (a *attempt) RecvTrailers(_ *h2.Stream, fields []h2.Field) {
	x := a.x
	a.responded(true)
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.att != a || x.over {
		return
	}
	x.in.trailers = append(x.in.trailBuf[:0], fields...)
	x.in.end = true
	x.signalLocked()
}

// RecvReset takes the stream's untimely end.
func (a *attempt) RecvReset(_ *h2.Stream, err *h2.Error) {
	x := a.x
	if err.Kind == h2.KindMemory {
		x.mu.Lock()
		current := x.att == a
		x.mu.Unlock()
		if current { // what is held waits for a client that does not read, and must not wait longer
			x.cut(fromTransport(transport.FromStream(err, a.end.Address())))
		}
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.att != a || x.over || x.in.end {
		// After the answer's end a reset means only that the rest of the request is not wanted (RFC 9113 section 8.1).
		return
	}
	x.in.failed = transport.FromStream(err, a.end.Address())
	x.signalLocked()
}
