package selection

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// learner is candidates, with their weights, that are told about by their indexes.
type learner struct {
	candidates
	places map[int]int32 // nil where each index is the place
}

func newLearner(s *upstream.Snapshot) learner {
	l := learner{candidates: newWeighted(s)}
	if l.indexes != nil {
		l.places = make(map[int]int32, l.len())
		for place, index := range l.indexes {
			l.places[int(index)] = int32(place)
		}
	}
	return l
}

// place is where the endpoint is. There is none for endpoints of others, and for those that drain.
func (l *learner) place(index int) (int, bool) {
	if l.places != nil {
		place, ok := l.places[index]
		return int(place), ok
	}
	return index, index >= 0 && index < l.len()
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
