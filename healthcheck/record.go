package healthcheck

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// record is what is known of how calls went on one endpoint. It lives in the endpoint's State, so that it survives reloads
// and is shared by the handlers that use the endpoint. Calls write its counters without a lock.
type record struct {
	state *upstream.State

	// In a row, by who made the status.
	failures, breaks atomic.Uint32
	// All there ever were. Each who wants to know what came in an interval takes the difference.
	goods, bad         atomic.Uint64
	latency, latencies atomic.Uint64 // of good unary calls: the sum in microseconds, and how many
	recent             atomic.Pointer[ring]
	answered           atomic.Uint32 // the trial that has begun to be answered
	earlier            atomic.Uint32 // the last trial of earlier ejections

	mu        sync.Mutex
	users     map[*Passive]int
	ejections int       // in a row: what the time of the next one is multiplied by
	until     time.Time // the end of the ejection that is in force
	timer     *time.Timer
	decayed   time.Time
	lastFail  time.Duration // fail_duration of who set Failing
	failTimer *time.Timer
	doubts    map[call.Connection]*doubt
	asked     time.Time // when it was last known whether the endpoint is there
	incidents [4]any    // the last that have counted
}

func recordOf(s *upstream.State) *record {
	return s.InitRecorder(func() any { return &record{state: s, users: make(map[*Passive]int)} }).(*record)
}

// join makes the record count for p.
func (r *record) join(p *Passive) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.users[p]++
	if p.FailDuration > 0 {
		if old := r.recent.Load(); old == nil || len(old.at) != p.MaxFails {
			r.recent.Store(&ring{at: make([]atomic.Int64, p.MaxFails)})
		}
	}
	r.limitLocked()
}

// limitLocked sets the lowest of the users' limits: which handler, or which configuration, came last makes no difference.
func (r *record) limitLocked() {
	limit := 0
	for u := range r.users {
		if n := u.UnhealthyRequestCount; n > 0 && (limit == 0 || n < limit) {
			limit = n
		}
	}
	r.state.SetLimit(int64(limit))
}

// leave is join's counterpart. An ejection stays in force to its end.
func (r *record) leave(p *Passive) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.users[p]--; r.users[p] == 0 {
		delete(r.users, p)
	}
	r.limitLocked()
	detects := false
	for u := range r.users {
		detects = detects || u.OutlierDetection != nil
	}
	if !detects && r.state.Has(upstream.Probation) {
		r.state.Change(0, upstream.Probation|upstream.OnTrial, "") // nobody would hear how the trial went
	}
}

// tally is what has been counted.
type tally struct{ good, bad, latency, latencies uint64 }

func (r *record) tally() tally {
	return tally{r.goods.Load(), r.bad.Load(), r.latency.Load(), r.latencies.Load()}
}

func (t tally) minus(u tally) tally {
	return tally{t.good - u.good, t.bad - u.bad, t.latency - u.latency, t.latencies - u.latencies}
}

// good counts an attempt that went well.
func (r *record) good(a *call.Attempt, o *OutlierDetection) {
	// Most of the time these are zero, and reading shares the line with the other processors.
	if r.failures.Load() != 0 {
		r.failures.Store(0)
	}
	if r.breaks.Load() != 0 {
		r.breaks.Store(0)
	}
	if o == nil {
		return
	}
	r.goods.Add(1)
	if o.Latency != nil && a.Code == grpcwire.OK && a.SentMessages <= 1 && a.ReceivedMessages <= 1 {
		r.latency.Add(uint64(served(a) / time.Microsecond))
		r.latencies.Add(1)
	}
}

// ring holds the times of the last failures.
type ring struct {
	at   []atomic.Int64
	next atomic.Uint64
}

// add notes a failure and returns the time of the oldest of the last len(at), 0 if there were fewer.
func (g *ring) add(now int64) (oldest int64) {
	i := g.next.Add(1) - 1
	n := uint64(len(g.at))
	g.at[i%n].Store(now)
	return g.at[(i+1)%n].Load()
}

func (g *ring) oldest() int64 { return g.at[g.next.Load()%uint64(len(g.at))].Load() }

// remember counts a failure for max_fails.
func (p *Passive) remember(r *record) {
	g := r.recent.Load()
	if g == nil {
		return
	}
	now := time.Now()
	oldest := g.add(now.UnixNano())
	window := time.Duration(p.FailDuration)
	if oldest == 0 || now.Sub(time.Unix(0, oldest)) >= window || r.state.Has(upstream.Failing) {
		return // what is out already, is looked at again when its time is over
	}
	r.failing(len(g.at), window)
}

// failing takes the endpoint out until the oldest of its last failures is forgotten.
func (r *record) failing(fails int, window time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.state.SetWhy(upstream.Failing, fmt.Sprintf("%d failed calls within %v", fails, window)) {
		return
	}
	r.lastFail = window
	if r.failTimer == nil {
		r.failTimer = time.AfterFunc(window, r.forget)
	}
	r.forgetLaterLocked()
}

func (r *record) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forgetLaterLocked()
}

func (r *record) forgetLaterLocked() {
	if left := r.failingFor(); left > 0 {
		r.failTimer.Reset(left)
		return
	}
	r.state.Clear(upstream.Failing)
	if left := r.failingFor(); left > 0 { // a failure that has come just now took it for out already
		r.state.SetWhy(upstream.Failing, fmt.Sprintf("too many failed calls within %v", r.lastFail))
		r.failTimer.Reset(left)
	}
}

// failingFor is how long the oldest of the failures that are too many will be remembered.
func (r *record) failingFor() time.Duration {
	g := r.recent.Load()
	if g == nil || len(r.users) == 0 {
		return 0
	}
	oldest := g.oldest()
	if oldest == 0 {
		return 0
	}
	return r.lastFail - time.Since(time.Unix(0, oldest))
}

// eject takes the endpoint out. gRFC A50 and Envoy: for base × the number of ejections in a row, at most the maximum.
func (r *record) eject(o *OutlierDetection, why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.state.Has(upstream.Ejected | upstream.Probation) {
		r.ejectLocked(o, why)
	}
}

func (r *record) ejectLocked(o *OutlierDetection, why string) {
	r.ejections++
	base := time.Duration(o.BaseEjectionTime)
	d := min(base*time.Duration(min(r.ejections, maxEjections)), max(base, time.Duration(o.MaxEjectionTime)))
	if j := time.Duration(o.MaxEjectionJitter); j > 0 {
		d += rand.N(j) //nolint:gosec // spreading load
	}
	now := time.Now()
	r.until, r.decayed = now.Add(d), now
	r.failures.Store(0)
	r.breaks.Store(0)
	r.state.Change(upstream.Ejected, upstream.Probation|upstream.OnTrial, fmt.Sprintf("%s; for %v", why, d.Round(time.Millisecond)))
	if r.timer == nil {
		r.timer = time.AfterFunc(d, r.probation)
		return
	}
	r.timer.Reset(d)
}

// maxEjections keeps the product of base and ejections far from overflow.
const maxEjections = 1000

// probation ends an ejection: the endpoint gets one call at a time, until one succeeds.
func (r *record) probation() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.state.Has(upstream.Ejected) || time.Now().Before(r.until) {
		return
	}
	r.probationLocked()
}

func (r *record) probationLocked() {
	for u := range r.users {
		if u.OutlierDetection != nil {
			r.earlier.Store(uint32(r.state.LastTrial()))
			r.state.Change(upstream.Probation, upstream.Ejected, "")
			return
		}
	}
	r.state.Clear(upstream.Ejected) // nobody looks any more
}

// readmit ends the probation: the call on trial went well.
func (r *record) readmit() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state.Has(upstream.Probation) {
		r.failures.Store(0)
		r.breaks.Store(0)
		r.state.Change(0, upstream.Probation|upstream.OnTrial, "")
	}
}

// relapse ejects the endpoint again, for longer: the call on trial went wrong.
func (r *record) relapse(o *OutlierDetection, trial upstream.Trial, is outcome, code grpcwire.Code) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case !r.state.Has(upstream.Probation):
	case o == nil:
		r.state.EndTrial(trial)
	default:
		r.ejectLocked(o, "the call on trial failed: "+what(is, code))
	}
}

func what(is outcome, code grpcwire.Code) string {
	if is == broken {
		return "no answer"
	}
	return code.String()
}

// decay lets an ejection be forgotten for each interval without one.
func (r *record) decay(interval time.Duration, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// Handlers that share the endpoint sweep at about the same time: that counts once.
	if r.ejections == 0 || r.state.Has(upstream.Ejected|upstream.Probation) || now.Sub(r.decayed) < interval*9/10 {
		return
	}
	r.decayed = now
	r.ejections--
}

// unejectOn gives an ejected endpoint its trial early, since it has passed a health check. That is done for the first
// ejection in a row only: an endpoint whose checks succeed while its calls fail would otherwise fail one call per check.
func unejectOn(s *upstream.State) {
	if !s.Has(upstream.Ejected) {
		return
	}
	r, _ := s.Recorder().(*record)
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !s.Has(upstream.Ejected) || r.ejections > 1 {
		return
	}
	for u := range r.users {
		if o := u.OutlierDetection; o != nil && o.IgnoreChecks {
			return
		}
	}
	r.probationLocked()
}
