// Package selection chooses an endpoint for each attempt of a call. One file per policy.
//
// A policy is a Caddy module in the namespace http.grpc_proxy.selection_policies whose type implements [Policy]. The
// name after the namespace is the word after lb_policy in the Caddyfile and the value of "policy" in JSON. Modules of
// others are welcome: implement Policy (and caddyfile.Unmarshaler, to be usable from the Caddyfile), pass
// selectiontest, register.
//
// All policies here treat the endpoints of a snapshot alike; [upstream.Endpoint.Weight] is not looked at.
package selection

import (
	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Policy is a configured selection policy: a Caddy module in the namespace http.grpc_proxy.selection_policies.
type Policy interface {
	// Build prepares a picker for one snapshot. It is called for every change of the set or the weights, never on a
	// call's path.
	Build(s *upstream.Snapshot) Picker
}

// Picker chooses among the endpoints of the snapshot it was built for. It is shared by all calls.
type Picker interface {
	// Pick returns the index of an endpoint in the snapshot, or false when none is left. It picks no endpoint that
	// has been tried in this call or whose state is not usable. It must not block, lock or allocate.
	Pick(in PickInfo) (index int, ok bool)
}

// PickInfo is what a picker may look at.
type PickInfo struct {
	// Call is the RPC. It may be nil in tests of policies that do not look at it.
	Call *call.Call
	// Tried holds the indexes of the endpoints that this call has been tried on.
	Tried []int
}
