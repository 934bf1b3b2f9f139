package healthcheck

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Passive judges the upstreams by how RPCs go on them. What counts as a failure is decided at the end of each attempt,
// by the status in the trailers; docs/health.md has the table.
type Passive struct {
	// How long a failure is remembered. An upstream with `max_fails` remembered failures gets no RPCs. Default: off.
	FailDuration caddy.Duration `json:"fail_duration,omitempty"`

	// How many failures within `fail_duration` are too many. Default: `1`.
	MaxFails int `json:"max_fails,omitempty"`

	// An attempt that succeeds, but for whose first message the upstream takes so long when it has the request, counts as a
	// failure for `max_fails`. Attempts with more than one message in either direction, streams, do not. Default: off.
	UnhealthyLatency caddy.Duration `json:"unhealthy_latency,omitempty"`

	// How many RPCs an upstream may have in flight; with so many or more it gets no further ones. The RPCs of all handlers that
	// use the upstream add up. Of handlers with the same health settings the lowest limit counts. Default: no limit.
	UnhealthyRequestCount int `json:"unhealthy_request_count,omitempty"`

	// The gRPC codes that count as failures, by name or number. Default: `UNAVAILABLE` and `DATA_LOSS`, which servers send for
	// their own sake only. `INTERNAL`, `UNKNOWN` and `DEADLINE_EXCEEDED` are what a client can get from any server, by a request
	// that cannot be read, one that its code does not expect, and a deadline that is too short: name them where all clients are
	// trusted.
	FailureCodes []grpcwire.CodeText `json:"failure_codes,omitempty"`

	// An RPC whose deadline ran out at the proxy counts as a failure if the upstream had at least so much time for it and
	// sent nothing, even if it is otherwise alive. Default: off; such an RPC counts only if the upstream does not answer a PING
	// of its connection within a second either.
	DeadlineFailureAfter caddy.Duration `json:"deadline_failure_after,omitempty"`

	// Ejects upstreams that do worse than the others, or fail several times in a row. Default: off.
	OutlierDetection *OutlierDetection `json:"outlier_detection,omitempty"`

	counted codeSet
	logger  *zap.Logger

	mu      sync.Mutex
	members map[*upstream.State]*member
	sweeper *time.Timer
}

// defaultFailures are the codes by which a server says that it, and not the caller, is to blame; see judge.go.
var defaultFailures = []grpcwire.Code{grpcwire.Unavailable, grpcwire.DataLoss}

// codeSet is a set of codes; those that are not assigned are never in it.
type codeSet uint32

func (s codeSet) has(c grpcwire.Code) bool { return c < 32 && s>>c&1 == 1 }

// Provision checks the settings and fills in the defaults.
func (p *Passive) Provision(ctx caddy.Context) error {
	p.logger = zap.NewNop()
	if ctx.Context != nil {
		p.logger = ctx.Logger()
	}
	for _, d := range []struct {
		name  string
		value caddy.Duration
	}{
		{"fail_duration", p.FailDuration},
		{"unhealthy_latency", p.UnhealthyLatency},
		{"deadline_failure_after", p.DeadlineFailureAfter},
	} {
		if d.value < 0 {
			return fmt.Errorf("passive health: %s is %v; it must not be negative (leave it out to turn it off)", d.name, time.Duration(d.value))
		}
	}
	if p.MaxFails < 0 || p.MaxFails > maxMaxFails {
		return fmt.Errorf("passive health: max_fails is %d; it must be between 1 and %d", p.MaxFails, maxMaxFails)
	}
	if p.UnhealthyRequestCount < 0 {
		return errors.New("passive health: unhealthy_request_count must not be negative (leave it out for no limit)")
	}
	if p.FailDuration == 0 && (p.MaxFails > 0 || p.UnhealthyLatency > 0) {
		return errors.New("passive health: max_fails and unhealthy_latency need fail_duration, the time for which failures are remembered")
	}
	defaultTo(&p.MaxFails, 1)
	p.counted = 0
	for _, c := range defaultFailures {
		p.counted |= 1 << c
	}
	if len(p.FailureCodes) > 0 {
		p.counted = 0
	}
	for _, name := range p.FailureCodes {
		c, err := grpcwire.ParseCode(string(name))
		if err != nil {
			return fmt.Errorf("passive health: failure_codes: %w", err)
		}
		if c == grpcwire.OK {
			return errors.New("passive health: failure_codes: OK is no failure; write UNAVAILABLE or INTERNAL, say")
		}
		p.counted |= 1 << c
	}
	p.members = make(map[*upstream.State]*member)
	if p.OutlierDetection != nil {
		return p.OutlierDetection.provision()
	}
	return nil
}

// maxMaxFails bounds the memory for failures.
const maxMaxFails = 10_000

// Start says where to log. It must be called before Attend.
func (p *Passive) Start(logger *zap.Logger) { p.logger = logger }

// NeedsLatency tells whether call.Attempt's Start and Latency are of interest.
func (p *Passive) NeedsLatency() bool {
	return p.UnhealthyLatency > 0 || p.DeadlineFailureAfter > 0 || p.FailDuration > 0 || p.OutlierDetection != nil
}

// Attend counts what happens on an endpoint from now on until stop is called. It is a cluster.Companion.
func (p *Passive) Attend(info *upstream.Endpoint, end *transport.Endpoint) (stop func()) {
	return p.attend(info.Address, info.State)
}

func (p *Passive) attend(address string, s *upstream.State) (stop func()) {
	r := recordOf(s)
	r.join(p)
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.members[s]
	if m == nil {
		m = &member{record: r, address: address, seen: r.tally()}
		p.members[s] = m
	}
	m.users++
	if o := p.OutlierDetection; o != nil && p.sweeper == nil {
		p.sweeper = time.AfterFunc(time.Duration(o.Interval), p.sweep)
	}
	return func() {
		p.mu.Lock()
		if m.users--; m.users == 0 {
			delete(p.members, s)
		}
		if len(p.members) == 0 && p.sweeper != nil {
			p.sweeper.Stop()
			p.sweeper = nil
		}
		p.mu.Unlock()
		r.leave(p)
	}
}

// Observe takes how an attempt on the endpoint went, once, at its end. trial is what State.TryBegin returned for it.
func (p *Passive) Observe(s *upstream.State, a *call.Attempt, trial upstream.Trial) {
	r, _ := s.Recorder().(*record)
	if r == nil {
		s.EndTrial(trial)
		return
	}
	switch is := p.judge(a); {
	case is == doubtful && p.doubt(s, r, a, trial):
	case is == broken && a.Incident != nil && !r.isNew(a.Incident):
		p.count(s, r, neutral, a, trial)
	default:
		p.count(s, r, is, a, trial)
	}
}

// count counts an attempt.
func (p *Passive) count(s *upstream.State, r *record, is outcome, a *call.Attempt, trial upstream.Trial) {
	if trial <= upstream.Trial(r.earlier.Load()) {
		trial = 0 // it began before the present ejection, and says nothing of it
	}
	switch is {
	case neutral, doubtful:
		s.EndTrial(trial)
	case good:
		r.good(a, p.OutlierDetection)
		if trial != 0 {
			r.readmit()
		}
		if d := time.Duration(p.UnhealthyLatency); d > 0 && served(a) >= d && a.SentMessages <= 1 && a.ReceivedMessages <= 1 {
			p.remember(r)
		}
	case failed, broken:
		if p.FailDuration > 0 {
			p.remember(r)
		}
		if p.OutlierDetection != nil {
			p.failure(s, r, is, a.Code)
		}
		if trial != 0 {
			r.relapse(p.OutlierDetection, trial, is, a.Code)
		}
	}
}

// Responded takes that the first message of a trial's answer has come: one that goes on for long has proved the endpoint by
// that.
func (p *Passive) Responded(s *upstream.State, trial upstream.Trial) {
	if r, _ := s.Recorder().(*record); r != nil {
		r.answered.Store(uint32(trial))
	}
}

var _ caddy.Provisioner = (*Passive)(nil)
