package proxy

import (
	"encoding/hex"
	"math"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// tape is a script as bytes. After its end it says 0.
type tape struct{ rest []byte }

func (t *tape) more() bool { return len(t.rest) > 0 }

func (t *tape) n(below int) int {
	if len(t.rest) == 0 {
		return 0
	}
	b := t.rest[0]
	t.rest = t.rest[1:]
	return int(b) % below
}

func of[T any](t *tape, list ...T) T { return list[t.n(len(list))] }

// size is of a piece: often one that hits an edge.
func (t *tape) size() int {
	return of(t, 1, 4, 5, 6, 17, 100, 1000, 5000, 16<<10, 70000, t.n(256), 0)
}

// play plays a script.
func play(t *testing.T, script []byte) {
	tp := &tape{script}
	sc := simConfig{
		cfg: Config{
			StreamTimeout:     of(tp, 0, 0, 2*time.Second),
			StreamIdleTimeout: of(tp, 0, 0, time.Second),
			MaxTimeout:        of(tp, 0, 0, 0, 3*time.Second),
			TryDuration:       of(tp, 0, 0, 3*time.Second),
			TryInterval:       250 * time.Millisecond,
			Retries:           of(tp, 0, 0, 0, 1),
			CancelBudget:      of(tp, 0, 0, 1),
			CancelWindow:      time.Minute,
		},
		transport: transport.Config{
			MaxConns:     of(tp, 1, 1, 2),
			QueueSize:    of(tp, 0, 0, -1, 1),
			PingInterval: -1, IdleTimeout: -1,
		},
		ordered: tp.n(2) == 0,
	}
	for range 1 + tp.n(3) {
		sc.peers = append(sc.peers, simPeer{
			mode: of(tp, accepts, accepts, accepts, refuses, hangs, silent),
			most: of[uint32](tp, 100, 100, 1, 0, 2),
			win:  of[uint32](tp, 65535, 65535, 100, 1, 5000),
		})
	}
	simulate(t, sc, func(w *simWorld) {
		w.note("FuzzFlight: %s", hex.EncodeToString(script))
		w.hedges = tp.n(3) == 0
		w.begin(tp)
		for tp.more() && !w.failed() {
			if w.step(tp) && tp.n(4) > 0 { // else the next thing happens meanwhile
				w.settle()
			}
		}
	})
}

// maxFlights is how many flights one script has.
const maxFlights = 4

func (w *simWorld) begin(tp *tape) {
	size := of(tp, 0, 5, 20, 300, 5000, 100<<10)
	window := of(tp, 65535, 65535, 100, 1<<20)
	deadline := of(tp, 0, 0, 0, 50*time.Millisecond, 1500*time.Millisecond)
	mode := sentMode(tp.n(int(sentModes)))
	room := of(tp, -1, -1, 0, 3)
	w.note("flight %d: %d bytes, window %d, deadline %s, sent %d, room %d", len(w.flights), size, window, deadline, mode, room)
	w.start(size, window, deadline, mode, room)
	if tp.n(2) == 0 {
		w.settle()
	}
}

// step does the next thing that the script says.
func (w *simWorld) step(tp *tape) (done bool) {
	op := tp.n(70)
	flights, streams := w.all(), w.streams()
	f := flights[tp.n(len(flights))]
	var s *simStream
	if len(streams) > 0 {
		s = streams[tp.n(len(streams))]
	}
	switch {
	case op < 3 && len(flights) < maxFlights:
		w.begin(tp)
	case op < 47:
		w.move(tp, f, s, op)
	case op < 52:
		d := of(tp, time.Millisecond, 20*time.Millisecond, 100*time.Millisecond, 300*time.Millisecond, time.Second, 4*time.Second)
		w.note("%s pass", d)
		time.Sleep(d)
	case op < 55:
		if w.hedges {
			w.hedge(f)
		}
	case op < 59:
		w.change(tp)
	case op == 59:
		w.note("all flights on an endpoint are cut")
		v := w.cluster.View()
		if len(v.Endpoints) > 0 {
			w.p.EndOn(v.Endpoints[tp.n(len(v.Endpoints))].Endpoint, Fail(14, ReasonDrained, "drained"))
		}
	case op == 60 && tp.n(4) == 0:
		w.note("all flights are cut")
		w.p.EndAll(Fail(14, ReasonExit, "exit"))
	case op == 61:
		w.stale(f)
	case op == 62:
		if v := w.cluster.View(); len(v.Endpoints) > 0 {
			w.note("an endpoint hangs")
			end := w.p.NoteCalls(v.Endpoints[tp.n(len(v.Endpoints))].Endpoint)
			time.Sleep(time.Second)
			end(Fail(14, ReasonHung, "hangs"))
		}
	case op >= 64:
		// Several things happen while the flight calls its client's side.
		sub := &tape{tp.rest[:min(len(tp.rest), 16)]}
		tp.rest = tp.rest[len(sub.rest):]
		w.during = true
		do := func() {
			for sub.more() {
				w.move(sub, f, w.first(f), sub.n(47))
			}
		}
		f.during.Store(&do)
		return false
	default:
		return false
	}
	return true
}

// first is the flight's oldest stream that is open.
func (w *simWorld) first(f *simFlight) *simStream {
	for _, s := range f.all() {
		if s.open() {
			return s
		}
	}
	return nil
}

// move does something on a flight, or on a stream.
func (w *simWorld) move(tp *tape, f *simFlight, s *simStream, op int) {
	switch {
	case op < 12:
		n := tp.size()
		w.note("flight %d: pushes %d", f.id, n)
		f.push(n, false)
	case op < 16:
		w.note("flight %d: ends its request", f.id)
		if n, _ := f.whole(); n == len(f.request) || tp.n(4) == 0 {
			f.push(0, true)
		} else {
			f.push(math.MaxInt, f.allowed() >= len(f.request))
		}
	case op == 16:
		w.note("flight %d: the client resets it", f.id)
		f.act(func() { f.Abandon(ClientGone(), nil) })
	case op == 17:
		w.note("flight %d: cut", f.id)
		f.act(func() { f.Cut(Fail(14, ReasonReload, "cut")) })
	case op < 22:
		n := tp.size()
		w.note("flight %d: takes %d more", f.id, n)
		f.allow(n)
	case op < 25:
		n := tp.size()
		w.note("flight %d: sent %d", f.id, n)
		f.tellSent(n)
	case op < 47:
		if s != nil && s.acts.TryLock() {
			w.answer(tp, s, op)
			s.acts.Unlock()
		}
	}
}

// allowed is how much the client may have sent in all.
func (f *simFlight) allowed() int {
	f.cmu.Lock()
	defer f.cmu.Unlock()
	return f.window + f.consumed
}

// answer has an upstream do something on a stream.
func (w *simWorld) answer(tp *tape, s *simStream, op int) {
	s.c.mu.Lock()
	head, foreign := s.head, s.foreign
	s.c.mu.Unlock()
	switch {
	case op < 29 && !head:
		n := of(tp, 0, 5, 100, 3000, 100<<10)
		w.note("%s: head, of %d bytes", s, n)
		s.respond(n)
	case op == 29 && !head:
		w.note("%s: 103", s)
		s.headers(false, ":status", "103")
	case op < 34 && head:
		n := tp.size()
		w.note("%s: sends %d", s, n)
		s.send(n)
	case op < 37 && head && !foreign && s.cutAnswer():
		status := of(tp, "0", "0", "0", "5", "x", "")
		w.note("%s: trailers with %q", s, status)
		if status == "" {
			s.finish("x-none", "1")
		} else {
			s.finish("grpc-status", status)
		}
	case op == 37 && head && foreign:
		w.note("%s: trailers with a status", s)
		s.finish("grpc-status", of(tp, "0", "7"))
	case op == 37 && head:
		w.note("%s: trailers anywhere", s)
		s.cutAnswer()
		s.finish("grpc-status", of(tp, "13", "0"))
	case op == 38 && head:
		w.note("%s: ends without trailers", s)
		s.stop()
	case op < 40 && !head:
		w.note("%s: Trailers-Only", s)
		s.trailersOnly(of(tp, "0", "7", "y"))
	case op == 40:
		code := of(tp, h2.NoError, h2.InternalError, h2.Cancel, h2.EnhanceYourCalm)
		w.note("%s: RST_STREAM %s", s, code)
		s.rst(code)
	case op < 43 && !head:
		w.note("%s: REFUSED_STREAM", s)
		s.rst(h2.RefusedStream)
	case op == 43:
		last, code := of(tp, 0, s.id-min(s.id, 2), s.id, math.MaxInt32), of(tp, h2.NoError, h2.NoError, h2.EnhanceYourCalm)
		if head {
			last = max(last, s.id)
		}
		w.note("%s: GOAWAY %d %s", s, last, code)
		s.c.goAway(last, code)
	case op == 44:
		w.note("%s: the connection ends", s)
		s.c.close()
	case op == 45 && !head:
		status, end := of(tp, "503", "200", "404"), tp.n(2) == 0
		w.note("%s: HTTP %s, end %t", s, status, end)
		s.respondForeign(status, end)
	default:
		n := tp.size()
		w.note("%s: grants %d", s, n)
		s.grant(n)
	}
}

// change changes the upstreams.
func (w *simWorld) change(tp *tape) {
	i := tp.n(len(w.peers))
	p := w.peers[i]
	switch tp.n(4) {
	case 0:
		w.listed[i] = !w.listed[i]
		w.note("%s: listed %t", p.addr, w.listed[i])
		w.list()
		time.Sleep(200 * time.Millisecond)
	case 1:
		mode := dialMode(tp.n(int(dialModes)))
		w.note("%s: mode %d", p.addr, mode)
		p.set(mode)
	default:
		most := of[uint32](tp, 0, 1, 2, 100)
		w.note("%s: %d streams", p.addr, most)
		p.mu.Lock()
		p.most = most
		p.mu.Unlock()
		for _, c := range p.all() {
			c.allow(most)
		}
	}
}

// random is the script of a seed.
func random(seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	script := make([]byte, 20+r.IntN(150))
	for i := range script {
		script[i] = byte(r.Uint32())
	}
	return script
}

// Whatever happens in whatever order, a flight keeps what it promises to both sides, and leaves nothing behind.
func TestFlights(t *testing.T) {
	n := uint64(2000)
	if testing.Short() {
		n = 500
	}
	for seed := range n {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) { play(t, random(seed)) })
		if t.Failed() {
			return
		}
	}
}

// FuzzFlight plays scripts.
func FuzzFlight(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(random(seed))
	}
	f.Fuzz(play)
}
