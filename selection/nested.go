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

// Load loads a policy from the field of a module.
func Load(ctx caddy.Context, module any, field string) (Policy, error) {
	mod, err := ctx.LoadModule(module, field)
	if err != nil {
		return nil, err
	}
	policy, ok := mod.(Policy)
	if !ok {
		return nil, fmt.Errorf("module %T is not a selection policy", mod)
	}
	return policy, nil
}

// load loads the policy from the field of the module.
func (n *nested) load(ctx caddy.Context, module any, field string) (err error) {
	n.child, err = Load(ctx, module, field)
	return err
}

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

// KeyHash implements [Keyed].
func (n *nested) KeyHash(c *call.Call) (uint64, bool) {
	if k, ok := n.child.(Keyed); ok {
		return k.KeyHash(c)
	}
	return 0, false
}

// BindsClients implements [Binding].
func (n *nested) BindsClients() bool { return binds(n.child) }

// part is a snapshot of some of a snapshot's endpoints. All that drain are in it: they are few, and only a policy that
// binds a client to its endpoint looks at them.
func part(s *upstream.Snapshot, endpoints []upstream.Endpoint) *upstream.Snapshot {
	return &upstream.Snapshot{Generation: s.Generation, Endpoints: endpoints, Draining: s.Draining}
}

// places finds endpoints by their Index.
type places []int32

func newPlaces(endpoints []upstream.Endpoint) places {
	n := 0
	for i := range endpoints {
		n = max(n, endpoints[i].Index+1)
	}
	p := make(places, n)
	for i := range p {
		p[i] = -1
	}
	for i := range endpoints {
		p[endpoints[i].Index] = int32(i)
	}
	return p
}

// of returns the place of the endpoint.
func (p places) of(index int) (place int, ok bool) {
	if index < 0 || index >= len(p) || p[index] < 0 {
		return 0, false
	}
	return int(p[index]), true
}

// pickers are a policy's, for parts of a snapshot.
type pickers []Picker

// Interests implements [Interested].
func (p pickers) Interests(f func(Pick)) {
	for _, q := range p {
		Interests(q, f)
	}
}
