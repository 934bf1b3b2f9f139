package healthcheck

import (
	"context"
	"net/http"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// outcome is what an attempt says about its endpoint.
type outcome uint8

const (
	// neutral: nothing.
	neutral outcome = iota
	// good: it answered, and not with a failure of its own.
	good
	// failed: it answered, but with a failure of its own.
	failed
	// broken: it did not answer; the proxy made the status ("local origin").
	broken
	// doubtful: it did not answer in time, and has to be asked whether it is there at all.
	doubtful
)

// judge classifies an attempt. An endpoint is everybody's: if a client could get it ejected, it could take it from all
// others, and one endpoint after the other. So only that counts which an endpoint that is well never does, whatever a client
// sends it. All that can come of an attempt:
//
//	what came                              outcome   why
//	OK, and codes not named below          good      it is there and answers
//	UNAVAILABLE, DATA_LOSS                 failed    libraries never make them of what a client sends: the server says that it
//	                                                 cannot serve
//	INTERNAL                               neutral   what servers say of a request that they cannot parse, and of most resets
//	UNKNOWN                                neutral   what servers say when their code fails over a request
//	DEADLINE_EXCEEDED                      neutral   the deadline is the client's
//	CANCELLED                              neutral   the server gave up for its client's sake
//	HTTP 502, 503, as UNAVAILABLE          failed    there is nothing behind a proxy
//	HTTP 429, 504, as UNAVAILABLE          neutral   the client calls too often, or what takes too long
//	other HTTP statuses                    as the code that they stand for
//	RST_STREAM                             neutral   most servers answer a request that they do not like so; the code tells what
//	                                                 they think of it, not how they are
//	REFUSED_STREAM, GOAWAY                 neutral   how busy the server is, or that it is leaving; the call was not processed
//	malformed answer (HTTP/2, gRPC),       neutral   what a service echoes comes out so: a blank at the end of a message, a name
//	no trailers, no status                           that is no name
//	metadata too large, in either          neutral   it is the client's, or an echo of it
//	direction
//	flow-control violation                 neutral   as a malformed answer; where it ends the connection, as that
//	connection lost, GOAWAY with an error  neutral   servers (nginx, HAProxy, Netty) end the connection of all for one stream that
//	                                                 they do not like, with and without a word. An endpoint that is down cannot
//	                                                 be connected to, and that counts
//	cannot connect, TLS fails, no HTTP/2   broken    nothing of a client's has been sent. Once for all that waited for the dial.
//	                                                 With proxy_protocol, where a client's address is sent first: neutral
//	not connected to yet (backoff)         neutral   nothing new was learned
//	connection given up as dead            broken    a PING was not answered, nothing was taken from the socket. Once for all
//	                                                 streams of the connection
//	deadline ran out at the proxy, or      broken    if the endpoint does not answer a PING of its connection either (doubt); a
//	client cancelled, no byte of an                  client in a hurry cannot make it not do that. With deadline_failure_after,
//	answer                                           where the deadline ran out, if it had so much time
//	the same with some answer              neutral   it is there, or the client's own doing
//	a limit of the proxy, a full queue,    neutral   the proxy's
//	a reload
//
// A code that the user names in failure_codes counts wherever it comes from an answer (status, HTTP status but for 429 and 504,
// RST_STREAM, malformed answer); those of default need not be among them.
func (p *Passive) judge(a *call.Attempt) outcome {
	switch a.EndedBy {
	case call.EndedByProxy:
		return neutral
	case call.EndedByClient, call.EndedByDeadline:
		d := time.Duration(p.DeadlineFailureAfter)
		switch {
		case a.ReceivedBytes > 0:
			return neutral
		case a.EndedBy == call.EndedByDeadline && d > 0 && a.Latency >= d:
			return broken
		case a.Connection != nil:
			return doubtful // the client, who counts the same deadline, may have been the first to give up
		}
		return neutral
	case call.EndedByUpstream:
		if a.Source == call.SourceProxy {
			return p.judgeBreak(a)
		}
		if a.Source == call.SourceHTTP && (a.HTTPStatus == http.StatusTooManyRequests || a.HTTPStatus == http.StatusGatewayTimeout) {
			return neutral
		}
		return p.judgeCode(a.Code, good)
	}
	return neutral
}

// judgeCode is for the code of an answer; otherwise is for codes that say nothing bad.
func (p *Passive) judgeCode(c grpcwire.Code, otherwise outcome) outcome {
	if p.counted.has(c) {
		return failed
	}
	switch c {
	case grpcwire.Internal, grpcwire.Unknown, grpcwire.DataLoss, grpcwire.Unavailable, grpcwire.DeadlineExceeded, grpcwire.Canceled:
		return neutral
	}
	return otherwise
}

// judgeBreak is for statuses that the proxy made since the endpoint, or the way to it, has failed.
func (p *Passive) judgeBreak(a *call.Attempt) outcome {
	switch a.Cause {
	case call.CauseLost, call.CauseRefused, call.CauseSize:
		return neutral
	case call.CauseAnswer:
		return p.judgeCode(a.Code, neutral)
	case call.CauseUnknown, call.CauseConnect, call.CauseSilence:
	}
	return broken
}

// served is how long the endpoint took for an attempt: without the time that a slow client has taken to send its request, and
// to take the answer.
func served(a *call.Attempt) time.Duration {
	if a.Served > 0 {
		return a.Served
	}
	return a.Latency
}

// pingPatience is how long an endpoint may take for the answer to a PING.
const pingPatience = time.Second

// askEvery is how often an endpoint is asked at most. In between it is taken to be there as it was.
const askEvery = 100 * time.Millisecond

// maxDoubts bounds how many attempts wait for that answer. More are not needed.
const maxDoubts = 64

// doubt is the attempts on a connection that wait for whether the endpoint is there.
type doubt struct{ attempts []doubted }

type doubted struct {
	p     *Passive
	trial upstream.Trial
}

// doubt deals with an attempt that was given up when the endpoint had sent nothing for it. That alone says more of the client,
// who set the deadline. But if the endpoint does not answer a PING of the connection either, it hangs, and the
// attempt counts. It returns false if it is not asked.
func (p *Passive) doubt(s *upstream.State, r *record, a *call.Attempt, trial upstream.Trial) bool {
	// What has said something lately need not be asked.
	if p.FailDuration == 0 && p.OutlierDetection == nil || a.Connection.Silence() < min(a.Latency/2, pingPatience) {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	d := r.doubts[a.Connection]
	switch {
	case r.users[p] == 0 || d != nil && len(d.attempts) == maxDoubts || d == nil && time.Since(r.asked) < askEvery:
		return false
	case d == nil:
		d = new(doubt)
		if r.doubts == nil {
			r.doubts = make(map[call.Connection]*doubt)
		}
		r.doubts[a.Connection] = d
		go r.settle(s, a.Connection)
	}
	d.attempts = append(d.attempts, doubted{p, trial})
	return true
}

// settle asks whether the endpoint is there.
func (r *record) settle(s *upstream.State, conn call.Connection) {
	ctx, cancel := context.WithTimeout(context.Background(), pingPatience)
	defer cancel()
	alive, known := conn.Alive(ctx)
	r.mu.Lock()
	list := r.doubts[conn].attempts
	delete(r.doubts, conn)
	r.asked = time.Now()
	is := neutral
	if known && !alive {
		is = broken
	}
	for i := range list {
		if r.users[list[i].p] == 0 {
			list[i].p = nil
		}
	}
	r.mu.Unlock()
	for _, d := range list {
		if d.p == nil { // its configuration is gone
			s.EndTrial(d.trial)
			continue
		}
		d.p.count(s, r, is, &call.Attempt{Code: grpcwire.DeadlineExceeded}, d.trial)
	}
}

// isNew notes an incident, and tells whether it is not one of the last.
func (r *record) isNew(incident any) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, i := range r.incidents {
		if i == incident {
			return false
		}
	}
	copy(r.incidents[1:], r.incidents[:])
	r.incidents[0] = incident
	return true
}
