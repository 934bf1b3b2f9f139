package selection

import (
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(PeakEWMA)) }

// PeakEWMA draws two endpoints at random and picks the one from which an answer is to be expected sooner: the one with the
// lower product of its latency and of its calls in flight and the new one. It notices a slow endpoint with the first slow
// answer, before calls pile up on it, and endpoints that are farther away get less as long as the near ones have room. It is
// the load balancing of Finagle and of Linkerd.
//
// The latency of an endpoint is how long its first message takes (in unary calls, the answer), seen pessimistically: it
// jumps up with each answer that took longer than expected, and comes down slowly, as a moving average (the P in the
// name is for peak-sensitive). While an endpoint has no answers to give, its latency sinks, so that it is tried again some
// time.
//
// An endpoint that fails would answer sooner than any other. So the part of its calls that have failed lately counts as time
// too; see `failure_penalty`.
type PeakEWMA struct {
	// How long latencies and failures are remembered: after this time, what has been counts 1/e (37 %) of what is new.
	// Default: `10s`.
	Decay caddy.Duration `json:"decay,omitempty"`
	// What is expected of an endpoint that nothing is known about. Default: `30ms`.
	InitialLatency caddy.Duration `json:"initial_latency,omitempty"`
	// The latency of a failure, and the longest that a call without any answer is taken to have taken. An endpoint half
	// of whose calls fail is as good as one that takes half of this time longer. It should be longer than any ordinary
	// answer takes. What counts as a failure: a connection that breaks; the codes UNAVAILABLE, INTERNAL, UNKNOWN,
	// DATA_LOSS, RESOURCE_EXHAUSTED and UNIMPLEMENTED from the upstream; and DEADLINE_EXCEEDED without any message.
	// Default: `10s`.
	FailurePenalty caddy.Duration `json:"failure_penalty,omitempty"`
}

const (
	defaultDecay          = 10 * time.Second      // linkerd2-proxy
	defaultInitialLatency = 30 * time.Millisecond // linkerd2-proxy
	defaultFailurePenalty = 10 * time.Second
)

// CaddyModule returns the Caddy module information.
func (*PeakEWMA) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "peak_ewma", New: func() caddy.Module { return new(PeakEWMA) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy peak_ewma {
//	    decay           <duration>
//	    initial_latency <duration>
//	    failure_penalty <duration>
//	}
func (p *PeakEWMA) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return parseOptions(d, options{
		"decay":           durationOption(&p.Decay),
		"initial_latency": durationOption(&p.InitialLatency),
		"failure_penalty": durationOption(&p.FailurePenalty),
	})
}

// Validate implements caddy.Validator.
func (p *PeakEWMA) Validate() error {
	return checkDurations(map[string]caddy.Duration{
		"decay": p.Decay, "initial_latency": p.InitialLatency, "failure_penalty": p.FailurePenalty,
	})
}

// Build implements [Policy].
func (p *PeakEWMA) Build(s *upstream.Snapshot) Picker {
	decay := orDefault(p.Decay, defaultDecay)
	k := &peakEWMA{
		learner: learner{candidates: newWeighted(s)},
		decay:   float64(decay),
		penalty: float64(orDefault(p.FailurePenalty, defaultFailurePenalty)),
	}
	k.audience.Learner, k.audience.Needs = k, Needs{Attempts: true, FirstMessage: true}
	initial, now := float64(orDefault(p.InitialLatency, defaultInitialLatency)), clock()
	k.known = remember(s, latencyKey{decay}, func() *latency {
		l := new(latency)
		l.answer.set(initial, now)
		l.failures.set(0, now)
		return l
	})
	return k
}

// latencyKey is where a State remembers a latency.
type latencyKey struct{ decay time.Duration }

// latency is what is known about an endpoint.
type latency struct {
	answer   average // nanoseconds, peak-sensitive
	failures average // the part of calls that fail
}

type peakEWMA struct {
	learner
	known          []*latency // by place
	decay, penalty float64    // nanoseconds
}

// Pick implements [Picker] (Mitzenmacher, "The power of two choices in randomized load balancing", 2001). The endpoints
// are drawn by weight, where they have weights.
func (p *peakEWMA) Pick(in PickInfo) (Pick, bool) {
	first, second, ok := p.drawTwo(&in)
	if !ok || first == second {
		return p.result(first, ok)
	}
	now := clock()
	if clearlyLess(p.cost(second, now), p.cost(first, now)) {
		return p.result(second, true)
	}
	return p.result(first, true)
}

// clearlyLess leaves differences of less than a hundredth to chance: they come from when things were measured, and if they
// decided, all calls would go the same way.
func clearlyLess(x, y float64) bool { return x < 0.99*y }

// cost is when an answer is to be expected. linkerd2-proxy: "The load is computed as the product of the current RTT
// estimate and the number of pending requests" and one more; calls in flight are per weight, where there are weights.
func (p *peakEWMA) cost(place int, now int64) float64 {
	l := p.known[place]
	wait := l.answer.at(now, p.decay) + l.failures.at(now, p.decay)*p.penalty
	return wait * (float64(p.states[place].Active())*p.shares.lightness(place) + 1)
}

// Responded implements [Learner].
func (p *peakEWMA) Responded(pick Pick, latency time.Duration) {
	p.known[pick.Token].answer.add(float64(latency), clock(), p.decay, true)
}

// Done implements [Learner].
func (p *peakEWMA) Done(pick Pick, a *call.Attempt) {
	l, now := p.known[pick.Token], clock()
	// Who gave up on one message without having seen an answer has waited so long at least. With more messages sent it
	// is not known what the wait was for.
	if a.ReceivedMessages == 0 && a.SentMessages <= 1 && (a.EndedBy == call.EndedByClient || a.EndedBy == call.EndedByDeadline) {
		if wait := min(float64(a.Latency), p.penalty); wait > l.answer.at(now, p.decay) {
			l.answer.add(wait, now, p.decay, true)
		}
	}
	switch failed(a) {
	case failure:
		l.failures.add(1, now, p.decay, false)
	case success:
		if l.failures.last() != 0 {
			l.failures.add(0, now, p.decay, false)
		} else {
			l.failures.stamp.Store(now)
		}
	case undecided:
	}
}

// verdict is what an attempt says about the endpoint.
type verdict uint8

const (
	undecided verdict = iota
	success
	failure
)

// failed tells whether the endpoint is to blame for how the attempt ended. Codes that the caller can cause with any
// endpoint, by a wrong argument or a missing permission, say that the endpoint works.
func failed(a *call.Attempt) verdict {
	switch {
	case a.EndedBy == call.EndedByClient || a.EndedBy == call.EndedByProxy:
		return undecided
	case a.Source == call.SourceProxy && a.EndedBy == call.EndedByUpstream:
		return failure // It, or its connection, broke.
	}
	switch a.Code {
	case grpcwire.Unavailable, grpcwire.Internal, grpcwire.Unknown, grpcwire.DataLoss, grpcwire.ResourceExhausted, grpcwire.Unimplemented:
		return failure
	case grpcwire.DeadlineExceeded:
		if a.ReceivedMessages == 0 {
			return failure
		}
		return undecided // A stream that was meant to end so, perhaps.
	}
	return success
}

var (
	_ Policy                = (*PeakEWMA)(nil)
	_ Learner               = (*peakEWMA)(nil)
	_ Interested            = (*peakEWMA)(nil)
	_ caddy.Validator       = (*PeakEWMA)(nil)
	_ caddyfile.Unmarshaler = (*PeakEWMA)(nil)
)
