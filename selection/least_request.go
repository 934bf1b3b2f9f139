package selection

import (
	"fmt"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(LeastRequest)) }

const (
	defaultChoices = 2
	minChoices     = 2
	maxChoices     = 10
)

// LeastRequest draws a few endpoints at random and picks the one of them with the fewest calls in flight. So slow or
// busy endpoints get less without anybody looking at all endpoints for each call, and without all calls going to the
// same idle one. It is the default policy.
//
// It is gRPC's and Envoy's algorithm for endpoints of equal weight (gRFC A48).
type LeastRequest struct {
	// How many endpoints are drawn for each pick, at least 2; more than 10 count as 10. The same one may be drawn
	// twice. Default: `2`.
	ChoiceCount int `json:"choice_count,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*LeastRequest) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "least_request", New: func() caddy.Module { return new(LeastRequest) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy least_request [<choice_count>]
func (p *LeastRequest) UnmarshalCaddyfile(d *caddyfile.Dispenser) (err error) {
	p.ChoiceCount, err = parseCount(d)
	return err
}

// Validate implements caddy.Validator.
func (p *LeastRequest) Validate() error {
	if p.ChoiceCount == 0 {
		return nil
	}
	return checkCount("choice_count", p.ChoiceCount)
}

// checkCount: gRFC A48: "If choice_count < 2, the config will be rejected."
func checkCount(name string, n int) error {
	if n < minChoices {
		return fmt.Errorf("%s: %d endpoints to choose from are too few, the least is %d", name, n, minChoices)
	}
	return nil
}

// Build implements [Policy].
func (p *LeastRequest) Build(s *upstream.Snapshot) Picker { return newLeastRequest(s, p.ChoiceCount) }

func newLeastRequest(s *upstream.Snapshot, choices int) Picker {
	if choices == 0 {
		choices = defaultChoices
	}
	// gRFC A48: "If a LeastRequestLoadBalancingConfig with a choice_count > 10 is received, the
	// least_request_experimental policy will set choice_count = 10."
	return &leastRequest{newCandidates(s), min(max(choices, minChoices), maxChoices)}
}

type leastRequest struct {
	candidates
	choices int
}

// Pick implements [Picker] with the loop of gRFC A48, "Picker Behavior": the endpoints are drawn with replacement, and of
// those with as few calls the one that was drawn first wins, which is any of them.
func (p *leastRequest) Pick(in PickInfo) (int, bool) {
	best, ok := p.draw(in.Tried)
	if !ok {
		return 0, false
	}
	fewest := p.states[best].Active()
	for range p.choices - 1 {
		i, ok := p.draw(in.Tried)
		if !ok {
			break // The last one has just become unusable.
		}
		if n := p.states[i].Active(); n < fewest {
			best, fewest = i, n
		}
	}
	return p.index(best), true
}

var (
	_ Policy                = (*LeastRequest)(nil)
	_ caddy.Validator       = (*LeastRequest)(nil)
	_ caddyfile.Unmarshaler = (*LeastRequest)(nil)
)
