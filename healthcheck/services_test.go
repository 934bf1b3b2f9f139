package healthcheck

import (
	"context"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
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

func (p *services) say(service string, a Answer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.of[service] = a
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

// In a reload the new configuration's checks begin before the old one's end. Where both ask about calls' services, what is
// known of these stays known, and calls of other services are asked about as before.
func TestPerRPCReload(t *testing.T) {
	for _, interval := range []caddy.Duration{10 * testSecond, 5 * testSecond} {
		t.Run(time.Duration(interval).String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newServices(map[string]Answer{"": Serving, "pkg.A": NotServing, "pkg.B": Serving})
				p.perRPC = true
				info, end := endpoint(t, "127.0.0.1:1")
				s := end.State
				stop := active(t, steady(&Active{Interval: 10 * testSecond}), p).Attend(info, end)
				after(time.Second)
				s.UsableFor("pkg.A")
				after(time.Second)
				again := active(t, steady(&Active{Interval: interval}), p).Attend(info, end)
				if s.UsableFor("pkg.A") {
					t.Error("usable for pkg.A while there are two configurations")
				}
				stop()
				if s.UsableFor("pkg.A") {
					t.Error("usable for pkg.A when the old configuration has gone")
				}
				s.UsableFor("pkg.B")
				after(time.Minute)
				if is, asked := s.Service("pkg.B"); !asked || is != (upstream.Service{Usable: true, Known: upstream.Has}) {
					t.Errorf("pkg.B, which was named after the reload: %+v, asked %v", is, asked)
				}
				if s.UsableFor("pkg.A") {
					t.Error("usable for pkg.A a minute later")
				}
				p.say("pkg.A", Serving)
				after(10 * time.Second)
				if !s.UsableFor("pkg.A") {
					t.Error("not usable for pkg.A, which is serving")
				}
				again()
				if s.Services() != nil {
					t.Errorf("nobody asks, but this is known: %v", s.Services())
				}
			})
		})
	}
}

// Two handlers ask at different intervals: services that calls name are asked about by both, until one goes.
func TestPerRPCTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, q := newServices(map[string]Answer{"": Serving}), newServices(map[string]Answer{"": Serving, "pkg.A": NotServing})
		p.perRPC, q.perRPC = true, true
		info, end := endpoint(t, "127.0.0.1:1")
		defer active(t, steady(&Active{Interval: 10 * testSecond}), p).Attend(info, end)()
		stop := active(t, steady(&Active{Interval: 20 * testSecond}), q).Attend(info, end)
		after(time.Second)
		end.State.UsableFor("pkg.A")
		after(time.Minute)
		if p.asked("pkg.A") < 5 || q.asked("pkg.A") < 2 {
			t.Errorf("asked %d and %d times in a minute", p.asked("pkg.A"), q.asked("pkg.A"))
		}
		stop()
		n := q.asked("pkg.A")
		after(time.Minute)
		if q.asked("pkg.A") != n {
			t.Error("the handler that has gone still asks")
		}
		if end.State.UsableFor("pkg.A") {
			t.Error("usable for pkg.A, which is not known")
		}
	})
}

// Of a configuration that has gone nothing is kept.
func TestNothingKept(t *testing.T) {
	info, end := endpoint(t, "127.0.0.1:1")
	var kept []weak.Pointer[Active]
	attend := func(interval time.Duration) (stop func()) {
		p := newServices(map[string]Answer{"": Serving, "pkg.A": Serving})
		p.perRPC = true
		a := active(t, &Active{Interval: caddy.Duration(interval)}, p)
		kept = append(kept, weak.Make(a))
		stop = a.Attend(info, end)
		end.State.UsableFor("pkg.A")
		return stop
	}
	stop := attend(time.Hour)
	for i := range 5 {
		next := attend(time.Hour + time.Duration(i)*time.Second) // the first is the same again
		eventually(t, "there is an answer", end.State.Usable)
		stop()
		stop = next
	}
	attend(time.Hour + 4*time.Second)() // joins late and leaves first: a configuration that could not be loaded
	eventually(t, "all but the last are gone", func() bool {
		runtime.GC()
		for i, w := range kept {
			if (w.Value() != nil) != (i == 5) {
				return false
			}
		}
		return true
	})
	stop()
	eventually(t, "the last is gone", func() bool {
		runtime.GC()
		return kept[5].Value() == nil
	})
}
