package grpcproxy

import (
	"net/netip"
	"slices"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const (
	// connectGrace is how long a call waits for the connection to the endpoint of its choice before it looks for another one;
	// a quarter of its remaining time, if that is less. RFC 8305 section 5 ("Connection Attempt Delay") recommends 250 ms.
	connectGrace = 250 * time.Millisecond
	// connectSlice is how long it waits for one of several, when it has looked at all of them, before it looks again.
	connectSlice = 100 * time.Millisecond
	// fullSlice is how long a call waits for a stream, where all endpoints were full, before it looks for a free one again.
	fullSlice = 250 * time.Millisecond
)

// choose asks the picker for an endpoint that can take the call now. If there is none, but some of which only all streams
// are taken, the call is to wait for one of these.
func (x *exchange) choose() (pick selection.Pick, ok bool) {
	in := x.pickInfo()
	if len(x.passed) > 0 {
		in.Tried = slices.Concat(x.tried, x.passed)
	}
	if pick, ok = x.cur.Picker.Pick(in); !ok && slices.ContainsFunc(x.cur.Live(), isFull) {
		in.Disregard |= upstream.NoRoom
		if pick, ok = x.cur.Picker.Pick(in); ok {
			x.insists = true
		}
	}
	if !ok || x.cur.Endpoints[pick.Index].Ready() {
		return pick, ok
	}
	return x.connected(pick, in), true
}

func isFull(e cluster.Endpoint) bool { return e.State.Has(upstream.NoRoom) }

// connected has the endpoint connected to. An endpoint is usable when its SETTINGS have come, and whether they ever will is not
// known. One call waits for that, for a moment; others get an endpoint that is connected, if the policy does not mind. A call that has
// waited in vain goes back to what is connected to meanwhile, rather than wait for the next one.
func (x *exchange) connected(pick selection.Pick, in selection.PickInfo) selection.Pick {
	in.Connected = true
	if len(x.passed) > 0 && !x.back {
		again := in
		again.Tried = x.tried
		if other, ok := x.cur.Picker.Pick(again); ok && slices.Contains(x.passed, other.Index) {
			x.back = true // once: where the call has connections of its own these may not be there yet
			return other
		}
	}
	x.Since() // or the dial may be over before the call waits for it
	if x.cur.Endpoints[pick.Index].Connect() || !pick.AnyWillDo {
		return pick
	}
	other, ok := x.cur.Picker.Pick(in)
	if live := x.cur.Snapshot.Endpoints; ok && live[other.Index].Priority == live[pick.Index].Priority {
		return other
	}
	return pick
}

// connecting finds an endpoint that is in backoff, and good apart from that, and is being dialled again. All such are asked to
// be dialled: the call has nowhere else to go. It waits for the verdict, as long as it may wait for any connection.
func (x *exchange) connecting() (pick selection.Pick, ok bool) {
	ignore := x.pickInfo().Disregard | upstream.Backoff | upstream.NoRoom
	for i, e := range x.cur.Live() {
		s := e.State
		if !s.Has(upstream.Backoff) || !s.UsableExcept(ignore) || slices.Contains(x.tried, i) || slices.Contains(x.passed, i) {
			continue
		}
		if !s.Serves(x.call.Service) && !x.cur.Panic {
			continue
		}
		if e.For(x.call.ClientIP).Ask() && !ok {
			pick, ok = selection.InterestIn(x.cur.Picker, i), true
		}
	}
	return pick, ok
}

// Client implements transport.Client.
func (x *exchange) Client() netip.Addr { return x.call.ClientIP }

// Since implements transport.Choosy.
func (x *exchange) Since() time.Time {
	if x.since.IsZero() {
		x.since = time.Now()
	}
	return x.since
}

// Patience implements transport.Choosy: a call does not wait for a stream, nor for long for a connection, as long as there
// are endpoints that it has not looked at. Where all are full it waits in one's line, until another one has a free stream.
func (x *exchange) Patience(full bool, since time.Duration) (d time.Duration, limited bool) {
	x.queued = x.queued || full
	alone := len(x.cur.Live()) < 2
	switch {
	case full && (!x.insists && !alone || since > 0 && x.roomElsewhere()):
		return 0, true
	case full:
		return fullSlice, true
	case alone:
		return 0, false
	case x.insists:
		return connectSlice, true
	}
	d = connectGrace
	if end := x.call.Deadline; !end.IsZero() {
		d = min(d, time.Until(end)/4)
	}
	return max(d-since, 0), true
}

// roomElsewhere tells whether the call could go to another endpoint than the one that it waits for, or should look.
func (x *exchange) roomElsewhere() bool {
	if x.h.cluster.View() != x.cur {
		return true
	}
	x.mu.Lock()
	here := x.att.pick.Index
	x.mu.Unlock()
	pick, ok := x.cur.Picker.Pick(x.pickInfo())
	return ok && pick.Index != here
}

// Early implements transport.Choosy: there is no better endpoint than one whose SETTINGS have not come.
func (x *exchange) Early() bool {
	if x.h.Transport.ProxyProtocol != "" && len(x.cur.Live()) > 1 {
		return false // which of the others has a connection for this client is not known
	}
	in := x.pickInfo()
	in.Connected = true
	in.Disregard |= upstream.NoRoom
	_, ok := x.cur.Picker.Pick(in)
	return !ok
}

// withdraw undoes an attempt that has found no stream at once, so that the call looks elsewhere.
func (a *attempt) withdraw(before string) {
	r := &a.x.call.Result
	r.Attempts--
	r.Upstream = before
	a.end.State.EndTrial(a.lesson.trial)
	a.x = nil
}

// opened notes when a call that had to wait got its stream.
func (a *attempt) opened() {
	if a.x.queued && !a.x.call.Deadline.IsZero() {
		a.openedAt = time.Now()
	}
}

// tellTime tells the transport how long the call took, if it had to wait: those that wait now, where it has waited, are served as
// far as they have so much time left.
func (a *attempt) tellTime(whole bool) {
	if !a.openedAt.IsZero() {
		a.conns.Took(time.Since(a.openedAt), whole)
	}
}

var (
	_ transport.Choosy = (*exchange)(nil)
	_ transport.Client = (*exchange)(nil)
)
