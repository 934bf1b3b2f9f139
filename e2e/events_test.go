package e2e

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/caddyevents/eventsconfig"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(eyewitness)) }

// eyewitness is a handler of events that remembers them.
type eyewitness struct{}

func (*eyewitness) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.eyewitness", New: func() caddy.Module { return new(eyewitness) }}
}

func (*eyewitness) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { d.Next(); return nil }

func (*eyewitness) Handle(_ context.Context, e caddy.Event) error {
	seen.mu.Lock()
	defer seen.mu.Unlock()
	seen.events = append(seen.events, fmt.Sprintf("%s %v: %v after %v", e.Name(), e.Data["upstream"], e.Data["condition"], e.Data["before"]))
	return nil
}

var seen struct {
	mu     sync.Mutex
	events []string
}

// TestEvents: changes of health are events of Caddy's, in their order.
func TestEvents(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := start(t, 1)[0]
	seen.mu.Lock()
	seen.events = nil
	seen.mu.Unlock()
	p := proxytest.Start(t, proxytest.Options{
		Global: "events {\n\ton unhealthy eyewitness\n\ton healthy eyewitness\n\ton drained eyewitness\n}",
		Site:   "grpc_proxy " + b.Addr() + " {\n\thealth_check grpc\n}",
	})
	spread(t, client(t, p.H2C), 1, 1, b)
	state := stateOf(t, b.Addr())
	b.Health.SetServingStatus("", notServing)
	eventually(t, "it is unhealthy", func() bool { return state.Has(upstream.Unhealthy) })
	b.Health.SetServingStatus("", serving)
	eventually(t, "it is healthy", state.Usable)
	state.Drain("maintenance")
	var got []string
	eventually(t, "four events", func() bool {
		seen.mu.Lock()
		defer seen.mu.Unlock()
		got = slices.Clone(seen.events)
		return len(got) >= 4
	})
	want := []string{
		"healthy " + b.Addr() + ": healthy after connecting",
		"unhealthy " + b.Addr() + ": unhealthy after healthy",
		"healthy " + b.Addr() + ": healthy after unhealthy",
		"drained " + b.Addr() + ": draining after healthy",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
