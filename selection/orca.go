package selection

import (
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/orca"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(ORCA)) }

// ORCA picks the endpoints in turn, each as often as the load that it reports of itself says: an endpoint that serves
// many calls with little of its capacity gets more than one that is nearly worn out with few. It is gRPC's
// `weighted_round_robin` policy (gRFC A58, with A114) and takes the reports that gRPC servers send with their ORCA
// packages (gRFC A51). An endpoint without a weight of its own gets the mean of the others; with fewer than two
// endpoints that have one, it does what `round_robin` does.
type ORCA struct {
	// How long an endpoint must have been reporting before its weight is used, after it was connected to and after
	// its weight had expired. Negative (`off` in the Caddyfile) means that the first report counts. Default: `10s`.
	BlackoutPeriod caddy.Duration `json:"blackout_period,omitempty"`
	// How long the weight of an endpoint that does not report any more is used. Default: `3m`.
	WeightExpirationPeriod caddy.Duration `json:"weight_expiration_period,omitempty"`
	// How often the turns are dealt anew by what has been reported since; less than 100ms counts as 100ms. Default: `1s`.
	WeightUpdatePeriod caddy.Duration `json:"weight_update_period,omitempty"`
	// How much errors count: an endpoint half of whose calls fail is weighed as if half of its capacity more were in
	// use, times this. 0 means not at all. Default: `1`.
	ErrorUtilizationPenalty *float64 `json:"error_utilization_penalty,omitempty"`
	// What tells how much of an endpoint is in use, where it does not report `application_utilization`: the highest of
	// these, and `cpu_utilization` if none of them is reported. A name is `cpu_utilization`, `mem_utilization`,
	// `application_utilization`, `named_metrics.<key>` or `utilization.<key>`. Default: none.
	MetricNames []string `json:"metric_names_for_computing_utilization,omitempty"`
	// Take reports from a stream of their own (`xds.service.orca.v3.OpenRcaService`) instead of from the trailers of
	// calls. It is for calls that last long, and for endpoints that get few. Default: `false`.
	EnableOOBLoadReport bool `json:"enable_oob_load_report,omitempty"`
	// How often endpoints are asked to report on it. Servers may do so less often; in grpc-go the least is 30s. Default:
	// `10s`.
	OOBReportingPeriod caddy.Duration `json:"oob_reporting_period,omitempty"`
	// Pass the reports in calls' trailers on to the clients, which otherwise do not get to see the servers' load.
	// Default: `false`.
	ForwardReports bool `json:"forward_reports,omitempty"`

	metrics orca.Metrics
}

// The defaults of gRFC A58.
const (
	defaultBlackout     = 10 * time.Second
	defaultExpiration   = 3 * time.Minute
	defaultWeightUpdate = time.Second
	minWeightUpdate     = 100 * time.Millisecond
	defaultErrorPenalty = 1.0
	defaultOOBReporting = 10 * time.Second
)

// CaddyModule returns the Caddy module information.
func (*ORCA) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "orca", New: func() caddy.Module { return new(ORCA) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy orca {
//	    blackout_period           <duration>|off
//	    weight_expiration_period  <duration>
//	    weight_update_period      <duration>
//	    error_utilization_penalty <number>
//	    metric_names_for_computing_utilization <names...>
//	    enable_oob_load_report
//	    oob_reporting_period      <duration>
//	    forward_reports
//	}
func (p *ORCA) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return parseOptions(d, options{
		"blackout_period":           durationOrOffOption(&p.BlackoutPeriod),
		"weight_expiration_period":  durationOption(&p.WeightExpirationPeriod),
		"weight_update_period":      durationOption(&p.WeightUpdatePeriod),
		"error_utilization_penalty": optionalNumberOption(&p.ErrorUtilizationPenalty),
		"metric_names_for_computing_utilization": func(d *caddyfile.Dispenser) error {
			word := d.Val()
			if p.MetricNames = d.RemainingArgs(); len(p.MetricNames) == 0 {
				return d.Errf("%s: the value is missing", word)
			}
			if _, err := orca.NewMetrics(p.MetricNames); err != nil {
				return d.Errf("%s: %v", word, err)
			}
			return nil
		},
		"enable_oob_load_report": flagOption(&p.EnableOOBLoadReport),
		"oob_reporting_period":   durationOption(&p.OOBReportingPeriod),
		"forward_reports":        flagOption(&p.ForwardReports),
	})
}

// Provision implements caddy.Provisioner.
func (p *ORCA) Provision(caddy.Context) (err error) {
	if p.metrics, err = orca.NewMetrics(p.MetricNames); err != nil {
		return fmt.Errorf("metric_names_for_computing_utilization: %w", err)
	}
	return nil
}

// Validate implements caddy.Validator.
func (p *ORCA) Validate() error {
	if err := checkDurations(map[string]caddy.Duration{
		"weight_expiration_period": p.WeightExpirationPeriod,
		"weight_update_period":     p.WeightUpdatePeriod,
		"oob_reporting_period":     p.OOBReportingPeriod,
	}); err != nil {
		return err
	}
	if p.OOBReportingPeriod != 0 && !p.EnableOOBLoadReport {
		return fmt.Errorf("oob_reporting_period: nothing is asked for without enable_oob_load_report; set that, or remove this")
	}
	// A58: "Configuration is rejected if this value is negative."
	return checkNotNegative("error_utilization_penalty", p.ErrorUtilizationPenalty)
}

// reportedKey is where a State remembers what was reported. Weights that are made in another way are others.
type reportedKey struct {
	names      string
	penalty    float64
	expiration time.Duration
}

func (p *ORCA) reportedKey() reportedKey {
	k := reportedKey{
		names: strings.Join(p.MetricNames, " "), penalty: defaultErrorPenalty,
		expiration: orDefault(p.WeightExpirationPeriod, defaultExpiration),
	}
	if p.ErrorUtilizationPenalty != nil {
		k.penalty = *p.ErrorUtilizationPenalty
	}
	return k
}

// ReportInterval implements [LoadReportReceiver].
func (p *ORCA) ReportInterval() time.Duration {
	if !p.EnableOOBLoadReport {
		return 0
	}
	return orDefault(p.OOBReportingPeriod, defaultOOBReporting)
}

// ReceiveLoadReport implements [LoadReportReceiver].
func (p *ORCA) ReceiveLoadReport(s *upstream.State, report []byte) {
	key := p.reportedKey()
	r := s.Memory(key, func() any { return new(reported) }).(*reported)
	r.receive(s, &p.metrics, key, report)
}

// Build implements [Policy].
func (p *ORCA) Build(s *upstream.Snapshot) Picker {
	c := newWeighted(s)
	k := &orcaPicker{
		learner:  learner{candidates: c},
		turns:    newRoundRobin(c),
		policy:   p,
		key:      p.reportedKey(),
		blackout: orDefault(p.BlackoutPeriod, defaultBlackout),
		period:   max(orDefault(p.WeightUpdatePeriod, defaultWeightUpdate), minWeightUpdate).Nanoseconds(),
	}
	// Reports in trailers are asked for in any case, and so taken out.
	k.audience.Learner = k
	k.audience.Needs = Needs{Attempts: !p.EnableOOBLoadReport, LoadReports: true, ForwardLoadReports: p.ForwardReports}
	k.known = remember(s, k.key, func() *reported { return new(reported) })
	k.dealt.Store(clock())
	k.deal()
	return k
}

// orcaPicker is a roundRobin whose turns are dealt anew from time to time.
//
// A58 deals them with a static stride; shares do the same, in a time that does not depend on the weights. A58 has a timer;
// here, the first call after the time has passed makes a goroutine do it, and nothing needs to be stopped.
type orcaPicker struct {
	learner
	turns    *roundRobin
	policy   *ORCA
	key      reportedKey
	blackout time.Duration
	period   int64 // nanoseconds
	known    []*reported

	schedule atomic.Pointer[shares] // nil: fewer than two have weights
	dealt    atomic.Int64           // by the clock
	dealing  atomic.Bool
}

// Pick implements [Picker].
func (p *orcaPicker) Pick(in PickInfo) (Pick, bool) {
	if now, last := clock(), p.dealt.Load(); now-last >= p.period && p.dealt.CompareAndSwap(last, now) && p.dealing.CompareAndSwap(false, true) {
		go func() {
			defer p.dealing.Store(false)
			p.deal()
		}()
	}
	s := p.schedule.Load()
	if s == nil {
		s = p.shares
	}
	if s != nil {
		return p.result(p.turns.takeByShare(s, &in))
	}
	return p.result(p.turns.takeInTurn(&in))
}

// deal makes the schedule of what is known now.
func (p *orcaPicker) deal() {
	now := time.Now().UnixNano()
	weights := make([]float64, len(p.known))
	for i, r := range p.known {
		weights[i] = r.current(p.states[i], now, p.key.expiration, p.blackout)
	}
	p.schedule.Store(schedule(weights))
}

// schedule makes shares of weights, of which those that are 0 become the mean of the others; nil if fewer than two are
// above 0. A58: "Subchannels that are included with a zero weight are still picked but with the average weight. When less
// than two subchannels have load info, all subchannels will get the same weight".
func schedule(weights []float64) *shares {
	sum, most, n := 0.0, 0.0, 0
	for _, w := range weights {
		if w > 0 {
			sum += w
			most = max(most, w)
			n++
		}
	}
	if n < 2 {
		return nil
	}
	mean := sum / float64(n)
	// As in grpc-go, the largest becomes the largest number of 16 bits.
	scale := upstream.MaxWeight / most
	return newShares(len(weights), func(i int) uint32 {
		w := weights[i]
		if w == 0 {
			w = mean
		}
		return max(uint32(w*scale+0.5), 1)
	})
}

// Responded implements [Learner].
func (*orcaPicker) Responded(Pick, time.Duration) {}

// Done implements [Learner]. A58: "While enable_oob_load_report is set, per-call load reports are never parsed".
func (p *orcaPicker) Done(pick Pick, a *call.Attempt) {
	if a.LoadReport != nil && !p.policy.EnableOOBLoadReport {
		p.known[pick.Token].receive(p.states[pick.Token], &p.policy.metrics, p.key, a.LoadReport)
	}
}

var (
	_ Policy                = (*ORCA)(nil)
	_ LoadReportReceiver    = (*ORCA)(nil)
	_ Learner               = (*orcaPicker)(nil)
	_ Interested            = (*orcaPicker)(nil)
	_ caddy.Provisioner     = (*ORCA)(nil)
	_ caddy.Validator       = (*ORCA)(nil)
	_ caddyfile.Unmarshaler = (*ORCA)(nil)
)
