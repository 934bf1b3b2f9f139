package healthcheck

import (
	"slices"
	"sync"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// status is what a check thinks of its endpoint.
type status uint8

const (
	connecting status = iota
	healthy
	unhealthy
)

type vote struct {
	status status
	why    string
}

// votes gathers what several checks think of one endpoint: it is unhealthy if one of the server as a whole says so,
// connecting if one has not made up its mind, and else healthy. Checks of services decide about these alone.
type votes struct {
	mu sync.Mutex
	of map[*checker]vote
}

type votesKey struct{}

func votesOf(s *upstream.State) *votes {
	return s.Memory(votesKey{}, func() any { return &votes{of: make(map[*checker]vote)} }).(*votes)
}

// cast counts a checker's vote.
func (v *votes) cast(s *upstream.State, c *checker, is vote) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.of[c] = is
	v.applyLocked(s)
}

// withdraw takes it back.
func (v *votes) withdraw(s *upstream.State, c *checker) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.of[c]; ok {
		delete(v.of, c)
		v.applyLocked(s)
	}
}

func (v *votes) applyLocked(s *upstream.State) {
	add, why := upstream.Reason(0), ""
	var down []string
	for c, vote := range v.of {
		switch service := c.target.Service; {
		case vote.status == unhealthy && service != "":
			down = append(down, service)
		case vote.status == unhealthy:
			add, why = upstream.Unhealthy, vote.why
		case vote.status == connecting && add == 0:
			add = upstream.Connecting
		}
	}
	slices.Sort(down)
	s.SetNotServing(slices.Compact(down)...) // before calls may come
	remove := (upstream.Unhealthy | upstream.Connecting) &^ add
	s.Change(add, remove, why)
}
