// Package selection chooses an endpoint for each attempt of a call. One file per policy.
//
// A policy is a Caddy module in the namespace http.grpc_proxy.selection_policies whose type implements [Policy]. The
// name after the namespace is the word after lb_policy in the Caddyfile and the value of "policy" in JSON. Modules of
// others are welcome: implement Policy (and caddyfile.Unmarshaler, to be usable from the Caddyfile), pass
// selectiontest, register.
//
// What becomes of a pick is told to its [Audience], which the picker returns with it: a [Learner] hears how the attempt went, an
// [Annotator] adds to the answer. A policy that chooses among policies (priorities, localities) returns their picks and so need not
// know who that is.
//
// What a policy can do beyond picking, it says by implementing further interfaces, all optional: its picker may be [Interested],
// the policy itself a [HealthWatcher], a [LoadReportReceiver], [Selective], a [Carrier], [Keyed], [Binding] or [Prioritized]. A policy that
// chooses among policies passes those of the policy on to its children, and Interested to their pickers. Nothing else is asked of
// them: policies of others work within those of this package as its own do, and around them.
package selection

import (
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Policy is a configured selection policy: a Caddy module in the namespace http.grpc_proxy.selection_policies.
type Policy interface {
	// Build prepares a picker for one snapshot, or for a part of one. It is called for every change of the set or the
	// weights, never on a call's path.
	Build(s *upstream.Snapshot) Picker
}

// Picker chooses among the endpoints of the snapshot it was built for. It is shared by all calls.
type Picker interface {
	// Pick chooses an endpoint, or returns false when none is left. It picks no endpoint that has been tried in this call or
	// whose state is not usable. It must not block, lock or allocate.
	//
	// A policy that chooses among policies returns the pick of the one that it has chosen. It clears AnyWillDo if it is not all the
	// same to it which endpoint the call goes to, and joins its own Audience to the pick's if it has one.
	Pick(in PickInfo) (Pick, bool)
}

// PickInfo is what a picker may look at.
type PickInfo struct {
	// Call is the RPC. A picker must not keep it. It may be nil in tests of policies that do not look at it.
	Call *call.Call
	// Tried holds the indexes of the endpoints that this call has been tried on.
	Tried []int
	// Disregard are reasons not to use an endpoint that do not count for once: in a panic, when so few endpoints are healthy
	// that calls are balanced over all; or when none has room for another stream and the call has to queue for one.
	Disregard upstream.Reason
	// Connected leaves out endpoints that have no connection: one that is being made may never come about.
	Connected bool
}

// plain tells whether nothing but an endpoint's state says if the call may go there.
func (in *PickInfo) plain() bool { return len(in.Tried) == 0 && !in.Connected }

// usable tells whether the state lets the call in.
func (in *PickInfo) usable(s *upstream.State) bool {
	switch {
	case in.Connected && !s.IsConnected():
		return false
	case in.Call == nil || in.Disregard&upstream.Unhealthy != 0: // in a panic the health of services does not count either
		return s.UsableExcept(in.Disregard)
	case in.Disregard != 0:
		return s.UsableForExcept(in.Call.Service, in.Disregard)
	}
	return s.UsableFor(in.Call.Service)
}

// Learner learns from how attempts went. It is in the Audience of the picks. Its methods are called concurrently, on calls' paths: they
// must be as quick as Pick.
type Learner interface {
	// Responded tells how long the endpoint took to answer: from the last piece of the request that was sent before the
	// first message of the answer, or its end if it has no message, up to that. It comes at most once per attempt, and
	// before Done; not at all for an attempt that fails without an answer. The needs must say FirstMessage.
	Responded(p Pick, latency time.Duration)
	// Done tells how an attempt went, once, when it is over. The value belongs to the caller again when Done returns. The needs
	// must say Attempts.
	Done(p Pick, a *call.Attempt)
}

// Annotator adds fields to the answers of calls, a cookie, say. It is in the Audience of the picks.
type Annotator interface {
	// Annotate is called when the answer's head goes to the client, with the pick of the endpoint that it comes from. It is not
	// called for answers that the proxy makes.
	Annotate(c *call.Call, p Pick, add func(name, value string))
}

// Interested is a Picker that wants to hear also of attempts that it has not picked: where a policy around it has chosen for itself,
// by a key or a session.
type Interested interface {
	Picker
	// Interests calls f with a pick for each endpoint, as Pick would have returned it. Of several for one endpoint the first counts.
	Interests(f func(Pick))
}

// HealthWatcher is a Policy whose pickers depend on which endpoints are usable when they are built. They are built anew,
// debounced, when that changes.
type HealthWatcher interface {
	Policy
	WatchesHealth() bool
}

// LoadReportReceiver is a Policy that wants load reports on a stream of their own (out-of-band, gRFC A51).
type LoadReportReceiver interface {
	Policy
	// ReportInterval is how often endpoints are asked to report; 0 means not at all.
	ReportInterval() time.Duration
	// ReceiveLoadReport takes an xds.data.orca.v3.OrcaLoadReport in wire format.
	ReceiveLoadReport(s *upstream.State, report []byte)
}

// Keyed is a Policy that sends calls with the same key to the same endpoint. A policy that splits its endpoints and is around it
// decides by the same key, or one client's calls would be spread.
type Keyed interface {
	Policy
	// KeyHash returns a hash of the call's key, or false if it has none.
	KeyHash(c *call.Call) (hash uint64, ok bool)
}

// Binding is a Policy that may bind clients to endpoints. Those that would choose among parts of the endpoints first refuse to be
// around it: that choice would break the bond.
type Binding interface {
	Policy
	// BindsClients tells whether the policy, or one within it, binds clients.
	BindsClients() bool
}

// Prioritized is a Policy that heeds the endpoints' priorities itself, or lets policies within it do so, at the place where it is
// right: within the sessions of a sticky policy, say. See [WithPriorities].
type Prioritized interface {
	Policy
	// WithPriorities returns the policy as it is to be used for endpoints of several priorities.
	WithPriorities() Policy
}
