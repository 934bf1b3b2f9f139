package healthcheck

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// eventually polls until the condition holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for pause := time.Millisecond; !cond(); pause = min(2*pause, 20*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
		<-time.After(pause)
	}
}

// active makes checks with a given prober.
func active(t testing.TB, a *Active, p Prober) *Active {
	t.Helper()
	if err := a.setDefaults(); err != nil {
		t.Fatal(err)
	}
	if m, ok := p.(caddy.Provisioner); ok {
		if err := m.Provision(caddy.Context{}); err != nil {
			t.Fatal(err)
		}
	}
	a.prober = p
	a.Start(func(*upstream.Endpoint) transport.Config { return transport.Config{Logger: zap.NewNop()} }, zap.NewNop())
	return a
}

// attended is an endpoint whose connections a State shows.
type attended struct {
	*transport.Endpoint
	State *upstream.State
}

// endpoint makes an endpoint with connections of its own.
func endpoint(t testing.TB, addr string) (*upstream.Endpoint, attended) {
	t.Helper()
	addrs, _, err := upstream.Parse(addr)
	if err != nil {
		t.Fatal(err)
	}
	end := transport.NewEndpoint(addrs[0], transport.Config{})
	state := new(upstream.State)
	detach := end.Attach(state)
	t.Cleanup(func() {
		_ = end.Destruct()
		detach()
	})
	return &upstream.Endpoint{Network: addrs[0].Network, Address: addrs[0].Dial, State: state}, attended{end, state}
}

// attend checks an endpoint until the end of the test.
func attend(t testing.TB, a *Active, addr string) attended {
	t.Helper()
	info, end := endpoint(t, addr)
	t.Cleanup(a.Attend(info, end.Endpoint))
	return end
}

// script is a prober that says what it is told to.
type script struct {
	mu      sync.Mutex
	verdict Verdict
	times   []time.Time
	hang    bool
}

func (s *script) say(a Answer, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.verdict = Verdict{a, text}
}

func (s *script) asked() []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]time.Time(nil), s.times...)
}

func (s *script) Probe(ctx context.Context, _ *Target) Verdict {
	s.mu.Lock()
	v, hang := s.verdict, s.hang
	s.times = append(s.times, time.Now())
	s.mu.Unlock()
	if hang {
		<-ctx.Done()
		return Verdict{NoAnswer, "no answer"}
	}
	return v
}
