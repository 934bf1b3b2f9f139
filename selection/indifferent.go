package selection

// Indifferent tells whether a policy does not mind which of the endpoints of one priority gets a call, as long as the load
// is spread: it hashes no key, binds no client, and prefers none by its place in the list or elsewhere. A call may then go to an
// endpoint that is connected already instead of waiting for another one's connection.
func Indifferent(p Policy) bool {
	switch p := p.(type) {
	case *Priority:
		return Indifferent(p.child)
	case *RoundRobin, *WeightedRoundRobin, *LeastRequest, *LeastConn, *LeastLoad, *PeakEWMA, *Random, *RandomChoose, *ORCA:
		return true
	}
	return false
}
