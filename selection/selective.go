package selection

import (
	"slices"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Selective is a Policy that leaves endpoints unused. Those are not looked after: no connections are made before there are
// calls, nothing asks for their health or their load. Within other policies than Priority all endpoints are.
type Selective interface {
	Policy
	// Uses returns the indexes of the endpoints that calls go to as things are now, nil if these are all. It is asked before
	// Build for each snapshot, and again when an endpoint's health has changed.
	Uses(s *upstream.Snapshot) []int
}

// Uses implements [Selective]: what is used of each level.
func (p *Priority) Uses(s *upstream.Snapshot) []int {
	child, ok := p.child.(Selective)
	if !ok {
		return nil
	}
	levels := byPriority(s.Endpoints)
	if len(levels) < 2 {
		return child.Uses(s)
	}
	var used []int
	for _, endpoints := range levels {
		if some := child.Uses(part(s, endpoints)); some != nil {
			used = append(used, some...)
		} else {
			used = append(used, indexes(endpoints)...)
		}
	}
	return used
}

// Uses implements [Selective]: the chosen ones, or all while none of these can be used.
func (p *DeterministicSubset) Uses(s *upstream.Snapshot) []int {
	if len(s.Endpoints) <= p.Size {
		return p.usesOf(s)
	}
	chosen, _ := p.split(s)
	if !slices.ContainsFunc(chosen, func(e upstream.Endpoint) bool {
		return e.State.UsableExcept(upstream.Connecting | upstream.Momentary)
	}) {
		return nil
	}
	if some := p.usesOf(part(s, chosen)); some != nil {
		return some
	}
	return indexes(chosen)
}

func (p *DeterministicSubset) usesOf(s *upstream.Snapshot) []int {
	if child, ok := p.child.(Selective); ok {
		return child.Uses(s)
	}
	return nil
}

// WatchesHealth implements [HealthWatcher]: when none of the chosen endpoints can be used any more, others are.
func (p *DeterministicSubset) WatchesHealth() bool {
	return p.chooses.Load() || p.nested.WatchesHealth()
}

// buildSubset makes a picker that uses the rest only while none of the chosen is open.
func (p *DeterministicSubset) buildSubset(s *upstream.Snapshot, chosen, rest []upstream.Endpoint) Picker {
	return &chosenFirst{
		pickers: pickers{p.child.Build(part(s, chosen)), p.child.Build(part(s, rest))},
		chosen:  newCandidates(part(s, chosen)),
	}
}

type chosenFirst struct {
	pickers
	chosen candidates
}

// Pick implements [Picker]. One of the rest will not do, though it may be connected.
func (p *chosenFirst) Pick(in PickInfo) (Pick, bool) {
	pick, ok := p.pickers[0].Pick(in)
	if !ok && !p.awaits(&in) {
		pick, ok = p.pickers[1].Pick(in)
	}
	pick.AnyWillDo = false
	return pick, ok
}

// awaits tells whether one of the chosen is good but for its first health check, which is not over: nobody checks the
// rest, so they would seem to be better.
func (p *chosenFirst) awaits(in *PickInfo) bool {
	if in.Disregard&upstream.Connecting != 0 {
		return false
	}
	for place, s := range p.chosen.states {
		if s.Has(upstream.Connecting) && s.UsableExcept(in.Disregard|upstream.Connecting) && !slices.Contains(in.Tried, p.chosen.index(place)) {
			return true
		}
	}
	return false
}

func indexes(endpoints []upstream.Endpoint) []int {
	list := make([]int, len(endpoints))
	for i := range endpoints {
		list[i] = endpoints[i].Index
	}
	return list
}

var _ Selective = (*Priority)(nil)
