package selection

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// nested is a policy that another one chooses endpoints with; that one embeds it and so passes on what it can do.
type nested struct{ child Policy }

// orLeastRequest is the policy that is configured, or the one that the handler has by default too.
func orLeastRequest(raw json.RawMessage) json.RawMessage {
	if raw == nil {
		raw = json.RawMessage(`{"policy":"least_request"}`)
	}
	return raw
}

// load loads the policy from the field of the module.
func (n *nested) load(ctx caddy.Context, module any, field string) error {
	mod, err := ctx.LoadModule(module, field)
	if err != nil {
		return err
	}
	policy, ok := mod.(Policy)
	if !ok {
		return fmt.Errorf("module %T is not a selection policy", mod)
	}
	n.child = policy
	return nil
}

// inner is the policy, nil if there is none.
func (n *nested) inner() Policy { return n.child }

// WatchesHealth implements [HealthWatcher].
func (n *nested) WatchesHealth() bool {
	w, ok := n.child.(HealthWatcher)
	return ok && w.WatchesHealth()
}

// ReportInterval implements [LoadReportReceiver].
func (n *nested) ReportInterval() time.Duration {
	if r, ok := n.child.(LoadReportReceiver); ok {
		return r.ReportInterval()
	}
	return 0
}

// ReceiveLoadReport implements [LoadReportReceiver].
func (n *nested) ReceiveLoadReport(s *upstream.State, report []byte) {
	if r, ok := n.child.(LoadReportReceiver); ok {
		r.ReceiveLoadReport(s, report)
	}
}

// sources are where the policy takes its hash key from, nil if it does not hash. A policy that splits its endpoints
// decides by the same key, or one client's calls would be spread.
func (n *nested) sources() sources { return sourcesOf(n.child) }

func sourcesOf(p Policy) sources {
	if k, ok := p.(interface{ sources() sources }); ok {
		return k.sources()
	}
	return nil
}

// part is a snapshot of some of a snapshot's endpoints. All that drain are in it: they are few, and only a policy that
// binds a client to its endpoint looks at them.
func part(s *upstream.Snapshot, endpoints []upstream.Endpoint) *upstream.Snapshot {
	return &upstream.Snapshot{Generation: s.Generation, Endpoints: endpoints, Draining: s.Draining}
}

// places finds endpoints by their Index.
type places []int32

func newPlaces(lists ...[]upstream.Endpoint) places {
	n := 0
	for _, list := range lists {
		for i := range list {
			n = max(n, list[i].Index+1)
		}
	}
	p := make(places, n)
	for i := range p {
		p[i] = -1
	}
	place := int32(0)
	for _, list := range lists {
		for i := range list {
			p[list[i].Index] = place
			place++
		}
	}
	return p
}

// of returns the place of the endpoint in the lists, one after the other.
func (p places) of(index int) (place int, ok bool) {
	if index < 0 || index >= len(p) || p[index] < 0 {
		return 0, false
	}
	return int(p[index]), true
}

// owners are a policy's pickers for parts of a snapshot, and which endpoint belongs to whom. What is to be told about an
// endpoint is told to its owner alone, even where parts overlap: policies keep what they learn in the endpoint's State,
// where all their pickers find it.
type owners struct {
	pickers []Picker
	of      []int32 // by Index, -1 for none
}

// add makes the picker the owner of those of the endpoints that have none.
func (o *owners) add(p Picker, endpoints []upstream.Endpoint) {
	n := int32(len(o.pickers))
	o.pickers = append(o.pickers, p)
	_, learns := p.(Learner)
	_, annotates := p.(Annotator)
	if !learns && !annotates {
		return // It need not be told anything.
	}
	for i := range endpoints {
		index := endpoints[i].Index
		for len(o.of) <= index {
			o.of = append(o.of, -1)
		}
		if o.of[index] < 0 {
			o.of[index] = n
		}
	}
}

func (o *owners) owner(index int) Picker {
	if index < 0 || index >= len(o.of) || o.of[index] < 0 {
		return nil
	}
	return o.pickers[o.of[index]]
}

// pass returns the picker with what the owners can do besides picking, and nothing that they cannot: no call pays for
// more.
func (o *owners) pass(p Picker) Picker {
	l, learns := o.learners()
	annotates := false
	for _, q := range o.pickers {
		_, ok := q.(Annotator)
		annotates = annotates || ok
	}
	switch {
	case learns && annotates:
		return &struct {
			Picker
			learners
			annotators
		}{p, l, annotators{o}}
	case learns:
		return &struct {
			Picker
			learners
		}{p, l}
	case annotates:
		return &struct {
			Picker
			annotators
		}{p, annotators{o}}
	}
	return p
}

func (o *owners) learners() (l learners, ok bool) {
	l.owners = o
	for _, p := range o.pickers {
		if p, is := p.(Learner); is {
			ok = true
			l.needs = l.needs.Or(p.Needs())
		}
	}
	return l, ok
}

// learners tells owners what they want to learn.
type learners struct {
	*owners
	needs Needs
}

// Needs implements [Learner].
func (l learners) Needs() Needs { return l.needs }

// Responded implements [Learner].
func (l learners) Responded(index int, latency time.Duration) {
	if p, ok := l.owner(index).(Learner); ok {
		p.Responded(index, latency)
	}
}

// Done implements [Learner].
func (l learners) Done(index int, a *call.Attempt) {
	if p, ok := l.owner(index).(Learner); ok {
		p.Done(index, a)
	}
}

// annotators lets owners annotate answers.
type annotators struct{ *owners }

// Annotate implements [Annotator].
func (a annotators) Annotate(c *call.Call, index int, add func(name, value string)) {
	if p, ok := a.owner(index).(Annotator); ok {
		p.Annotate(c, index, add)
	}
}
