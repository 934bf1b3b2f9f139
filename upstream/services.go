package upstream

// services says of which services an endpoint takes calls. It is replaced, never changed.
type services struct {
	serving map[string]bool
	missing func(service string)
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

func (s *State) serves(service string) bool {
	p := s.services.Load()
	if p == nil {
		return true
	}
	ok, known := p.serving[service]
	if !known {
		if p.missing != nil {
			p.missing(service)
		}
		return true // what holds for the endpoint holds for the service
	}
	return ok
}

// SetServices says of which services the endpoint takes calls, from now on; services that are not in the map it takes as
// it takes calls at all. missing, if not nil, is called on calls' paths with services that are not in the map: it must not
// block. The map must not be changed any more. A nil map ends that.
func (s *State) SetServices(serving map[string]bool, missing func(service string)) {
	if serving == nil {
		s.reasons.And(^uint32(perService))
		s.services.Store(nil)
		return
	}
	s.services.Store(&services{serving, missing})
	s.reasons.Or(uint32(perService))
}

// Services is the map that SetServices was given, nil if none is in force. It must not be changed.
func (s *State) Services() map[string]bool {
	if p := s.services.Load(); p != nil {
		return p.serving
	}
	return nil
}
