package selection

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(RandomChoose)) }

// RandomChoose is `reverse_proxy`'s name, with its words, for what `least_request` does here.
type RandomChoose struct {
	// How many endpoints are drawn for each pick where there are more than 10, at least 2; more than 10 count as 10.
	// Default: `2`.
	Choose int `json:"choose,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*RandomChoose) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "random_choose", New: func() caddy.Module { return new(RandomChoose) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy random_choose <choose>
func (p *RandomChoose) UnmarshalCaddyfile(d *caddyfile.Dispenser) (err error) {
	if p.Choose, err = parseCount(d); err == nil && p.Choose == 0 {
		return d.ArgErr()
	}
	if err == nil {
		err = parseEnd(d, "random_choose")
	}
	return err
}

// Validate implements caddy.Validator.
func (p *RandomChoose) Validate() error {
	if p.Choose == 0 {
		return nil
	}
	return checkCount("choose", p.Choose)
}

// Build implements [Policy].
func (p *RandomChoose) Build(s *upstream.Snapshot) Picker {
	return newLeastRequest(newBusyness(s, nil), p.Choose)
}

var (
	_ Policy                = (*RandomChoose)(nil)
	_ caddy.Validator       = (*RandomChoose)(nil)
	_ caddyfile.Unmarshaler = (*RandomChoose)(nil)
)
