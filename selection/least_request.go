package selection

import (
	"fmt"
	"math"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(LeastRequest)) }

const (
	defaultChoices = 2
	minChoices     = 2
	maxChoices     = 10
	// few is up to how many endpoints all are looked at, since that takes no longer than two draws (measured: 11 ns where
	// they are idle, and 14 to 30 ns where they are busy, against 30 to 36; half as much again with weights, for both).
	few = 10
)

// LeastRequest draws a few endpoints at random, each of them once, and picks the one of them with the fewest calls in
// flight. So slow or busy endpoints get less without anybody looking at all endpoints for each call, and without all calls
// going to the same idle one. Where there are no more than 10 endpoints, it looks at all of them, and any of those with the
// fewest calls is picked: one that hangs gets no more calls once it has more than the others. It is the default policy.
//
// It is gRPC's and Envoy's algorithm for endpoints of equal weight (gRFC A48), which draw with repetition. Where the upstreams have weights, an
// endpoint is drawn with a chance as large as its weight says, and calls in flight are counted per weight: an endpoint of
// weight 3 is as busy with 3 calls as one of weight 1 is with one. So endpoints without calls are picked as their weights
// say, and under load they have as many calls in flight as their weights say.
type LeastRequest struct {
	// How many endpoints are drawn for each pick where there are more than 10, at least 2; more than 10 count as 10. None is
	// drawn twice. Default: `2`.
	ChoiceCount int `json:"choice_count,omitempty"`
	// How much calls in flight count against weights, where the upstreams have weights: 0 means not at all, so that
	// endpoints are picked by weight alone, and more than 1 more than in proportion. Default: `1`.
	ActiveRequestBias *float64 `json:"active_request_bias,omitempty"`
	// Look at all endpoints for each pick instead of drawing a few. It takes longer the more endpoints there are, and
	// proxies that see the same idle endpoint all send their next call there. Default: `false`.
	FullScan bool `json:"full_scan,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*LeastRequest) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "least_request", New: func() caddy.Module { return new(LeastRequest) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy least_request [<choice_count>] {
//	    active_request_bias <number>
//	    full_scan
//	}
func (p *LeastRequest) UnmarshalCaddyfile(d *caddyfile.Dispenser) (err error) {
	if p.ChoiceCount, err = parseCount(d); err != nil {
		return err
	}
	return options{
		"active_request_bias": optionalNumberOption(&p.ActiveRequestBias),
		"full_scan":           flagOption(&p.FullScan),
	}.parse(d, "least_request")
}

// Validate implements caddy.Validator.
func (p *LeastRequest) Validate() error {
	if p.ChoiceCount != 0 {
		if p.FullScan {
			return fmt.Errorf("choice_count: with full_scan all endpoints are looked at, and none drawn; remove one of the two")
		}
		if err := checkCount("choice_count", p.ChoiceCount); err != nil {
			return err
		}
	}
	// Envoy does the same: "If this value is less than 0 …", the configuration is rejected.
	return checkNotNegative("active_request_bias", p.ActiveRequestBias)
}

// checkCount: gRFC A48: "If choice_count < 2, the config will be rejected."
func checkCount(name string, n int) error {
	if n < minChoices {
		return fmt.Errorf("%s: %d endpoints to choose from are too few, the least is %d", name, n, minChoices)
	}
	return nil
}

func checkNotNegative(name string, x *float64) error {
	if x != nil && !(*x >= 0 && *x <= math.MaxFloat64) {
		return fmt.Errorf("%s: %s is not a number of 0 or more", name, strconv.FormatFloat(*x, 'g', -1, 64))
	}
	return nil
}

// Build implements [Policy].
func (p *LeastRequest) Build(s *upstream.Snapshot) Picker {
	b := newBusyness(s, p.ActiveRequestBias)
	if p.FullScan {
		return newFullScan(b)
	}
	return newLeastRequest(b, p.ChoiceCount)
}

func newLeastRequest(b busyness, choices int) Picker {
	if choices == 0 {
		choices = defaultChoices
	}
	if b.len() <= few {
		return newFullScan(b)
	}
	// gRFC A48: "If a LeastRequestLoadBalancingConfig with a choice_count > 10 is received, the
	// least_request_experimental policy will set choice_count = 10."
	return &leastRequest{b, min(max(choices, minChoices), maxChoices)}
}

// busyness is candidates that are compared by their calls in flight.
type busyness struct {
	candidates
	bias float64
}

func newBusyness(s *upstream.Snapshot, bias *float64) busyness {
	b := busyness{newWeighted(s), 1}
	if bias != nil && b.shares != nil {
		b.bias = *bias
	}
	return b
}

// of is how busy the endpoint is. Where all weigh the same, it is the number of calls in flight.
//
// Envoy's weighted form lets an endpoint's turns come as often as weight / (active + 1)^bias says. We draw by weight, and
// compare ((active + 1)^bias - 1) / weight: the bias means the same (0 leaves the weights alone), and without calls in
// flight all are equally busy, so that the draw, and with it the weight, decides. Comparing (active + 1)^bias / weight
// would count the weight twice then: of two endpoints with weights 1 and 3, the larger one would get 15 of 16 calls. Under
// load, that each draw by weight takes the least busy per weight keeps the calls in flight as close to the weights as
// two draws keep equal ones together (Berenbrink et al., "Balls into non-uniform bins", 2010).
func (b *busyness) of(place int) float64 {
	n := float64(b.states[place].Active())
	if b.shares == nil {
		return n
	}
	if b.bias != 1 {
		n = math.Pow(n+1, b.bias) - 1
	}
	return n * b.shares.lightness(place)
}

type leastRequest struct {
	busyness
	choices int
}

// Pick implements [Picker] with the loop of gRFC A48, "Picker Behavior", but that no endpoint is drawn twice. A48 on its own
// loop, in "Allow picking same candidate multiple times": "This means that even a frozen endpoint would never fully be
// excluded by the picker." Of those that are equally busy the one that was drawn first wins, which is any of them.
func (p *leastRequest) Pick(in PickInfo) (Pick, bool) {
	best, ok := p.draw(&in)
	if !ok {
		return Pick{}, false
	}
	least := p.of(best)
	d := drawn{best}
	for n := 1; n < p.choices; n++ {
		i, ok := p.drawOther(&d, n, &in)
		if !ok {
			break // There are no more.
		}
		if x := p.of(i); x < least {
			best, least = i, x
		}
		d.add(n, i)
	}
	return p.result(best, true)
}

// fullScan picks the least busy of all.
type fullScan struct {
	busyness
	light []float64 // lightness by place, nil where all weigh the same
}

func newFullScan(b busyness) *fullScan {
	p := &fullScan{busyness: b}
	if b.shares != nil {
		p.light = make([]float64, b.len())
		for i := range p.light {
			p.light[i] = b.shares.lightness(i)
		}
	}
	return p
}

// Pick implements [Picker]. Among endpoints that are equally busy, lots are drawn.
//
// Nothing is less busy than an idle endpoint, and to draw until there is one leaves each idle one the same chance as to
// look at all: where many are idle, there is no need to scan. In small sets a scan is as quick as a few draws.
func (p *fullScan) Pick(in PickInfo) (Pick, bool) {
	if p.len() == 0 {
		return Pick{}, false
	}
	for range max(1, min(p.len()/8, maxDraws)) {
		if i := p.any(); p.of(i) == 0 && p.open(i, &in) {
			return p.result(i, true)
		}
	}
	if p.light == nil {
		return p.pickFewest(&in)
	}
	return p.pickLeast(&in)
}

// pickLeast compares as busyness does. The loops here and below are written out for speed.
func (p *fullScan) pickLeast(in *PickInfo) (Pick, bool) {
	first := in.plain()
	best, least := -1, math.Inf(1)
	equal, next := 0.0, 0.0 // As in lots.
	for i, s := range p.states {
		x := float64(s.Active())
		if p.bias != 1 {
			x = math.Pow(x+1, p.bias) - 1
		}
		x *= p.light[i]
		if x > least || !(first && s.UsableForAll()) && !p.open(i, in) {
			continue
		}
		if x < least {
			least, equal, next = x, 0, 0
		}
		if equal += 1 / p.light[i]; equal > next {
			best, next = i, equal/randFloat()
		}
	}
	return p.result(max(best, 0), best >= 0)
}

// pickFewest is pickLeast where all weigh the same.
func (p *fullScan) pickFewest(in *PickInfo) (Pick, bool) {
	first := in.plain()
	best, fewest := -1, int64(math.MaxInt64)
	equal, next := 0, 0 // As in lots.
	for i, s := range p.states {
		n := s.Active()
		if n > fewest || !(first && s.UsableForAll()) && !p.open(i, in) {
			continue
		}
		if n < fewest {
			fewest, equal, next = n, 0, 0
		}
		if equal++; equal > next {
			best = i
			next = int(min(float64(equal)/randFloat(), math.MaxInt32))
		}
	}
	return p.result(max(best, 0), best >= 0)
}

var (
	_ Policy                = (*LeastRequest)(nil)
	_ caddy.Validator       = (*LeastRequest)(nil)
	_ caddyfile.Unmarshaler = (*LeastRequest)(nil)
)
