package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/caddyevents/eventsconfig"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
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

// TestDrainedEvent: whoever takes an upstream off a list is told when its last call has ended.
func TestDrainedEvent(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 2)
	file := filepath.Join(t.TempDir(), "upstreams.json")
	list := func(backends ...*backendtest.Backend) {
		t.Helper()
		addresses := make([]string, 0, len(backends))
		for _, b := range backends {
			addresses = append(addresses, `{"address":"`+b.Addr()+`"}`)
		}
		if err := os.WriteFile(file+".new", []byte("["+strings.Join(addresses, ",")+"]"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	list(backends...)
	seen.mu.Lock()
	seen.events = nil
	seen.mu.Unlock()
	p := proxytest.Start(t, proxytest.Options{
		Global: "events {\n\ton drained eyewitness\n}",
		Site:   "grpc_proxy {\n\tdynamic file " + file + "\n\tlb_policy round_robin\n}",
	})
	events := func() []string {
		seen.mu.Lock()
		defer seen.mu.Unlock()
		return slices.Clone(seen.events)
	}
	c := client(t, p.H2C)
	spread(t, c, 2, 1, backends...)
	var streams []testgrpc.TestService_FullDuplexCallClient
	for range 2 { // one on each
		s, err := c.FullDuplexCall(within(t, timeout))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&testgrpc.StreamingOutputCallRequest{ResponseParameters: []*testgrpc.ResponseParameters{{Size: 1}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
	}
	list(backends[0])
	eventually(t, "the new list is in force", func() bool { return spread(t, c, 10, 1, backends...)[1] == 0 })
	if got := events(); len(got) > 0 {
		t.Fatalf("told %q while a call is on the upstream", got)
	}
	for _, s := range streams {
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	eventually(t, "it is drained", func() bool { return len(events()) > 0 })
	want := []string{"drained " + backends[1].Addr() + ": draining after healthy"}
	if got := events(); !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}
