package healthcheck

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// SlowStart gives an upstream that has just become usable, or was just found, less than its share at first, so that it can
// fill its caches and compile its code. It acts through the weights, so only policies that weigh heed it. It is Envoy's
// slow start mode.
type SlowStart struct {
	// How long it takes until an upstream has its full share. Default: none; slow start is off without it.
	Window caddy.Duration `json:"window,omitempty"`

	// How the share grows: linearly with 1, faster at first with more, slower at first with less. Default: `1`.
	Aggression float64 `json:"aggression,omitempty"`

	// The share to begin with, in percent. Default: `10`.
	MinWeightPercent float64 `json:"min_weight_percent,omitempty"`
}

// Provision checks the settings and fills in the defaults.
func (s *SlowStart) Provision(caddy.Context) error {
	switch {
	case s.Window <= 0:
		return fmt.Errorf("slow start: window is %v; it must be positive", time.Duration(s.Window))
	case s.Aggression < 0:
		return fmt.Errorf("slow start: aggression is %g; it must be greater than 0", s.Aggression)
	case s.MinWeightPercent < 0 || s.MinWeightPercent > 100:
		return errors.New("slow start: min_weight_percent must be between 0 and 100")
	}
	defaultTo(&s.Aggression, 1)
	defaultTo(&s.MinWeightPercent, 10)
	return nil
}

// Factor is what an endpoint's weight is to be multiplied by, between MinWeightPercent and 1, when it has been usable for
// so long. Envoy (api/envoy/config/cluster/v3/cluster.proto, SlowStartConfig):
//
//	max(min_weight_percent, (max(time_since_start, 1s) / slow_start_window) ^ (1 / aggression))
func (s *SlowStart) Factor(usableFor time.Duration) float64 {
	if s == nil || usableFor >= time.Duration(s.Window) {
		return 1
	}
	share := float64(max(usableFor, time.Second)) / float64(s.Window)
	return min(1, max(s.MinWeightPercent/100, math.Pow(share, 1/s.Aggression)))
}

// FactorSince is Factor at a moment, for an endpoint that is usable since another; 1 if it always was (zero since).
func (s *SlowStart) FactorSince(since, now time.Time) float64 {
	if since.IsZero() {
		return 1
	}
	return s.Factor(now.Sub(since))
}
