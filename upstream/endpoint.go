// Package upstream holds what is known about upstreams: where they are (Endpoint), which exist now (Snapshot), how many calls
// they have (Load), how their connections are (Link) and how they are doing (State). The last three are shared by handlers and
// survive configuration reloads: a Load is of all that use the address, a Link of those that reach it in the same way, a State
// of those of them that judge its health in the same way.
package upstream

import "net"

// MaxWeight is the largest weight of an endpoint. Weights are clamped to it, so that sums of them stay small.
const MaxWeight = 65_535

// Endpoint is one dialable address and what its source says about it. Endpoints are values; what Metadata points to
// must not change any more once the endpoint was handed on.
type Endpoint struct {
	// Index is the endpoint's place in its handler's list, which numbers the live endpoints first and then those that
	// drain. It is what pickers return and what names an endpoint in PickInfo.Tried. In a part of a snapshot it differs
	// from the place in the slice.
	Index int
	// Network is tcp or unix.
	Network string
	// Address is host:port, or the socket's path. It names the endpoint in logs and metrics.
	Address string
	// Name is the host name that the address was found by, if it was. TLS verifies the endpoint by it.
	Name string
	// Weight is the endpoint's share relative to its siblings, at most MaxWeight. 0 counts as 1.
	Weight uint32
	// Priority is the endpoint's level: a higher number is used only when the lower ones cannot carry the load.
	Priority uint32
	// Locality says where the endpoint is.
	Locality Locality
	// Metadata is what else the source says. Policies choose by it; "hash_key" replaces the address in hashing (gRFC A76).
	Metadata map[string]string
	// Origin names the source that the endpoint came from: "static", "dns:///name", ….
	Origin string
	// State is the endpoint's live state. It is never nil in a Snapshot; sources leave it out.
	State *State
}

// EffectiveWeight is Weight with its default.
func (e *Endpoint) EffectiveWeight() uint32 {
	return min(max(e.Weight, 1), MaxWeight)
}

// HashKey is what stands for the endpoint in consistent hashing: gRFC A76's hash_key, else the address.
func (e *Endpoint) HashKey() string {
	if k := e.Metadata["hash_key"]; k != "" {
		return k
	}
	return e.Address
}

// Authority is how the endpoint is addressed by calls whose client has not said it, or has said something unusable.
func (e *Endpoint) Authority() string {
	switch {
	case e.Network == "unix":
		return "localhost"
	case e.Name != "":
		if _, port, err := net.SplitHostPort(e.Address); err == nil {
			return net.JoinHostPort(e.Name, port)
		}
	}
	return e.Address
}

// Locality is where an endpoint is, from the large to the small. Parts that are not known are empty.
type Locality struct {
	Region  string `json:"region,omitempty"`
	Zone    string `json:"zone,omitempty"`
	SubZone string `json:"sub_zone,omitempty"`
}

// Snapshot is an immutable list of endpoints. Changes make a new one with a higher Generation.
type Snapshot struct {
	Generation uint64
	// Endpoints are those that take new calls.
	Endpoints []Endpoint
	// Draining are those that have left the list, or are being drained, while calls still run on them. Only a policy
	// that binds a client to its endpoint (sticky sessions) may pick them.
	Draining []Endpoint
}

// At is the endpoint of an index (see Endpoint.Index).
func (s *Snapshot) At(index int) *Endpoint {
	if n := len(s.Endpoints); index >= n {
		return &s.Draining[index-n]
	}
	return &s.Endpoints[index]
}
