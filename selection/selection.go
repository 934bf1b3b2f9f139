// Package selection chooses an endpoint for each attempt of a call. One file per policy.
//
// A policy is a Caddy module in the namespace http.grpc_proxy.selection_policies whose type implements [Policy]. The
// name after the namespace is the word after lb_policy in the Caddyfile and the value of "policy" in JSON. Modules of
// others are welcome: implement Policy (and caddyfile.Unmarshaler, to be usable from the Caddyfile), pass
// selectiontest, register.
//
// What a policy can do beyond picking, it says by implementing further interfaces, all optional: its picker may be a
// [Learner] or an [Annotator], the policy itself a [HealthWatcher], a [LoadReportReceiver], [Selective] or a [Carrier]. A
// policy that chooses among policies (priorities, localities) passes these on to its children.
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
	// Pick returns the Index of an endpoint in the snapshot (see [upstream.Endpoint]), or false when none is left. It
	// picks no endpoint that has been tried in this call or whose state is not usable. It must not block, lock or
	// allocate.
	Pick(in PickInfo) (index int, ok bool)
}

// PickInfo is what a picker may look at.
type PickInfo struct {
	// Call is the RPC. It may be nil in tests of policies that do not look at it.
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

// Needs says what a Learner wants to be told, so that no call pays for more.
type Needs struct {
	// Attempts: Done is called.
	Attempts bool
	// FirstMessage: Responded is called.
	FirstMessage bool
	// LoadReports: call.Attempt.LoadReport is filled from the trailer endpoint-load-metrics-bin, which is then not
	// passed on to the client.
	LoadReports bool
	// ForwardLoadReports: it is passed on all the same.
	ForwardLoadReports bool
	// Work: the endpoints' upstream.Work is counted.
	Work bool
}

// Or joins the needs of two.
func (n Needs) Or(m Needs) Needs {
	return Needs{
		Attempts:           n.Attempts || m.Attempts,
		FirstMessage:       n.FirstMessage || m.FirstMessage,
		LoadReports:        n.LoadReports || m.LoadReports,
		ForwardLoadReports: n.ForwardLoadReports || m.ForwardLoadReports,
		Work:               n.Work || m.Work,
	}
}

// Learner is a Picker that learns from how calls went. Its methods are called concurrently, on calls' paths: they must
// be as quick as Pick.
type Learner interface {
	Picker
	// Needs is asked once, when the picker was built.
	Needs() Needs
	// Responded tells how long the endpoint took to answer: from the last piece of the request that was sent before the
	// first message of the answer, or its end if it has no message, up to that. It comes at most once per attempt, and
	// before Done; not at all for an attempt that fails without an answer.
	Responded(index int, latency time.Duration)
	// Done tells how an attempt went, once, when it is over. The value belongs to the caller again when Done returns.
	Done(index int, a *call.Attempt)
}

// Annotator is a Picker that adds fields to the answer of the call it picked an endpoint for, a cookie, say.
type Annotator interface {
	Picker
	// Annotate is called when the answer's head goes to the client, with the endpoint that it comes from. It is not
	// called for answers that the proxy makes.
	Annotate(c *call.Call, index int, add func(name, value string))
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
