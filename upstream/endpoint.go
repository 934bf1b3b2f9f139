// Package upstream holds what is known about upstreams: where they are (Endpoint), which exist now (Snapshot) and how
// they are doing (State), the last of which is shared by all handlers and survives configuration reloads.
package upstream

// Endpoint is one dialable address.
type Endpoint struct {
	// Network is tcp or unix.
	Network string
	// Address is host:port, or the socket's path. It names the endpoint in logs and metrics.
	Address string
	// Weight is the endpoint's share relative to its siblings. 0 counts as 1.
	Weight uint32
	// State is the endpoint's live state. It is never nil in a Snapshot.
	State *State
}

// Snapshot is an immutable list of endpoints. Changes make a new one with a higher Generation.
type Snapshot struct {
	Generation uint64
	Endpoints  []Endpoint
}
