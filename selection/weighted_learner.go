package selection

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// learner is candidates, with their weights, whose picks have an audience. The token of a pick is the endpoint's place.
type learner struct {
	candidates
	audience Audience
}

// result is what a picker returns for the place that it chose.
func (l *learner) result(place int, ok bool) (Pick, bool) {
	if !ok {
		return Pick{}, false
	}
	return Pick{Index: l.index(place), Audience: &l.audience, Token: uint64(place), AnyWillDo: true}, true
}

// Interests implements [Interested].
func (l *learner) Interests(f func(Pick)) {
	for place := range l.states {
		pick, _ := l.result(place, true)
		f(pick)
	}
}

// remember returns what is remembered of each endpoint under the key, made by create for those that nothing is remembered
// of.
func remember[T any](s *upstream.Snapshot, key any, create func() *T) []*T {
	known := make([]*T, len(s.Endpoints))
	for i := range s.Endpoints {
		known[i] = s.Endpoints[i].State.Memory(key, func() any { return create() }).(*T)
	}
	return known
}

func orDefault(d caddy.Duration, def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return time.Duration(d)
}

// checkDurations refuses those below 0, by name.
func checkDurations(durations map[string]caddy.Duration) error {
	for _, name := range slices.Sorted(maps.Keys(durations)) {
		if d := time.Duration(durations[name]); d < 0 {
			return fmt.Errorf("%s: %v is negative; leave it out for the default", name, d)
		}
	}
	return nil
}
