package healthcheck

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
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

// total is how often it was asked about services.
func (p *services) total() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for name, k := range p.counts {
		if name != "" {
			n += k
		}
	}
	return n
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
				if is, asked := s.Service("pkg.B"); !asked || !is.Usable || is.Known != upstream.Has {
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

// attacked attends an endpoint with two services, one of which is not serving, on which clients make up others.
func attacked(t *testing.T) (p *services, s *upstream.State, stop func()) {
	p = newServices(map[string]Answer{"": Serving, "pkg.A": NotServing, "pkg.B": Serving})
	p.perRPC = true
	info, end := endpoint(t, "127.0.0.1:1")
	stop = active(t, steady(&Active{Interval: 10 * testSecond}), p).Attend(info, end)
	after(time.Second)
	return p, end.State, stop
}

// most is how many services an endpoint is ever asked about, the server as a whole included.
var most = room[proven] + room[named] + trials + room[wanted] + 1

// Services that clients make up take no room for good, and are forgotten when nobody names them any more.
func TestMadeUpServices(t *testing.T) {
	for who, name := range map[string]func(*upstream.State, string){
		"calls":     func(s *upstream.State, service string) { s.UsableFor(service) },
		"questions": func(s *upstream.State, service string) { s.Service(service) },
	} {
		t.Run(who, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, s, stop := attacked(t)
				for i := range 1000 {
					name(s, fmt.Sprint("made.Up", i))
					if n := len(s.Services()); n > most {
						t.Fatalf("%d services are asked about", n)
					}
				}
				after(time.Minute)
				s.UsableFor("pkg.A")
				after(time.Second)
				if s.UsableFor("pkg.A") {
					t.Error("usable for pkg.A, which is not serving")
				}
				after(forgetAfter + inUse)
				if n := len(s.Services()); n != 2 {
					t.Errorf("%d services are asked about, want the server as a whole and pkg.A", n)
				}
				asked, ofA := p.total(), p.asked("pkg.A")
				after(time.Hour)
				if n := p.total() - asked; n != p.asked("pkg.A")-ofA || n < 350 {
					t.Errorf("asked %d times, about pkg.A %d times", n, p.asked("pkg.A")-ofA)
				}
				stop()
			})
		})
	}
}

// While calls name other services all the time, which cost only so much, those that the endpoint has are found out about.
func TestFloodOfServices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, s, stop := attacked(t)
		defer stop()
		p.say("pkg.Later", NotServing)
		s.UsableFor("pkg.A")
		s.UsableFor("pkg.Elsewhere")
		after(time.Second)
		asked := p.total()
		found := time.Duration(0)
		const long = 10 * time.Minute
		for at := time.Duration(0); at < long; at += 10 * time.Millisecond {
			if at < time.Minute || rand.IntN(10) > 0 {
				s.UsableFor(fmt.Sprint("made.Up", at))
			} else if s.UsableFor("pkg.Later") {
				found = at
			}
			if at%(inUse/2) == 0 && (s.UsableFor("pkg.A") || s.UsableFor("pkg.Elsewhere")) {
				t.Fatalf("after %v: usable for pkg.A %v, for pkg.Elsewhere %v", at, s.UsableFor("pkg.A"), s.UsableFor("pkg.Elsewhere"))
			}
			if n := len(s.Services()); n > most {
				t.Fatalf("%d services are asked about", n)
			}
			after(10 * time.Millisecond)
		}
		t.Log("pkg.Later was known after", found)
		if found > long/2 {
			t.Errorf("nothing was known of pkg.Later for %v", found)
		}
		// In ten minutes each of those that are kept is asked about 60 times, and others once each.
		if n := p.total() - asked; n > most*60+4*600+100 {
			t.Errorf("asked %d times in %v", n, long)
		}
	})
}

// Calls that name as many made-up services as there is room for, again and again, do not keep out others that the endpoint
// has, nor do questions.
func TestServicesInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, s, stop := attacked(t)
		defer stop()
		begin := time.Now()
		for time.Since(begin) < 5*time.Minute {
			for i := range 70 {
				s.UsableFor(fmt.Sprint("made.Up", i))
				s.Service(fmt.Sprint("wanted.Only", i))
			}
			after(time.Second)
		}
		s.UsableFor("pkg.A")
		after(time.Second)
		if s.UsableFor("pkg.A") {
			t.Error("usable for pkg.A, which is not serving")
		}
		for is, _ := s.Service("pkg.B"); is.Known != upstream.Has; is, _ = s.Service("pkg.B") {
			if time.Since(begin) > 10*time.Minute {
				t.Fatal("pkg.B is not found out about")
			}
			after(time.Second)
		}
		// Those that had room first keep it, and those that are too many are not asked about all the time.
		kept := 0
		for i := range 70 {
			if !s.UsableFor(fmt.Sprint("made.Up", i)) {
				kept++
			}
		}
		passed := int(time.Since(begin) / time.Second)
		if n := p.total(); kept < room[named] || n > most*passed/10+5*passed+100 {
			t.Errorf("of 70 services %d are known not to be there; asked %d times in %d s", kept, n, passed)
		}
	})
}

// yes is a prober of a server that has whatever it is asked about.
type yes struct{}

func (yes) AskAbout() ([]string, bool)             { return nil, true }
func (yes) Probe(context.Context, *Target) Verdict { return Verdict{Answer: Serving} }

// Where a server says that it has each service, those that calls name stay.
func TestEveryService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		info, end := endpoint(t, "127.0.0.1:1")
		s := end.State
		defer active(t, steady(new(Active)), yes{}).Attend(info, end)()
		after(time.Second)
		s.UsableFor("pkg.A")
		for i := range 1000 {
			s.Service(fmt.Sprint("wanted", i))
			s.UsableFor(fmt.Sprint("called", i))
			s.UsableFor("pkg.A")
			after(time.Second)
			if n := len(s.Services()); n > most {
				t.Fatalf("%d services are asked about", n)
			}
		}
		of := maps.Clone(s.Services())
		if _, ok := of["pkg.A"]; !ok || len(of) > room[proven]+1 {
			t.Errorf("asked about %d services, pkg.A is one: %v", len(of), ok)
		}
		after(time.Hour)
		s.UsableFor("pkg.B")
		after(time.Second)
		s.UsableFor("pkg.B")
		after(time.Second)
		if _, ok := s.Services()["pkg.B"]; !ok {
			t.Error("an hour after the last call of others there is no room for pkg.B")
		}
	})
}
