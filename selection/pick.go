package selection

import (
	"sync"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
)

// Pick is an endpoint that a Picker has chosen, and all that is needed to tell whoever wants to know how the attempt went.
type Pick struct {
	// Index is the endpoint's in the whole snapshot (see [upstream.Endpoint]). It is the same in every part of the snapshot.
	Index int
	// Audience is who is told of the attempt. Nil: nobody.
	Audience *Audience
	// Token is the Learner's own: it finds by it what it knows of the endpoint, say. It belongs to the picker that has chosen the
	// endpoint; policies around that one leave it as it is, and know the pick by its Index.
	Token uint64
	// AnyWillDo: the picker does not mind which endpoint of this priority gets the call, as long as the load is spread: it hashes no
	// key, binds no client, and prefers none by its place in the list or elsewhere. The call may then go to an endpoint that is
	// connected already, which it is picked again for, instead of waiting for this one's connection.
	AnyWillDo bool
}

// Needs is what the audience wants to be told.
func (p Pick) Needs() Needs {
	if p.Audience == nil {
		return Needs{}
	}
	return p.Audience.Needs
}

// Responded tells the audience how long the endpoint took to answer, if it wants to know. See [Learner].
func (p Pick) Responded(latency time.Duration) { p.Audience.responded(p, latency) }

// Done tells the audience how the attempt went, if it wants to know. See [Learner].
func (p Pick) Done(a *call.Attempt) { p.Audience.done(p, a) }

// Annotate lets the audience add fields to the answer. See [Annotator].
func (p Pick) Annotate(c *call.Call, add func(name, value string)) { p.Audience.annotate(c, p, add) }

// Audience is who is told of the attempts that a picker causes, and may add to their answers. Build makes it, one for all picks
// of a picker as a rule, so that a pick costs nothing more. It must not be changed later, nor copied.
type Audience struct {
	// Learner is told what Needs says. Nil: nobody is told.
	Learner Learner
	// Needs says what is to be found out about the attempts, so that no call pays for more.
	Needs Needs
	// Annotator adds fields to the answers. Nil: none are added.
	Annotator Annotator

	joint sync.Map // of *Audience, by the one that this one was joined with
}

// Needs says what is to be found out about attempts.
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

// And returns the audience of both, each of which is told what it needs, b first. Both may be nil. A policy that wants to hear of
// what the policies within it have picked returns their picks with its own audience joined to theirs:
//
//	pick, ok := p.child.Pick(in)
//	pick.Audience = p.audience.And(pick.Audience)
//
// What was joined once is kept in a, so that picks do not allocate: a should belong to one picker and go with it.
func (a *Audience) And(b *Audience) *Audience {
	switch {
	case b == nil:
		return a
	case a == nil:
		return b
	}
	both, ok := a.joint.Load(b)
	if !ok {
		both, _ = a.joint.LoadOrStore(b, join(b, a))
	}
	return both.(*Audience)
}

func join(first, second *Audience) *Audience {
	both := &Audience{Needs: first.Needs.Or(second.Needs)}
	p := &pair{first, second}
	if first.Learner != nil || second.Learner != nil {
		both.Learner = p
	}
	if first.Annotator != nil || second.Annotator != nil {
		both.Annotator = p
	}
	return both
}

// pair is two that are told one after the other.
type pair struct{ first, second *Audience }

// Responded implements [Learner].
func (p *pair) Responded(pick Pick, latency time.Duration) {
	p.first.responded(pick, latency)
	p.second.responded(pick, latency)
}

// Done implements [Learner].
func (p *pair) Done(pick Pick, a *call.Attempt) {
	p.first.done(pick, a)
	p.second.done(pick, a)
}

// Annotate implements [Annotator].
func (p *pair) Annotate(c *call.Call, pick Pick, add func(name, value string)) {
	p.first.annotate(c, pick, add)
	p.second.annotate(c, pick, add)
}

func (a *Audience) responded(p Pick, latency time.Duration) {
	if a != nil && a.Needs.FirstMessage && a.Learner != nil {
		a.Learner.Responded(p, latency)
	}
}

func (a *Audience) done(p Pick, at *call.Attempt) {
	if a != nil && a.Needs.Attempts && a.Learner != nil {
		a.Learner.Done(p, at)
	}
}

func (a *Audience) annotate(c *call.Call, p Pick, add func(name, value string)) {
	if a != nil && a.Annotator != nil {
		a.Annotator.Annotate(c, p, add)
	}
}

// Interests calls f with the interests of a picker, if it is [Interested]. A policy around several pickers passes theirs on with it.
func Interests(p Picker, f func(Pick)) {
	if i, ok := p.(Interested); ok {
		i.Interests(f)
	}
}

// InterestIn returns a pick of the endpoint that nobody has picked: its audience is who is interested all the same.
func InterestIn(p Picker, index int) Pick {
	pick := Pick{Index: index}
	Interests(p, func(q Pick) { pick.adopt(q) })
	return pick
}

// adopt takes over who is interested in the endpoint. Of several it is the first: policies keep what they learn in the endpoint's
// State, where all their pickers find it.
func (p *Pick) adopt(q Pick) {
	if q.Index == p.Index && p.Audience == nil {
		p.Audience, p.Token = q.Audience, q.Token
	}
}

// interests are those of a picker, by index.
type interests []Pick

func interestsOf(p Picker) interests {
	var all interests
	Interests(p, func(q Pick) {
		for len(all) <= q.Index {
			all = append(all, Pick{Index: len(all)})
		}
		all[q.Index].adopt(q)
	})
	return all
}

// in returns a pick of the endpoint for those who are interested.
func (all interests) in(index int) Pick {
	if index < len(all) {
		return all[index]
	}
	return Pick{Index: index}
}

var (
	_ Learner   = (*pair)(nil)
	_ Annotator = (*pair)(nil)
)
