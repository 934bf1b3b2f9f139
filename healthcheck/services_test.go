package healthcheck

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// services is a prober of services by script.
type services struct {
	named  []string
	perRPC bool

	mu     sync.Mutex
	of     map[string]Answer // others are unknown
	counts map[string]int    // how often it was asked about each
}

func newServices(of map[string]Answer) *services {
	return &services{of: of, counts: make(map[string]int)}
}

func (p *services) AskAbout() ([]string, bool) { return p.named, p.perRPC }

func (p *services) Probe(_ context.Context, t *Target) Verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts[t.Service]++
	a, ok := p.of[t.Service]
	if !ok {
		a = NoSuchService
	}
	return Verdict{a, "because"}
}

func (p *services) asked(service string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counts[service]
}

// Each of several checks of an endpoint sees the calls that came since it asked.
func TestNoTrafficOfSeveral(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newServices(map[string]Answer{"pkg.A": Serving, "pkg.B": Serving})
		p.named = []string{"pkg.A", "pkg.B"}
		info, end := endpoint(t, "127.0.0.1:1")
		defer active(t, steady(&Active{Interval: 10 * testSecond, NoTrafficInterval: 600 * testSecond}), p).Attend(info, end)()
		for range 3600 {
			end.State.Begin()
			end.State.End()
			after(time.Second)
		}
		busyA, busyB := p.asked("pkg.A"), p.asked("pkg.B")
		if busyA < 350 || busyB < 350 {
			t.Errorf("with a call a second, every 10 s, asked %d and %d times in an hour", busyA, busyB)
		}
		after(time.Hour)
		if a, b := p.asked("pkg.A")-busyA, p.asked("pkg.B")-busyB; a > 8 || b > 8 {
			t.Errorf("without calls, every 600 s, asked %d and %d times in an hour", a, b)
		}
	})
}
