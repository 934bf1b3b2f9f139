package proxy

import (
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// plain is a world of peers in a policy's order, whose flights are simple.
func plain(peers ...simPeer) simConfig {
	return simConfig{ordered: true, peers: peers, transport: transport.Config{PingInterval: -1, IdleTimeout: -1}}
}

// unary begins a small call.
func (w *simWorld) unary() *simFlight {
	f := w.start(20, 65535, 0, sentAtOnce, -1)
	w.settle()
	return f
}

// only is the one stream that is open.
func (w *simWorld) only() *simStream {
	w.t.Helper()
	if s := w.streams(); len(s) == 1 {
		return s[0]
	}
	w.t.Fatalf("%d streams are open, want one", len(w.streams()))
	return nil
}

// A call is what its upstream makes of it.
func TestUnary(t *testing.T) {
	simulate(t, plain(simPeer{most: 100}), func(w *simWorld) {
		f := w.unary()
		f.push(20, true)
		w.settle()
		w.only().complete()
		w.settle()
		if r := &f.Call.Result; !f.done() || r.Code != 0 || r.Attempts != 1 || r.SentBytes != 20 || r.ReceivedBytes != int64(len(f.got)) {
			w.t.Errorf("done %t, result %+v", f.done(), r)
		}
	})
}

// News that were under way while a flight has begun to wait anew must not have it wait twice.
func TestStaleNews(t *testing.T) {
	simulate(t, plain(simPeer{most: 0}, simPeer{most: 0}), func(w *simWorld) {
		f := w.unary()
		if !f.choice.waiting {
			w.t.Fatal("the flight does not wait")
		}
		w.stale(f)
		w.settle()
	})
}

// panicky panics where it is told to.
type panicky struct{ observer, rules bool }

// Over implements Observer.
func (p panicky) Over(*call.Call) {
	if p.observer {
		panic("observer")
	}
}

// Request implements Rules.
func (p panicky) Request(_ *call.Call, fields []h2.Field, authority string) ([]h2.Field, string) {
	if p.rules {
		panic("rules")
	}
	return fields, authority
}

// Response implements Rules.
func (p panicky) Response(_ *call.Call, fields []h2.Field) []h2.Field { return fields }

// Whoever panics ends the call, and no more than that: everybody else is told of its end.
func TestPanics(t *testing.T) {
	for _, p := range []panicky{{observer: true}, {rules: true}, {observer: true, rules: true}} {
		sc := plain(simPeer{most: 100})
		sc.cfg.Rules = p
		sc.cfg.Observers = []Observer{p}
		simulate(t, sc, func(w *simWorld) {
			w.panics = true
			f := w.unary()
			if !p.rules {
				w.only().trailersOnly("0")
			}
			w.settle()
			if !f.done() {
				w.t.Errorf("%+v: the client's side is not told of the end", p)
			}
		})
	}
}

// A flight that is parked when the list changes counts what it has tried by the new list: it does not pass over who has come.
func TestTriedInAnotherView(t *testing.T) {
	simulate(t, plain(simPeer{most: 100}, simPeer{mode: hangs}, simPeer{mode: hangs}), func(w *simWorld) {
		w.listed[0] = false
		w.list()
		time.Sleep(time.Second)
		w.unary()
		time.Sleep(time.Second) // it has seen both, and waits for the first
		w.settle()
		w.listed[0] = true
		w.list()
		time.Sleep(5 * time.Second)
		w.settle()
		if s := w.only(); s.c.p != w.peers[0] {
			w.t.Errorf("the call went to %s", s)
		}
	})
}

// Of two attempts health hears how both have gone, whichever the call ends with, and whatever it ends by.
func TestBothAreObserved(t *testing.T) {
	for name, end := range map[string]func(*simFlight, []*simStream){
		"first":  func(_ *simFlight, s []*simStream) { s[0].complete() },
		"second": func(_ *simFlight, s []*simStream) { s[1].complete() },
		"client": func(f *simFlight, _ []*simStream) { f.Abandon(ClientGone(), nil) },
	} {
		simulate(t, plain(simPeer{most: 100}, simPeer{most: 100}), func(w *simWorld) {
			f := w.unary()
			w.hedge(f)
			w.settle()
			f.push(20, true)
			end(f, w.streams())
			w.settle()
			if n := w.observed.Load(); !f.done() || n != 2 {
				w.t.Errorf("%s: done %t, observed %d", name, f.done(), n)
			}
		})
	}
}

// Of two attempts that have been sent equally much one is given up when the request becomes too large to be kept.
func TestTwoEquallyFar(t *testing.T) {
	simulate(t, plain(simPeer{most: 100, win: 100}, simPeer{most: 100, win: 100}), func(w *simWorld) {
		f := w.start(200<<10, 1<<20, 0, sentAtOnce, -1)
		w.settle()
		f.push(1000, false)
		w.settle()
		w.hedge(f)
		w.settle()
		if n := len(w.streams()); n != 2 {
			w.t.Fatalf("%d streams, want 2", n)
		}
		f.push(100<<10, false)
		w.settle()
		if n := len(w.streams()); n != 1 {
			w.t.Fatalf("%d streams, want 1", n)
		}
		w.only().grant(1 << 19)
		w.settle()
	})
}

// The second attempt is parked when the first fails: the call is what the second one comes to, and where that comes to nothing the call
// is not sent once more, since the first may have been processed.
func TestFirstFailsSecondParked(t *testing.T) {
	for _, code := range []h2.ErrCode{h2.InternalError, h2.RefusedStream} {
		simulate(t, plain(simPeer{most: 100}, simPeer{mode: hangs}, simPeer{most: 100}), func(w *simWorld) {
			f := w.unary()
			w.hedge(f)
			w.settle()
			w.only().rst(code)
			w.settle()
			time.Sleep(10 * time.Second)
			w.settle()
			if again := len(w.streams()) > 0; again != (code == h2.RefusedStream) || again == f.done() {
				w.t.Errorf("%s: sent again: %t, done: %t", code, again, f.done())
			}
		})
	}
}

// An answer that is not gRPC and has no end is waited for a moment only, whichever attempt has it.
func TestForeignOfSecond(t *testing.T) {
	simulate(t, plain(simPeer{most: 100}, simPeer{most: 100}), func(w *simWorld) {
		f := w.unary()
		w.hedge(f)
		w.settle()
		for _, s := range w.streams() {
			if s.c.p == w.peers[1] {
				s.respondForeign("503", false)
			}
		}
		time.Sleep(2 * time.Second)
		w.settle()
		if !f.done() {
			w.t.Error("the answer is waited for")
		}
	})
}

// A call is tried once where nothing else is configured, even if no time has passed.
func TestNoTimePasses(t *testing.T) {
	simulate(t, plain(simPeer{mode: refuses}), func(w *simWorld) {
		if f := w.unary(); !f.done() {
			w.t.Error("the call goes on")
		}
	})
}

// Work is what has gone to an endpoint and come from it, as it does. A message that is sent once more counts once.
func TestWork(t *testing.T) {
	count := func(p []byte) uint64 {
		var f grpcwire.Framing
		f.Add(p)
		return uint64(f.Messages())
	}
	check := func(w *simWorld, when string, peer int, messages uint64, bytes int) {
		w.t.Helper()
		w.settle()
		work := w.cluster.View().Endpoints[peer].State.Work()
		if m, b := work.Messages(), work.Bytes(); m != messages || b != uint64(bytes) {
			w.t.Errorf("%s: endpoint %d has done %d messages, %d bytes; want %d and %d", when, peer, m, b, messages, bytes)
		}
	}
	const size, answer = 5000, 3000
	simulate(t, plain(simPeer{most: 100, win: 1000}, simPeer{most: 100}), func(w *simWorld) {
		f := w.start(size, 65535, 0, sentAtOnce, -1)
		f.push(size, true)
		check(w, "a closed window", 0, count(f.request[:1000]), 1000)
		s := w.only()
		s.grant(size)
		check(w, "an open window", 0, count(f.request), len(f.request))
		s.rst(h2.RefusedStream)
		check(w, "sent again", 0, count(f.request), len(f.request))
		check(w, "sent again", 1, 0, len(f.request))
		s = w.only()
		s.respond(answer)
		s.send(answer / 2)
		check(w, "half of an answer", 1, count(s.answer[:answer/2]), len(f.request)+answer/2)
		s.send(answer)
		check(w, "an answer", 1, count(s.answer), len(f.request)+len(s.answer))
	})
	simulate(t, plain(simPeer{most: 100}), func(w *simWorld) {
		f := w.start(size, 65535, 0, sentAtOnce, -1)
		f.push(size, true)
		w.settle()
		s := w.only()
		s.respondForeign("503", false)
		s.send(100)
		check(w, "not gRPC", 0, count(f.request), len(f.request))
	})
}

// An answer that its upstream breaks off where a message has ended is no less the client's: a client that reads slowly gets what has
// come, and then the status.
func TestBrokenOffBehindASlowClient(t *testing.T) {
	for name, breakOff := range map[string]func(s *simStream){
		"reset": func(s *simStream) { s.rst(h2.InternalError) },
		"lost":  func(s *simStream) { s.c.close() },
	} {
		t.Run(name, func(t *testing.T) {
			simulate(t, plain(simPeer{most: 100}), func(w *simWorld) {
				f := w.start(20, 65535, 0, sentAtOnce, 0)
				f.push(20, true)
				w.settle()
				s := w.only()
				s.respond(3000)
				s.send(len(s.answer))
				w.settle()
				breakOff(s)
				time.Sleep(time.Minute)
				w.settle()
				if f.done() {
					w.t.Fatalf("over, though the client has got %d of %d bytes", len(f.got), len(s.answer))
				}
				f.allow(len(s.answer))
				w.settle()
				status, _ := field(f.trailers, "grpc-status")
				if !f.done() || f.resets > 0 || len(f.got) != len(s.answer) || status == "" || status == "0" {
					w.t.Errorf("done %t, %d resets, %d of %d bytes, grpc-status %q", f.done(), f.resets, len(f.got), len(s.answer), status)
				}
				if r := &f.Call.Result; r.EndedBy == call.EndedByClient || r.Reason == "" {
					w.t.Errorf("result %+v", r)
				}
			})
		})
	}
}

// The line in which the second attempt is parked may tell of the deadline first.
func TestDeadlineOfTwo(t *testing.T) {
	simulate(t, plain(simPeer{most: 100}, simPeer{mode: hangs}), func(w *simWorld) {
		f := w.start(20, 65535, 200*time.Millisecond, sentAtOnce, -1)
		w.settle()
		w.hedge(f)
		w.settle()
		f.timer.t.Reset(time.Hour) // it is late
		time.Sleep(time.Second)
		w.settle()
		if n := w.observed.Load(); !f.done() || n != 2 {
			w.t.Errorf("done %t, observed %d", f.done(), n)
		}
	})
}

// The pools get no memory that is somebody else's: an event without bytes has come with the memory of who told of it.
func TestKeptEvents(t *testing.T) {
	read := make([]byte, 64<<10) // a connection's
	for _, p := range [][]byte{nil, read[:0], read[:1]} {
		e := event{data: p, fields: []h2.Field{{Name: "a"}}}
		e.keep()
		if len(e.data) != len(p) || cap(e.data) > 0 && &e.data[:1][0] == &read[0] {
			t.Errorf("the event of %d bytes keeps %d, of its maker's memory", len(p), len(e.data))
		}
		PutBuffer(e.data)
	}
}

// whileBusy has something happen while the flight is kept in a call of its client's side, so that events queue up.
func (f *simFlight) whileBusy(do func()) {
	f.w.during = true
	f.during.Store(&do)
	f.push(1, false) // is sent on, and the client given credit
}

// A parked attempt may be given up when it is about to be told of its stream: that is taken back, and the client's side is told of the
// end when nothing can come any more.
func TestGivenUpWhenGranted(t *testing.T) {
	simulate(t, plain(simPeer{most: 100}, simPeer{most: 100, mode: silent}), func(w *simWorld) {
		f := w.unary()
		w.hedge(f)
		w.settle()
		f.whileBusy(func() {
			f.Cut(Fail(14, ReasonReload, "cut"))
			w.peers[1].all()[0].speak()
		})
		w.settle()
		if n := len(w.streams()); !f.done() || n != 0 {
			w.t.Errorf("done %t, %d streams", f.done(), n)
		}
	})
}

// What comes of an attempt that was given up meanwhile is dropped, and given back.
func TestEventsOfTheOther(t *testing.T) {
	simulate(t, plain(simPeer{most: 100}, simPeer{most: 100}), func(w *simWorld) {
		f := w.unary()
		w.hedge(f)
		w.settle()
		s := w.streams()
		f.whileBusy(func() {
			for i := range s {
				s[i].respond(1000)
				s[i].send(1000)
				time.Sleep(time.Nanosecond) // its events come first
			}
		})
		w.settle()
		from, _ := field(f.head, "x-stream")
		if n := len(w.streams()); n != 1 || from != s[0].String() || len(f.got) != len(s[0].answer) {
			w.t.Errorf("%d streams, the head is of %q, with %d bytes", n, from, len(f.got))
		}
	})
}

// What comes after the end is given back too.
func TestEventsAfterTheEnd(t *testing.T) {
	simulate(t, plain(simPeer{most: 100}), func(w *simWorld) {
		f := w.unary()
		s := w.only()
		s.respond(10000)
		w.settle()
		f.whileBusy(func() {
			f.Abandon(ClientGone(), nil)
			s.send(10000)
		})
		w.settle()
		if !f.done() || len(f.got) != 0 {
			w.t.Errorf("done %t, %d bytes", f.done(), len(f.got))
		}
	})
}
