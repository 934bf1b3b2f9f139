package selection

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/dustin/go-humanize"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(LeastLoad)) }

// LeastLoad draws two endpoints at random and picks the one that has less work to do. It is for streams, which can be open
// for hours and be silent or busy all the time: by their number, as `least_request` counts them, an endpoint with a
// hundred silent streams would be as loaded as one with a hundred busy ones.
//
// The work of an endpoint is the bytes of the messages that go to it and come from it per second, where each message
// counts some bytes more (see `message_cost`), and each call in flight, however silent, as much as one message per second.
// It is a moving average. What has begun since it was last measured is expected to be as much work as calls have been on
// average, so that an endpoint that was just added, or had nothing to do for a while, is not flooded. Where the upstreams
// have weights, endpoints are drawn by weight and work is counted per weight.
type LeastLoad struct {
	// How long work is remembered: after this time, what has been counts 1/e (37 %) of what is new. Default: `5s`.
	Decay caddy.Duration `json:"decay,omitempty"`
	// How many bytes a message counts besides its own. Default: `4096` (`4KiB`).
	MessageCost int64 `json:"message_cost,omitempty"`
}

const (
	defaultLoadDecay   = 5 * time.Second
	defaultMessageCost = 4 << 10
	maxMessageCost     = 1 << 30

	// loadInterval is how often work is measured while calls come.
	loadInterval = 250 * time.Millisecond
	// loadPause is the least time between two measurements of an endpoint that several pickers measure.
	loadPause = 100 * time.Millisecond
)

// CaddyModule returns the Caddy module information.
func (*LeastLoad) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "least_load", New: func() caddy.Module { return new(LeastLoad) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy least_load {
//	    decay        <duration>
//	    message_cost <size>
//	}
func (p *LeastLoad) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return parseOptions(d, options{
		"decay": durationOption(&p.Decay),
		"message_cost": func(d *caddyfile.Dispenser) error {
			word := d.Val()
			value, err := oneArg(d)
			if err != nil {
				return err
			}
			n, err := humanize.ParseBytes(value)
			if err != nil || n == 0 || n > maxMessageCost {
				return d.Errf("%s: %q is not a size up to 1GiB", word, value)
			}
			p.MessageCost = int64(n)
			return nil
		},
	})
}

// Validate implements caddy.Validator.
func (p *LeastLoad) Validate() error {
	if p.MessageCost < 0 || p.MessageCost > maxMessageCost {
		return fmt.Errorf("message_cost: %d is not a number of bytes up to %d", p.MessageCost, maxMessageCost)
	}
	return checkDurations(map[string]caddy.Duration{"decay": p.Decay})
}

// Build implements [Policy].
func (p *LeastLoad) Build(s *upstream.Snapshot) Picker {
	cost := p.MessageCost
	if cost == 0 {
		cost = defaultMessageCost
	}
	key := loadKey{orDefault(p.Decay, defaultLoadDecay), cost}
	k := &leastLoad{learner: learner{candidates: newWeighted(s)}, decay: key.decay.Seconds(), cost: float64(cost)}
	k.audience.Needs = Needs{Work: true}
	now := clock()
	k.known = remember(s, key, func() *workload { return new(workload) })
	for place, l := range k.known {
		l.begin(k.states[place], now)
	}
	k.measure(now)
	k.measured.Store(now)
	return k
}

// loadKey is where a State remembers a workload.
type loadKey struct {
	decay time.Duration
	cost  int64
}

// workload is the work of one endpoint, as far as it was measured. Both averages have the same decay time, so that they
// rise in the same way.
type workload struct {
	rate   atomic.Uint64 // average work per second; the bits of a float64
	active atomic.Uint64 // average calls in flight; likewise
	picks  atomic.Int64  // since the last measurement

	mu              sync.Mutex
	begun           bool
	last            int64 // by the clock
	messages, bytes uint64
}

// begin starts to measure, if that has not begun.
func (l *workload) begin(s *upstream.State, now int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w := s.Work(); !l.begun {
		l.begun, l.last, l.messages, l.bytes = true, now, w.Messages(), w.Bytes()
	}
}

// measure takes into account what has been done since the last time, and returns how much that was and how many calls
// were begun.
func (l *workload) measure(s *upstream.State, now int64, decay, cost float64) (work, picks float64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	passed := now - l.last
	if passed < int64(loadPause) {
		return 0, 0
	}
	w := s.Work()
	messages, bytes := w.Messages(), w.Bytes()
	work = float64(messages-l.messages)*cost + float64(bytes-l.bytes)
	l.last, l.messages, l.bytes = now, messages, bytes
	seconds := float64(passed) / 1e9
	keep := math.Exp(-seconds / decay)
	store(&l.rate, number(&l.rate)*keep+work/seconds*(1-keep))
	store(&l.active, number(&l.active)*keep+float64(s.Active())*(1-keep))
	return work, float64(l.picks.Swap(0))
}

func number(a *atomic.Uint64) float64   { return math.Float64frombits(a.Load()) }
func store(a *atomic.Uint64, x float64) { a.Store(math.Float64bits(x)) }

type leastLoad struct {
	learner
	decay float64     // seconds
	cost  float64     // of a message, in bytes
	known []*workload // by place

	perActive atomic.Uint64 // work per second of a call in flight, on average; the bits of a float64
	perPick   atomic.Uint64 // work of a call from its begin to its end, on average; likewise

	measured  atomic.Int64 // when, by the clock
	measuring atomic.Bool
}

// Pick implements [Picker].
func (p *leastLoad) Pick(in PickInfo) (Pick, bool) {
	if now, last := clock(), p.measured.Load(); now-last >= int64(loadInterval) && p.measured.CompareAndSwap(last, now) && p.measuring.CompareAndSwap(false, true) {
		go func() {
			defer p.measuring.Store(false)
			p.measure(now)
		}()
	}
	best, other, ok := p.drawTwo(&in)
	if !ok {
		return Pick{}, false
	}
	if best != other && clearlyLess(p.of(other), p.of(best)) {
		best = other
	}
	p.known[best].picks.Add(1)
	return p.result(best, true)
}

// of is how much work per second the endpoint is taken to have:
//
//	rate + picks × perPick/decay + (active − average of active) × perActive + active × cost
//
// The first three are the measured work and what of it was not measured yet. A call that is over at once raises the
// average by its work divided by the decay time, which is known before it is measured; without that, all calls between
// two measurements would go to the endpoints that were idle at the first. A call that stays does so slowly, as its part of
// the average of calls in flight grows; what is missing there is added at the work of an average call. The last is for
// calls that do nothing.
func (p *leastLoad) of(place int) float64 {
	l, active := p.known[place], float64(p.states[place].Active())
	work := number(&l.rate) + float64(l.picks.Load())*number(&p.perPick)/p.decay + (active-number(&l.active))*number(&p.perActive)
	return (max(work, 0) + active*p.cost) * p.shares.lightness(place)
}

// measure measures all endpoints, off the calls' path.
func (p *leastLoad) measure(now int64) {
	var rate, active, work, picks float64
	for i, l := range p.known {
		w, n := l.measure(p.states[i], now, p.decay, p.cost)
		work, picks = work+w, picks+n
		rate += number(&l.rate)
		active += number(&l.active)
	}
	if active > 0 {
		store(&p.perActive, rate/active)
	}
	if picks > 0 {
		store(&p.perPick, work/picks)
	}
}

var (
	_ Policy                = (*LeastLoad)(nil)
	_ caddy.Validator       = (*LeastLoad)(nil)
	_ caddyfile.Unmarshaler = (*LeastLoad)(nil)
)
