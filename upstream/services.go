package upstream

import "sync/atomic"

// services says of which services an endpoint takes calls. It is replaced, never changed.
type services struct {
	of    map[string]Service
	asker Asker
}

// Service is what is known of a service on an endpoint.
type Service struct {
	// Usable: calls of the service may go to the endpoint, if any may.
	Usable bool
	// Known: whether the endpoint has the service at all.
	Known Known
	// Used, if it is not nil, is set when a call of the service comes.
	Used *atomic.Bool
}

// Known says whether an endpoint has a service.
type Known uint8

const (
	// Unsure: it has not said yet.
	Unsure Known = iota
	// Has: it has reported on the service, good or bad.
	Has
	// HasNot: it has said that it does not know the service, or that it reports on none.
	HasNot
)

// Asker finds out about services that are not in the map of SetServices.
type Asker interface {
	// Missing is told, on a call's path, that a call names a service that is not in the map. It must not block.
	Missing(service string)
	// Ask is told that somebody wants to know of a service. It is false if there will be no answer.
	Ask(service string) bool
}

// UsableForAll is Usable for calls of whatever service. Where it is false, UsableFor may still be true for some.
func (s *State) UsableForAll() bool { return Reason(s.reasons.Load())&(unusable|perService) == 0 }

// UsableFor is Usable for calls of one service. It costs the same as long as nobody has called SetServices; then it
// costs looking the service up.
func (s *State) UsableFor(service string) bool {
	r := Reason(s.reasons.Load())
	if r&(unusable|perService) == 0 {
		return true
	}
	return r&unusable == 0 && s.serves(service)
}

// UsableForExcept is UsableFor for those to whom the reasons mean nothing.
func (s *State) UsableForExcept(service string, except Reason) bool {
	r := Reason(s.reasons.Load()) &^ except
	return r&unusable == 0 && (r&perService == 0 || s.serves(service))
}

func (s *State) serves(service string) bool {
	p := s.services.Load()
	if p == nil {
		return true
	}
	is, asked := p.of[service]
	if !asked {
		if p.asker != nil {
			p.asker.Missing(service)
		}
		return true // what holds for the endpoint holds for the service
	}
	if is.Used != nil && !is.Used.Load() { // else the line stays with all processors
		is.Used.Store(true)
	}
	return is.Usable
}

// Service is what is known of a service, by itself, whether or not the endpoint takes calls. The question makes the
// endpoint be asked about it. asked is false if it is not, because nobody has called SetServices or since too many others
// are asked about already.
func (s *State) Service(name string) (is Service, asked bool) {
	p := s.services.Load()
	if p == nil {
		return Service{}, false
	}
	if is, asked = p.of[name]; asked || p.asker == nil {
		return is, asked
	}
	if !p.asker.Ask(name) {
		return Service{}, false
	}
	if p = s.services.Load(); p != nil {
		is = p.of[name]
	}
	return is, true
}

// SetServices says of which services the endpoint takes calls, from now on; services that are not in the map it takes as
// it takes calls at all. asker, if not nil, is asked about these. The map must not be changed any more. A nil map ends that.
func (s *State) SetServices(services map[string]Service, asker Asker) {
	s.setServices(services, asker)
	s.notify(ServicesChanged)
}

func (s *State) setServices(of map[string]Service, asker Asker) {
	if of == nil {
		s.reasons.And(^uint32(perService))
		s.services.Store(nil)
		return
	}
	s.services.Store(&services{of, asker})
	s.reasons.Or(uint32(perService))
}

// Services is the map that SetServices was given, nil if none is in force. It must not be changed.
func (s *State) Services() map[string]Service {
	if p := s.services.Load(); p != nil {
		return p.of
	}
	return nil
}
