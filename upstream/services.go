package upstream

import "slices"

// UsableForAll is Usable for calls of whatever service. Where it is false, UsableFor may still be true for some.
func (s *State) UsableForAll() bool { return Reason(s.reasons.Load())&(unusable|perService) == 0 }

// UsableFor is Usable for calls of one service. It costs the same as long as all services are being served.
func (s *State) UsableFor(service string) bool { return s.UsableForExcept(service, 0) }

// UsableForExcept is UsableFor for those to whom the reasons mean nothing.
func (s *State) UsableForExcept(service string, except Reason) bool {
	r := Reason(s.reasons.Load()) &^ except
	return r&unusable == 0 && (r&perService == 0 || s.Serves(service))
}

// Serves tells whether the endpoint takes calls of the service, if it takes any.
func (s *State) Serves(service string) bool {
	down := s.notServing.Load()
	return down == nil || !slices.Contains(*down, service)
}

// SetNotServing names, sorted, all the services whose calls the endpoint does not take from now on.
func (s *State) SetNotServing(services ...string) {
	var before *[]string
	if len(services) == 0 {
		s.reasons.And(^uint32(perService))
		before = s.notServing.Swap(nil)
	} else {
		before = s.notServing.Swap(&services)
		s.reasons.Or(uint32(perService))
	}
	if before == nil && len(services) > 0 || before != nil && !slices.Equal(*before, services) {
		s.notify(ServicesChanged)
	}
}
