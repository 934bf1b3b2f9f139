package proxy

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// connectGrace is how long a call waits for the connection to the endpoint of its choice before it looks for another one;
// a quarter of its remaining time, if that is less. RFC 8305 section 5 ("Connection Attempt Delay") recommends 250 ms.
const connectGrace = 250 * time.Millisecond

// choice is a flight's search for an endpoint. The flight waits in one of three ways, or in two at once: parked at an endpoint that
// is being connected to or is full (attempt.ticket), for news from the cluster (waiter), and for its timer.
type choice struct {
	view     *cluster.View
	tried    []int // endpoints that were tried
	triedBuf [4]int
	passed   []int // those that had no stream or no connection at once
	insists  bool  // all that there are were passed over: wait for one of them
	queued   bool  // has waited for a stream
	back     bool  // has gone back to one that was passed over
	// impatient: the call has waited for a connection for long enough to go elsewhere.
	impatient bool
	again     bool      // has been sent once more, perhaps to the same endpoint
	refused   bool      // by REFUSED_STREAM
	since     time.Time // when it began to look for a stream or a connection
	lastErr   *transport.Error
	last      *attempt // that the call ends with, if no other one follows
	never     *Failure // why the call must not be sent again, whatever becomes of an attempt that still runs
	before    string   // the endpoint of the attempt before the one that is parked

	changes uint64 // that had been told when the call last began to look
	waiter  cluster.Waiter
	waiting bool
	waited  bool // ever, or was tried before
	told    bool // the cluster has just found out what there is, or that there is nothing
}

// at is where an attempt's endpoint stands in the view, -1 if it is not in it any more: the view may be another one than when it was picked.
func (c *choice) at(a *attempt) int { return slices.Index(c.view.Endpoints, a.end) }

// hasTried notes that an attempt has failed.
func (c *choice) hasTried(a *attempt) {
	if i := c.at(a); i >= 0 {
		c.tried = append(c.tried, i)
	}
}

// hasPassed notes that an attempt has not found a stream or a connection at once.
func (c *choice) hasPassed(a *attempt) {
	if i := c.at(a); i >= 0 && !slices.Contains(c.passed, i) {
		c.passed = append(c.passed, i)
	}
}

// choose looks for an endpoint until the flight has a stream, waits for one, or has ended.
func (f *Flight) choose() {
	for f.phase == choosing && f.atts[0] == nil && f.look() {
	}
}

// look looks for an endpoint once. It returns true if it is worth looking again at once.
func (f *Flight) look() (again bool) {
	c, cfg := &f.choice, &f.p.cfg
	if c.never != nil {
		f.conclude(c.never)
		return false
	}
	if f.deadlinePassed() {
		f.conclude(deadlineExceeded())
		return false
	}
	c.changes = cfg.Cluster.Changes()
	f.renew()
	if c.view.Starting && f.awaitVerdict() {
		return false
	}
	pick, ok := f.pick()
	switch {
	case !ok && len(c.passed) == 0 && c.lastErr != nil && c.lastErr.Sent && !c.again:
		// gRFC A6: a call that left but was certainly not processed may be sent once more, even to the same
		// endpoint (a server that restarts gracefully, say).
		c.again = true
		c.tried = c.tried[:0]
		return true
	case cfg.Retries > 0 && f.Call.Result.Attempts > cfg.Retries:
		f.conclude(f.exhausted())
		return false
	case ok:
		return f.try(pick)
	case len(c.passed) > 0:
		c.passed, c.insists = c.passed[:0], true // none is better than those
		return true
	case f.mayCome() && f.awaitVerdict():
		return false
	}
	return f.anotherRound()
}

// renew takes over the cluster's newest view: a call that waits, or is tried again, must not know only endpoints that have
// gone meanwhile.
func (f *Flight) renew() {
	c := &f.choice
	view := f.p.cfg.Cluster.View()
	if view == c.view {
		return
	}
	old := c.view
	c.view, c.passed = view, c.passed[:0]
	kept := c.tried[:0]
	for _, i := range c.tried {
		if now := slices.Index(view.Endpoints, old.Endpoints[i]); now >= 0 {
			kept = append(kept, now)
		}
	}
	c.tried = kept
}

// pickInfo is what the picker is asked with.
func (f *Flight) pickInfo() selection.PickInfo {
	return selection.PickInfo{Call: &f.Call, Tried: f.choice.tried, Disregard: f.choice.view.Disregard()}
}

// pick asks the picker for an endpoint that can take the call now. If there is none, but some of which only all streams
// are taken, the call is to wait for one of these.
func (f *Flight) pick() (pick selection.Pick, ok bool) {
	c := &f.choice
	in := f.pickInfo()
	if len(c.passed) > 0 {
		in.Tried = slices.Concat(c.tried, c.passed)
	}
	if pick, ok = c.view.Picker.Pick(in); !ok && slices.ContainsFunc(c.view.Live(), isFull) {
		in.Disregard |= upstream.NoRoom
		if pick, ok = c.view.Picker.Pick(in); ok {
			c.insists = true
		}
	}
	if !ok || c.view.Endpoints[pick.Index].Ready() {
		return pick, ok
	}
	return f.connected(pick, in), true
}

func isFull(e cluster.Endpoint) bool { return e.State.Has(upstream.NoRoom) }

// connected has the endpoint connected to. An endpoint is usable when its SETTINGS have come, and whether they ever will is not
// known. One call waits for that, for a moment; others get an endpoint that is connected, if the policy does not mind. A call that has
// waited in vain goes back to what is connected to meanwhile, rather than wait for the next one.
func (f *Flight) connected(pick selection.Pick, in selection.PickInfo) selection.Pick {
	c := &f.choice
	in.Connected = true
	if len(c.passed) > 0 && !c.back {
		again := in
		again.Tried = c.tried
		if other, ok := c.view.Picker.Pick(again); ok && slices.Contains(c.passed, other.Index) {
			c.back = true // once: where the call has connections of its own these may not be there yet
			return other
		}
	}
	f.began() // or the dial may be over before the call waits for it
	if c.view.Endpoints[pick.Index].Connect() || !pick.AnyWillDo {
		return pick
	}
	other, ok := c.view.Picker.Pick(in)
	if live := c.view.Snapshot.Endpoints; ok && live[other.Index].Priority == live[pick.Index].Priority {
		return other
	}
	return pick
}

// began notes when the call began to look for a stream.
func (f *Flight) began() time.Time {
	if f.choice.since.IsZero() {
		f.choice.since = time.Now()
	}
	return f.choice.since
}

// try opens a stream on the endpoint, or parks the call there. It returns true if the call has to look for another one.
func (f *Flight) try(pick selection.Pick) (again bool) {
	c := &f.choice
	c.before = f.Call.Result.Upstream
	a := f.attempt(pick)
	if a == nil { // taken by another call meanwhile
		c.tried = append(c.tried, pick.Index)
		return true
	}
	f.makeHead(a)
	if why := f.tooLarge(*a.head); why != nil { // for every endpoint the same, so none is asked
		f.withdraw(a)
		f.Call.Result.Upstream = ""
		f.conclude(why)
		return false
	}
	a.conns = f.connections(a)
	a.ticket = transport.Ticket{
		Opener: a, Deadline: f.Call.Deadline, Since: c.since, Client: f.Call.ClientIP,
		Queue: c.insists || len(c.view.Live()) < 2, Early: a.conns.Conns() == 0 && f.early(),
	}
	a.waits = true // or what tells it may be faster than Open returns
	s, err := a.conns.Open(&a.ticket)
	switch {
	case s != nil:
		f.opened(a, s)
		return false
	case err != nil:
		a.waits = false
		return f.unopened(a, err)
	}
	c.since = a.ticket.Since
	f.park(a)
	return false
}

// refused handles the end of a parked attempt's wait.
func (f *Flight) refused(a *attempt, err *transport.Error) {
	if a.waits = false; !a.live {
		f.dropHead(a)
		f.granting--
		f.finished()
		return
	}
	f.unwait()
	if f.deadlinePassed() {
		f.conclude(deadlineExceeded())
		return
	}
	if f.unopened(a, err) {
		f.choose()
	}
}

// unopened handles an attempt that got no stream. It returns true if the call has to look for another endpoint.
func (f *Flight) unopened(a *attempt, err *transport.Error) (again bool) {
	c := &f.choice
	if err.Kind == transport.KindElsewhere || err.Kind == transport.KindCanceled {
		// There is no stream; or there was none any more when the call was to have it, and it was about to leave for elsewhere.
		c.hasPassed(a)
		f.withdraw(a)
		return true
	}
	f.remove(a)
	f.dropHead(a)
	f.fruitless(a, err)
	c.lastErr, c.last = err, a
	c.hasTried(a)
	f.logAttempt(err)
	return true
}

// withdraw undoes an attempt that has not found a stream at once, so that the call looks elsewhere.
func (f *Flight) withdraw(a *attempt) {
	r := &f.Call.Result
	r.Attempts--
	r.Upstream = f.choice.before
	a.end.State.EndTrial(a.trial)
	f.remove(a)
	f.dropHead(a)
}

// early tells whether there is no better endpoint than one whose SETTINGS have not come.
func (f *Flight) early() bool {
	if f.p.cfg.ClientConns && len(f.choice.view.Live()) > 1 {
		return false // which of the others has a connection for this client is not known
	}
	in := f.pickInfo()
	in.Connected = true
	in.Disregard |= upstream.NoRoom
	_, ok := f.choice.view.Picker.Pick(in)
	return !ok
}

// park has a call that waits at an endpoint look for a better one: after a while, if it waits for a connection, and when another
// one has room.
func (f *Flight) park(a *attempt) {
	c := &f.choice
	full := a.conns.Conns() > 0
	c.queued, c.impatient = c.queued || full, c.insists
	if !full && len(c.view.Live()) > 1 {
		wait := connectGrace
		if end := f.Call.Deadline; !end.IsZero() {
			wait = min(wait, time.Until(end)/4)
		}
		f.timer.look = time.Now().Add(wait)
		f.arm()
	}
	f.wait(cluster.Room)
}

// moveOn takes a parked call to another endpoint, if there is a better one. While it waits for a connection it is patient at first:
// the policy has chosen this endpoint, and others get their calls.
func (f *Flight) moveOn(a *attempt) {
	c := &f.choice
	c.changes = f.p.cfg.Cluster.Changes()
	f.renew()
	here := c.at(a)
	in := f.pickInfo()
	full := a.conns.Conns() > 0
	in.Connected = !full
	pick, ok := c.view.Picker.Pick(in)
	better := ok && pick.Index != here && (full || c.impatient)
	if here >= 0 && !better && (full || !c.impatient || c.insists) {
		f.wait(cluster.Room)
		return
	}
	if !a.conns.Leave(&a.ticket) {
		return // it is about to be told
	}
	a.waits = false
	f.unwait()
	f.withdraw(a)
	c.hasPassed(a)
	if !better || f.try(pick) {
		f.choose()
	}
}

// news looks again, since something has changed.
func (f *Flight) news() {
	c := &f.choice
	if !c.waiting {
		return
	}
	f.p.cfg.Cluster.Leave(&c.waiter) // the news may have been under way since before the call began to wait anew
	c.waiting = false
	switch a := f.atts[0]; {
	case f.phase != choosing:
	case a == nil:
		c.told = true
		f.choose()
		c.told = false
	case a.waits:
		f.moveOn(a)
	}
}

// wait has the flight told when there may be what it wishes for: by anything that has changed since it began to look.
func (f *Flight) wait(wish cluster.Wish) {
	c := &f.choice
	if c.waiting {
		f.unwait()
	}
	if c.waiter.Wake == nil {
		c.waiter.Wake = func() { f.push(&event{kind: evNews}, nil) }
	}
	c.waiter.Wish = wish
	if c.waiter.Due = f.Call.Deadline; c.waiter.Due.IsZero() {
		c.waiter.Due = f.began().Add(transport.DefaultQueueTimeout)
	}
	c.waiting, c.waited = true, true
	f.p.cfg.Cluster.Wait(&c.waiter, c.changes)
}

func (f *Flight) unwait() {
	if c := &f.choice; c.waiting {
		c.waiting = false
		f.p.cfg.Cluster.Leave(&c.waiter)
	}
	f.timer.look, f.timer.round = time.Time{}, time.Time{}
}

// awaitVerdict waits for the first list of a source, or until it is known of one of the endpoints how it is doing. It returns false
// if the call has waited for that as long as it may.
func (f *Flight) awaitVerdict() bool {
	until := f.Call.Start.Add(f.p.cfg.ConnectTimeout)
	if !time.Now().Before(until) {
		return false
	}
	f.timer.round = until
	f.arm()
	f.wait(cluster.Verdict)
	return true
}

// mayCome tells whether an endpoint may turn up that the call can use: a source has not answered yet, an endpoint has not shown yet
// how it is, or is being dialled again. All that are good apart from that they could not be connected to are asked to be dialled: the
// call has nowhere else to go.
func (f *Flight) mayCome() bool {
	v := f.choice.view
	yes := v.Pending || !f.choice.told && !f.p.cfg.Cluster.Settled()
	ignore := f.pickInfo().Disregard | upstream.Backoff | upstream.NoRoom
	for i, e := range v.Live() {
		switch s := e.State; {
		case slices.Contains(f.choice.tried, i), !s.UsableExcept(ignore | upstream.Connecting):
		case s.Has(upstream.Connecting):
			yes = true
		case s.Has(upstream.Backoff) && (v.Panic || s.Serves(f.Call.Service)):
			yes = e.For(f.Call.ClientIP).Ask() || yes
		}
	}
	return yes
}

// anotherRound has a call that has failed everywhere try again after a while, if the configuration and the deadline allow that; else
// it ends. While no endpoint can be used, it waits for one.
func (f *Flight) anotherRound() (again bool) {
	cfg, c := &f.p.cfg, &f.choice
	now := time.Now()
	next := now.Add(cfg.TryInterval)
	until := f.Call.Start.Add(cfg.TryDuration)
	if next.After(until) {
		f.conclude(f.exhausted())
		return false
	}
	c.tried, c.since = c.tried[:0], time.Time{}
	f.timer.round = next
	if !cfg.ClientConns && !slices.ContainsFunc(c.view.Live(), func(e cluster.Endpoint) bool { return e.State.Usable() }) {
		f.timer.round = until
		f.wait(cluster.Usable)
	}
	f.arm()
	return false
}

// exhausted says why no endpoint is left.
func (f *Flight) exhausted() *Failure {
	c, cfg := &f.choice, &f.p.cfg
	if c.lastErr != nil {
		why := fromTransport(c.lastErr)
		if c.lastErr.Kind == transport.KindQueueFull {
			why.Code = cfg.QueueFull
		}
		if n := f.Call.Result.Attempts; n > 1 {
			why.Message = "all " + strconv.Itoa(n) + " attempts failed; the last: " + why.Message
		}
		return why
	}
	live := c.view.Live()
	if len(live) == 0 {
		why := Fail(grpcwire.Unavailable, ReasonNoUpstream, "no upstream is known")
		if why.Err = c.view.Err; why.Err != nil && cfg.ExposeUpstream {
			why.Message += ": " + why.Err.Error() // it names names
		} else if why.Err != nil {
			why.Message += ", since they cannot be looked up"
		}
		return why
	}
	text, because := "none of the "+strconv.Itoa(len(live))+" upstreams is usable", "; one of them: "
	if len(live) == 1 {
		text, because = "the only upstream is not usable", ": "
	}
	for _, e := range live {
		if err := e.LastError(); err != nil && e.State.Has(upstream.Backoff) {
			why := fromTransport(err)
			why.Reason = ReasonNoUpstream
			why.Message = text + because + why.Message
			return why
		}
	}
	return Fail(grpcwire.Unavailable, ReasonNoUpstream, text+": "+conditions(live))
}

// conditions says how upstreams are doing that are all of no use: "2 unhealthy, 1 ejected", or "unhealthy" of a single one.
func conditions(ends []cluster.Endpoint) string {
	const busy = "not for this call (at its limit, by the health of its service, or by lb_policy)"
	order := []string{"unhealthy", "ejected", "draining", "connecting", busy}
	counts := make(map[string]int)
	for _, e := range ends {
		c := e.State.Status().Condition.String()
		if !slices.Contains(order, c) {
			c = busy
		}
		counts[c]++
	}
	var parts []string
	for _, c := range order {
		switch {
		case counts[c] > 0 && len(ends) == 1:
			return c
		case counts[c] > 0:
			parts = append(parts, strconv.Itoa(counts[c])+" "+c)
		}
	}
	return strings.Join(parts, ", ")
}

// logAttempt logs an attempt after which another endpoint is tried.
func (f *Flight) logAttempt(err *transport.Error) {
	cfg := &f.p.cfg
	if c := cfg.Logger.Check(cfg.Level, "attempt failed, trying elsewhere"); c != nil {
		c.Write(zap.String("path", f.Call.Path), zap.String("upstream", err.Endpoint), zap.Int("attempt", f.Call.Result.Attempts), zap.Error(err))
	}
}
