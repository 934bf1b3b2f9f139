package healthcheck

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// OutlierDetection ejects upstreams for a time. The algorithms and their numbers are Envoy's (outlier_detection.proto) and
// gRPC's (gRFC A50), as far as these have them.
//
// When the time of an ejection is over, the upstream gets one RPC at a time until one succeeds; if one fails, it is ejected
// again, for longer.
type OutlierDetection struct {
	// How often success rates, failure percentages and latencies are compared. Default: `10s`.
	Interval caddy.Duration `json:"interval,omitempty"`

	// The time of an ejection is this times the number of ejections in a row. Each interval without one takes one off that
	// number. Default: `30s`.
	BaseEjectionTime caddy.Duration `json:"base_ejection_time,omitempty"`

	// The longest time of an ejection. Default: `300s`, or `base_ejection_time` if that is longer.
	MaxEjectionTime caddy.Duration `json:"max_ejection_time,omitempty"`

	// Each ejection is longer by a random time up to this. Default: `0`.
	MaxEjectionJitter caddy.Duration `json:"max_ejection_time_jitter,omitempty"`

	// No further upstream is ejected once so many percent of the handler's upstreams are; so at least one can be. A
	// negative value ejects none. Default: `10`.
	MaxEjectionPercent int `json:"max_ejection_percent,omitempty"`

	// How many failures in a row, answered by the upstream, eject it. A negative value turns that off. Default: `5`.
	ConsecutiveFailures int `json:"consecutive_failures,omitempty"`

	// How many attempts without an answer (it cannot be connected to, or hangs), with no good one in between, eject it. A
	// negative value turns that off. Default: `5`.
	ConsecutiveLocalFailures int `json:"consecutive_local_failures,omitempty"`

	// Ejects upstreams whose success rate is far below the others'. Default: off.
	SuccessRate *SuccessRate `json:"success_rate,omitempty"`

	// Ejects upstreams of whose RPCs too many fail. Default: off.
	FailurePercentage *FailurePercentage `json:"failure_percentage,omitempty"`

	// Ejects upstreams that are much slower than the others. Default: off.
	Latency *Latency `json:"latency,omitempty"`

	// A good health check does not shorten an ejection. Otherwise it does, for the first one in a row. Default: false.
	IgnoreChecks bool `json:"ignore_health_checks,omitempty"`
}

// SuccessRate ejects upstreams whose success rate in an interval is less than the mean minus `stdev_factor`/1000 standard
// deviations.
type SuccessRate struct {
	// In thousandths of a standard deviation. Default: `1900`.
	StdevFactor int `json:"stdev_factor,omitempty"`
	// How many upstreams must have had `request_volume` RPCs. Default: `5`.
	MinimumHosts int `json:"minimum_hosts,omitempty"`
	// How many RPCs an upstream must have had in the interval to be considered. Default: `100`.
	RequestVolume int `json:"request_volume,omitempty"`
	// How many percent of the ejections that are due are carried out. A negative value carries out none.
	// Default: `100`.
	Enforcement int `json:"enforcement_percentage,omitempty"`
}

// FailurePercentage ejects upstreams of whose RPCs more than `threshold` percent have failed in an interval.
type FailurePercentage struct {
	// In percent. Default: `85`.
	Threshold int `json:"threshold,omitempty"`
	// How many upstreams must have had `request_volume` RPCs. Default: `5`.
	MinimumHosts int `json:"minimum_hosts,omitempty"`
	// How many RPCs an upstream must have had in the interval to be considered. Default: `50`.
	RequestVolume int `json:"request_volume,omitempty"`
	// How many percent of the ejections that are due are carried out. A negative value carries out none.
	// Default: `100`.
	Enforcement int `json:"enforcement_percentage,omitempty"`
}

// Latency ejects upstreams whose mean latency in an interval is more than `factor` times the median of all upstreams'
// means, and above it by at least `minimum_difference`. Only successful RPCs with one message in each direction count, and of
// them the time from when the upstream has the request to when the answer comes.
type Latency struct {
	// Default: `3`.
	Factor float64 `json:"factor,omitempty"`
	// What is not noticed by anybody is no reason. Default: `50ms`.
	MinimumDifference caddy.Duration `json:"minimum_difference,omitempty"`
	// How many upstreams must have had `request_volume` RPCs. Default: `5`.
	MinimumHosts int `json:"minimum_hosts,omitempty"`
	// How many RPCs an upstream must have had in the interval to be considered. Default: `50`.
	RequestVolume int `json:"request_volume,omitempty"`
	// How many percent of the ejections that are due are carried out. A negative value carries out none.
	// Default: `100`.
	Enforcement int `json:"enforcement_percentage,omitempty"`
}

func (o *OutlierDetection) provision() error {
	for _, d := range []struct {
		name  string
		value caddy.Duration
	}{
		{"interval", o.Interval},
		{"base_ejection_time", o.BaseEjectionTime},
		{"max_ejection_time", o.MaxEjectionTime},
		{"max_ejection_time_jitter", o.MaxEjectionJitter},
	} {
		if d.value < 0 {
			return fmt.Errorf("outlier detection: %s is %v; it must not be negative (leave it out for the default)", d.name, time.Duration(d.value))
		}
	}
	if o.Interval > 0 && time.Duration(o.Interval) < minInterval {
		return fmt.Errorf("outlier detection: interval is %v; it must be at least %v", time.Duration(o.Interval), minInterval)
	}
	if o.MaxEjectionPercent > 100 {
		return fmt.Errorf("outlier detection: max_ejection_percent is %d; at most 100 are possible", o.MaxEjectionPercent)
	}
	defaultTo(&o.Interval, caddy.Duration(10*time.Second))
	defaultTo(&o.BaseEjectionTime, caddy.Duration(30*time.Second))
	defaultTo(&o.MaxEjectionTime, caddy.Duration(300*time.Second))
	defaultTo(&o.MaxEjectionPercent, 10)
	defaultTo(&o.ConsecutiveFailures, 5)
	defaultTo(&o.ConsecutiveLocalFailures, 5)
	if s := o.SuccessRate; s != nil {
		defaultTo(&s.StdevFactor, 1900)
		defaultTo(&s.RequestVolume, 100)
		if s.StdevFactor < 0 {
			return fmt.Errorf("outlier detection: success_rate.stdev_factor is %d; it must not be negative (1900 are 1.9 standard deviations)", s.StdevFactor)
		}
		if err := common("success_rate", &s.MinimumHosts, &s.RequestVolume, &s.Enforcement); err != nil {
			return err
		}
	}
	if f := o.FailurePercentage; f != nil {
		defaultTo(&f.Threshold, 85)
		defaultTo(&f.RequestVolume, 50)
		if f.Threshold < 0 || f.Threshold > 100 {
			return fmt.Errorf("outlier detection: failure_percentage.threshold is %d; it must be between 1 and 100 percent", f.Threshold)
		}
		if err := common("failure_percentage", &f.MinimumHosts, &f.RequestVolume, &f.Enforcement); err != nil {
			return err
		}
	}
	if l := o.Latency; l != nil {
		defaultTo(&l.Factor, 3)
		defaultTo(&l.MinimumDifference, caddy.Duration(50*time.Millisecond))
		defaultTo(&l.RequestVolume, 50)
		if l.Factor <= 1 || l.MinimumDifference < 0 {
			return errors.New("outlier detection: latency.factor must be greater than 1, and latency.minimum_difference must not be negative")
		}
		return common("latency", &l.MinimumHosts, &l.RequestVolume, &l.Enforcement)
	}
	return nil
}

// common deals with the fields that all algorithms have.
func common(name string, hosts, volume, enforcement *int) error {
	if *hosts < 0 || *volume < 0 || *enforcement > 100 {
		return fmt.Errorf("outlier detection: %s: minimum_hosts and request_volume must not be negative, and enforcement_percentage must be at most 100", name)
	}
	defaultTo(hosts, 5)
	defaultTo(enforcement, 100)
	return nil
}

// member is an endpoint among those that are compared.
type member struct {
	record  *record
	address string
	users   int
	seen    tally // at the last sweep
}

// failure counts a failure, and ejects the endpoint if it was one too many in a row.
func (p *Passive) failure(s *upstream.State, r *record, is outcome, code grpcwire.Code) {
	o := p.OutlierDetection
	r.bad.Add(1)
	counter, limit, kind := &r.failures, o.ConsecutiveFailures, "failures"
	if is == broken {
		counter, limit, kind = &r.breaks, o.ConsecutiveLocalFailures, "attempts without an answer"
	}
	n := counter.Add(1)
	if limit < 0 || n < uint32(limit) || s.Has(upstream.Ejected|upstream.Probation) {
		return
	}
	counter.Store(0)
	p.eject(r, func() string { return fmt.Sprintf("%d %s in a row, the last: %s", n, kind, what(is, code)) }, 100)
}

// eject takes an endpoint out, as far as that is allowed.
func (p *Passive) eject(r *record, why func() string, enforcement int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ejectLocked(r, why, enforcement)
}

func (p *Passive) ejectLocked(r *record, why func() string, enforcement int) {
	o := p.OutlierDetection
	out := 0
	for s := range p.members {
		if s.Has(upstream.Ejected | upstream.Probation) {
			out++
		}
	}
	// gRFC A50: none more once the percentage of ejected addresses has reached max_ejection_percent.
	var instead string
	switch {
	case r.state.Has(upstream.Ejected | upstream.Probation):
		return
	case o.MaxEjectionPercent < 0 || len(p.members) > 0 && out*100 >= o.MaxEjectionPercent*len(p.members):
		instead = "max_ejection_percent"
	case rand.IntN(100) >= enforcement: //nolint:gosec // no secret
		instead = "enforcement_percentage"
	}
	if instead != "" {
		if c := p.logger.Check(zap.DebugLevel, "upstream is an outlier but is not ejected"); c != nil && p.members[r.state] != nil {
			c.Write(zap.String("upstream", p.members[r.state].address), zap.String("reason", why()), zap.String("limit", instead))
		}
		return
	}
	r.eject(o, why())
}

// sweep compares the endpoints, once per interval.
func (p *Passive) sweep() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sweeper == nil {
		return // stopped meanwhile
	}
	o := p.OutlierDetection
	p.sweeper.Reset(time.Duration(o.Interval))
	list := make([]*member, 0, len(p.members))
	for _, m := range p.members {
		list = append(list, m)
	}
	// In an order of their own, so that which are ejected before the limit is reached is no matter of chance.
	slices.SortFunc(list, func(a, b *member) int { return strings.Compare(a.address, b.address) })
	tallies := make([]tally, len(list))
	for i, m := range list {
		now := m.record.tally()
		tallies[i] = now.minus(m.seen)
		m.seen = now
	}
	if s := o.SuccessRate; s != nil {
		for _, f := range s.outliers(tallies) {
			p.ejectLocked(list[f.index].record, f.why, s.Enforcement)
		}
	}
	if f := o.FailurePercentage; f != nil {
		for _, x := range f.outliers(tallies) {
			p.ejectLocked(list[x.index].record, x.why, f.Enforcement)
		}
	}
	if l := o.Latency; l != nil {
		for _, x := range l.outliers(tallies) {
			p.ejectLocked(list[x.index].record, x.why, l.Enforcement)
		}
	}
	now := time.Now()
	for _, m := range list {
		m.record.decay(time.Duration(o.Interval), now)
		m.record.outlast(time.Duration(o.Interval), now)
	}
}

// outlast deals with a trial that takes long, a stream, say: once it was answered, it has succeeded; if not, another call
// gets its chance.
func (r *record) outlast(patience time.Duration, now time.Time) {
	trial, since := r.state.Trial()
	switch {
	case !r.state.Has(upstream.OnTrial) || now.Sub(since) < patience:
	case trial != 0 && r.answered.Load() == uint32(trial):
		r.readmit()
	default:
		r.state.EndTrial(trial)
	}
}

// finding is an outlier and why it is one.
type finding struct {
	index int
	why   func() string
}

// busy lists those that had enough calls, nil if there are too few of them.
func busy(all []tally, volume, hosts int, count func(tally) uint64) []int {
	var list []int
	for i, t := range all {
		if n := count(t); n > 0 && n >= uint64(volume) {
			list = append(list, i)
		}
	}
	if len(list) < max(hosts, 1) {
		return nil
	}
	return list
}

func (t tally) calls() uint64    { return t.good + t.bad }
func (t tally) success() float64 { return float64(t.good) / float64(t.calls()) }

// outliers: gRFC A50, "Success Rate Algorithm"; the standard deviation is that of the population, as in grpc-go.
func (s *SuccessRate) outliers(all []tally) []finding {
	list := busy(all, s.RequestVolume, s.MinimumHosts, tally.calls)
	if list == nil {
		return nil
	}
	mean := 0.0
	for _, i := range list {
		mean += all[i].success()
	}
	mean /= float64(len(list))
	variance := 0.0
	for _, i := range list {
		d := all[i].success() - mean
		variance += d * d
	}
	stdev := math.Sqrt(variance / float64(len(list)))
	required := mean - stdev*float64(s.StdevFactor)/1000
	var found []finding
	for _, i := range list {
		if rate := all[i].success(); rate < required {
			found = append(found, finding{i, func() string {
				return fmt.Sprintf("success rate %.1f%%, below %.1f%% (the upstreams' mean is %.1f%%)", 100*rate, 100*required, 100*mean)
			}})
		}
	}
	return found
}

// outliers: gRFC A50, "Failure Percentage Algorithm".
func (f *FailurePercentage) outliers(all []tally) []finding {
	var found []finding
	for _, i := range busy(all, f.RequestVolume, f.MinimumHosts, tally.calls) {
		if percent := 100 * float64(all[i].bad) / float64(all[i].calls()); percent > float64(f.Threshold) {
			found = append(found, finding{i, func() string {
				return fmt.Sprintf("%.1f%% of %d calls failed, more than %d%%", percent, all[i].calls(), f.Threshold)
			}})
		}
	}
	return found
}

// outliers compares with the median, which a few slow endpoints do not move.
func (l *Latency) outliers(all []tally) []finding {
	list := busy(all, l.RequestVolume, l.MinimumHosts, func(t tally) uint64 { return t.latencies })
	if list == nil {
		return nil
	}
	mean := func(i int) float64 { return float64(all[i].latency) / float64(all[i].latencies) }
	means := make([]float64, len(list))
	for k, i := range list {
		means[k] = mean(i)
	}
	slices.Sort(means)
	median := (means[(len(means)-1)/2] + means[len(means)/2]) / 2
	least := float64(time.Duration(l.MinimumDifference) / time.Microsecond)
	var found []finding
	for _, i := range list {
		if m := mean(i); m > median*l.Factor && m-median >= least {
			us := func(f float64) time.Duration { return time.Duration(f) * time.Microsecond }
			found = append(found, finding{i, func() string {
				return fmt.Sprintf("mean latency %v, more than %g times the upstreams' median of %v", us(m), l.Factor, us(median))
			}})
		}
	}
	return found
}
