package healthcheck

import (
	"context"
	"reflect"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// services is a prober of services by script.
type services struct {
	named []string

	mu     sync.Mutex
	of     map[string]Answer
	counts map[string]int // how often it was asked about each
}

func newServices(of map[string]Answer) *services {
	p := &services{of: of, counts: make(map[string]int)}
	for name := range of {
		if name != "" {
			p.named = append(p.named, name)
		}
	}
	return p
}

func (p *services) AskAbout() []string { return p.named }

func (p *services) Probe(_ context.Context, t *Target) Verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts[t.Service]++
	return Verdict{p.of[t.Service], "because"}
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
		p := newServices(map[string]Answer{"": Serving, "pkg.A": Serving, "pkg.B": Serving})
		info, end := endpoint(t, "127.0.0.1:1")
		defer active(t, steady(&Active{Interval: 10 * testSecond, NoTrafficInterval: 600 * testSecond}), p).Attend(info, end.Endpoint)()
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

// In a reload the new configuration's checks begin before the old one's end. What is known of services stays known.
func TestServicesReload(t *testing.T) {
	for _, interval := range []caddy.Duration{10 * testSecond, 5 * testSecond} {
		t.Run(time.Duration(interval).String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newServices(map[string]Answer{"": Serving, "pkg.A": NotServing, "pkg.B": Serving})
				info, end := endpoint(t, "127.0.0.1:1")
				s := end.State
				stop := active(t, steady(&Active{Interval: 10 * testSecond}), p).Attend(info, end.Endpoint)
				if s.Usable() {
					t.Error("usable before the first answers")
				}
				after(time.Second)
				again := active(t, steady(&Active{Interval: interval}), p).Attend(info, end.Endpoint)
				is := func(when string, a bool) {
					t.Helper()
					if s.UsableFor("pkg.A") != a || !s.UsableFor("pkg.B") || !s.UsableFor("pkg.Other") {
						t.Errorf("%s: usable for pkg.A %v, pkg.B %v, another %v", when, s.UsableFor("pkg.A"), s.UsableFor("pkg.B"), s.UsableFor("pkg.Other"))
					}
				}
				is("while there are two configurations", false)
				stop()
				is("when the old configuration has gone", false)
				after(time.Minute)
				is("a minute later", false)
				p.say("pkg.A", Serving)
				after(10 * time.Second)
				is("when pkg.A is back", true)
				p.say("pkg.A", NotServing)
				after(20 * time.Second)
				is("when pkg.A is down again", false)
				again()
				is("when nobody asks", true)
			})
		})
	}
}

// An endpoint gets calls when all checks have been answered: before that nobody knows of which services.
func TestServicesFirstAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newServices(map[string]Answer{"": Serving, "pkg.A": Undecided})
		info, end := endpoint(t, "127.0.0.1:1")
		s := end.State
		defer active(t, steady(&Active{Interval: 10 * testSecond}), p).Attend(info, end.Endpoint)()
		after(time.Minute)
		if st := s.Status(); st.Condition != upstream.ConditionConnecting {
			t.Errorf("with one answer missing: %+v", st)
		}
		p.say("pkg.A", NotServing)
		after(10 * time.Second)
		if !s.UsableFor("pkg.B") || s.UsableFor("pkg.A") {
			t.Errorf("usable for pkg.A %v, pkg.B %v", s.UsableFor("pkg.A"), s.UsableFor("pkg.B"))
		}
	})
}

// Two handlers ask at different intervals: a service is being served if both find so, until one goes.
func TestServicesTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, q := newServices(map[string]Answer{"": Serving, "pkg.A": Serving}), newServices(map[string]Answer{"": Serving, "pkg.A": NotServing})
		info, end := endpoint(t, "127.0.0.1:1")
		defer active(t, steady(&Active{Interval: 10 * testSecond}), p).Attend(info, end.Endpoint)()
		stop := active(t, steady(&Active{Interval: 20 * testSecond}), q).Attend(info, end.Endpoint)
		after(time.Minute)
		if p.asked("pkg.A") < 5 || q.asked("pkg.A") < 2 {
			t.Errorf("asked %d and %d times in a minute", p.asked("pkg.A"), q.asked("pkg.A"))
		}
		if end.State.UsableFor("pkg.A") {
			t.Error("usable for pkg.A, which one of two has found to be down")
		}
		stop()
		if !end.State.UsableFor("pkg.A") {
			t.Error("not usable for pkg.A, though who has found it to be down is gone")
		}
		n := q.asked("pkg.A")
		after(time.Minute)
		if q.asked("pkg.A") != n {
			t.Error("the handler that has gone still asks")
		}
	})
}

// That a service is not being served is logged, with the reason, and that it is again.
func TestServicesLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newServices(map[string]Answer{"": Serving, "pkg.A": Serving})
		info, end := endpoint(t, "127.0.0.1:1")
		a := active(t, steady(&Active{Interval: 10 * testSecond, Fails: 1}), p)
		core, logs := observer.New(zap.InfoLevel)
		a.logger = zap.New(core)
		defer a.Attend(info, end.Endpoint)()
		after(time.Second)
		if logs.Len() != 0 {
			t.Errorf("at first the log says %v", logs.All())
		}
		p.say("pkg.A", NotServing)
		after(time.Minute)
		p.say("pkg.A", Serving)
		after(time.Minute)
		want := []map[string]any{
			{"": "upstream does not serve a service", "upstream": "127.0.0.1:1", "service": "pkg.A", "reason": "because"},
			{"": "upstream serves a service again", "upstream": "127.0.0.1:1", "service": "pkg.A"},
		}
		var got []map[string]any
		for _, e := range logs.All() {
			line := e.ContextMap()
			line[""] = e.Message
			got = append(got, line)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("the log says %v, want %v", got, want)
		}
	})
}

// Of a configuration that has gone nothing is kept.
func TestNothingKept(t *testing.T) {
	info, end := endpoint(t, "127.0.0.1:1")
	var kept []weak.Pointer[Active]
	attend := func(interval time.Duration) (stop func()) {
		p := newServices(map[string]Answer{"": Serving, "pkg.A": Serving})
		a := active(t, &Active{Interval: caddy.Duration(interval)}, p)
		kept = append(kept, weak.Make(a))
		return a.Attend(info, end.Endpoint)
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
