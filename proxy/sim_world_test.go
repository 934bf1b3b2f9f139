package proxy

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/discovery"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// simWorld is a proxy with its clients and upstreams in one process, without a network. It runs in a bubble of synctest, so that time passes
// only when everybody waits.
type simWorld struct {
	t       testing.TB
	p       *Proxy
	cluster *cluster.Cluster
	peers   []*simPeer
	listed  []bool
	sink    discovery.Sink
	hedges  bool // flights may have two attempts at once
	panics  bool // they are what is tried
	conns   map[*h2.Conn]bool
	during  bool // things happen during calls of Downstream
	simple  bool // no flight has the chance to be sent more often than endpoints are

	observed atomic.Int64 // attempts that health was told of

	mu      sync.Mutex
	flights []*simFlight
	faults  []string
	log     []string
}

// simConfig is what a world is made of.
type simConfig struct {
	cfg       Config
	transport transport.Config
	peers     []simPeer
	ordered   bool // the first endpoint that can be used is picked, whatever it costs
}

var simWorlds atomic.Int64

// simulate runs f in a world of its own, and checks that nothing is left of it.
func simulate(t *testing.T, sc simConfig, f func(w *simWorld)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newSimWorld(t, sc)
		defer w.report()
		defer w.down()
		f(w)
		w.settle()
		w.close()
	})
}

func newSimWorld(t testing.TB, sc simConfig) *simWorld {
	w := &simWorld{t: t, conns: make(map[*h2.Conn]bool), simple: sc.cfg.TryDuration == 0}
	n := simWorlds.Add(1) // endpoints of different worlds must not meet in a pool
	for i := range sc.peers {
		p := &sc.peers[i]
		p.w, p.addr = w, fmt.Sprintf("%04d:%d", i, n)
		if p.win == 0 {
			p.win = 65535
		}
		w.peers = append(w.peers, p)
		w.listed = append(w.listed, true)
	}
	sc.transport.Dial = func(ctx context.Context, _, address string) (net.Conn, error) {
		for _, p := range w.peers {
			if p.addr == address {
				return p.dial(ctx)
			}
		}
		return nil, fmt.Errorf("no peer %s", address)
	}
	var policy selection.Policy = new(selection.LeastRequest)
	if sc.ordered {
		policy = inOrder{}
	}
	source := make(sinkSource, 1)
	c, err := cluster.New(cluster.Config{
		Sources:      []cluster.Source{{Source: source, Name: "script", Key: fmt.Sprint(n)}},
		Policy:       policy,
		Transport:    func(*upstream.Endpoint) transport.Config { return sc.transport },
		Cut:          func(e *transport.Endpoint) int { return w.p.EndOn(e, Fail(14, ReasonDrained, "drained")) },
		DrainTimeout: 5 * time.Second,
		Logger:       zap.NewNop(),
	})
	if err != nil {
		t.Fatal(err)
	}
	sc.cfg.Cluster, sc.cfg.Health = c, w
	sc.cfg.Observers = append(sc.cfg.Observers, w)
	sc.cfg.Logger = zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "m"}), zapcore.AddSync(worldLog{w}), zapcore.ErrorLevel))
	w.cluster, w.p = c, New(sc.cfg)
	c.Start()
	w.sink = <-source
	w.list()
	time.Sleep(time.Second) // for the list
	return w
}

// worldLog takes errors that are logged.
type worldLog struct{ w *simWorld }

// Write implements io.Writer.
func (l worldLog) Write(p []byte) (int, error) {
	l.w.note("log: %s", p)
	return len(p), nil
}

// sinkSource is a source that hands out its sink.
type sinkSource chan discovery.Sink

// Watch implements discovery.Source.
func (s sinkSource) Watch(ctx context.Context, sink discovery.Sink) {
	s <- sink
	<-ctx.Done()
}

// list tells the cluster which peers there are.
func (w *simWorld) list() {
	var list []upstream.Endpoint
	for i, p := range w.peers {
		if w.listed[i] {
			list = append(list, upstream.Endpoint{Network: "tcp", Address: p.addr})
		}
	}
	w.sink.Update(list)
}

// inOrder is a policy that picks the first endpoint that can be used, and has work counted.
type inOrder struct{}

// Build implements selection.Policy.
func (inOrder) Build(s *upstream.Snapshot) selection.Picker {
	return &inOrderPicker{s, selection.Audience{Needs: selection.Needs{Work: true}}}
}

type inOrderPicker struct {
	s        *upstream.Snapshot
	audience selection.Audience
}

// Pick implements selection.Picker.
func (p *inOrderPicker) Pick(in selection.PickInfo) (selection.Pick, bool) {
	for i := range p.s.Endpoints {
		s := p.s.Endpoints[i].State
		if !slices.Contains(in.Tried, i) && (!in.Connected || s.IsConnected()) && s.UsableExcept(in.Disregard) {
			return selection.Pick{Index: i, Audience: &p.audience}, true
		}
	}
	return selection.Pick{}, false
}

// Observes implements Health.
func (w *simWorld) Observes() (attempts, latency bool) { return true, true }

// Responded implements Health.
func (w *simWorld) Responded(*upstream.State, upstream.Trial) {}

// Observe implements Health.
func (w *simWorld) Observe(*upstream.State, *call.Attempt, upstream.Trial) { w.observed.Add(1) }

func (w *simWorld) flight(id int) *simFlight {
	w.mu.Lock()
	defer w.mu.Unlock()
	if id < 0 || id >= len(w.flights) {
		return nil
	}
	return w.flights[id]
}

func (w *simWorld) flightOf(c *call.Call) *simFlight {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.flights {
		if &f.Call == c {
			return f
		}
	}
	return nil
}

func (w *simWorld) all() []*simFlight {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.flights)
}

func (w *simWorld) errorf(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = append(w.faults, fmt.Sprintf(format, args...))
	w.log = append(w.log, "FAULT: "+w.faults[len(w.faults)-1])
}

func (w *simWorld) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, fmt.Sprintf(format, args...))
}

func (w *simWorld) failed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.faults) > 0
}

func (w *simWorld) report() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.faults) > 0 {
		w.t.Errorf("%s\nscript:\n%s", strings.Join(w.faults, "\n"), strings.Join(w.log, "\n"))
	}
}

// streams are those that are open.
func (w *simWorld) streams() (open []*simStream) {
	for _, p := range w.peers {
		for _, c := range p.all() {
			c.mu.Lock()
			all := slices.Clone(c.order)
			c.mu.Unlock()
			for _, s := range all {
				if s.open() {
					open = append(open, s)
				}
			}
		}
	}
	return open
}

// quiet waits until nothing moves any more.
func (w *simWorld) quiet() {
	synctest.Wait()
	for w.during && slices.ContainsFunc(w.all(), func(f *simFlight) bool { return f.busy.Load() }) {
		time.Sleep(time.Millisecond) // longer than a flight is kept in a call of Downstream
		synctest.Wait()
	}
}

// settle waits until nothing moves any more, and checks what must be true then.
func (w *simWorld) settle() {
	w.quiet()
	running, waiting, held := 0, 0, int64(0)
	active := make(map[*upstream.State]int64)
	parked := make(map[*transport.Endpoint]int)
	for _, f := range w.all() {
		w.checkFlight(f)
		f.mu.Lock()
		if f.phase != over {
			running++
		}
		if f.choice.waiting {
			waiting++
		}
		held += f.replay.held
		for _, a := range f.atts {
			if a == nil {
				continue
			}
			active[a.end.State]++
			if a.waits {
				parked[a.conns]++
			}
		}
		if f.granting != 0 {
			w.errorf("flight %d: %d attempts are about to be told of a stream, and nothing moves", f.id, f.granting)
		}
		f.mu.Unlock()
	}
	if n := w.p.Running(); n != running {
		w.errorf("%d flights are registered, %d run", n, running)
	}
	if n := inside(w.cluster, "waiting.waiters", "waiting.mu"); n != int64(waiting) {
		w.errorf("%d flights wait in the cluster, and %d know of it", n, waiting)
	}
	if n := replaysHeld.Load(); n != held {
		w.errorf("replays hold %d bytes, %d were counted", held, n)
	}
	for _, e := range w.cluster.View().Endpoints {
		if n := e.State.Active(); n != active[e.State] {
			w.errorf("%s has %d calls, %d are counted", e.Address(), active[e.State], n)
		}
		if n := inside(e.Endpoint, "waiting.v", "mu.Mutex"); int(n) != parked[e.Endpoint] {
			w.errorf("%d calls are parked at %s, %d know of it", n, e.Address(), parked[e.Endpoint])
		}
	}
}

// inside is a copy of what another package keeps to itself: the field of a pointer's struct, read with the lock held. What a call leaves
// behind shows only there.
func inside(p any, field, lock string) int64 {
	at := func(path string) reflect.Value {
		v := reflect.ValueOf(p).Elem()
		for name := range strings.SplitSeq(path, ".") {
			if v.Kind() == reflect.Pointer {
				v = v.Elem()
			}
			v = v.FieldByName(name)
		}
		return v
	}
	mu := (*sync.Mutex)(at(lock).Addr().UnsafePointer())
	mu.Lock()
	defer mu.Unlock()
	return at(field).Int()
}

// checkFlight checks a flight on which nothing moves.
func (w *simWorld) checkFlight(f *simFlight) {
	f.mu.Lock() // nobody holds it while a flight runs, but everything that belongs to run is read in its order then
	defer f.mu.Unlock()
	f.cmu.Lock()
	defer f.cmu.Unlock()
	if f.running != f.recycled {
		w.errorf("flight %d: runs (%t), recycled %t, and nothing moves", f.id, f.running, f.recycled)
	}
	for _, e := range f.events {
		if !f.recycled || !e.kind.clients() {
			w.errorf("flight %d: event %d came, recycled %t, and nobody handles it", f.id, e.kind, f.recycled)
		}
	}
	if f.busy.Load() {
		w.errorf("flight %d: a method of Downstream blocks", f.id)
	}
	if f.Call.Result.Reason == ReasonAborted && !w.panics {
		w.errorf("flight %d: panicked", f.id)
	}
	if (f.phase == over) != (f.dones == 1) || f.dones != f.overs {
		w.errorf("flight %d: phase %d with %d Done and %d Over", f.id, f.phase, f.dones, f.overs)
	}
	if f.phase != over && f.headEnd {
		w.errorf("flight %d: phase %d after the end of its answer", f.id, f.phase)
	}
	if int64(f.consumed) != f.replay.credited {
		w.errorf("flight %d: %d bytes consumed, %d credited", f.id, f.consumed, f.replay.credited)
	}
	most, lost := 0, len(f.streams) != f.Call.Result.Attempts // or was taken back before it has left
	for _, s := range f.streams {
		s.c.mu.Lock()
		most = max(most, s.got)
		lost = lost || s.c.dead || s.reset || s.over // what was sent to it may not have been read
		s.c.mu.Unlock()
	}
	if f.consumed > most && !lost {
		w.errorf("flight %d: %d bytes consumed, and the upstreams have %d", f.id, f.consumed, most)
	}
	f.checkAnswer()
	if f.phase == over {
		if f.atts[0] != nil || f.choice.waiting || f.replay.held != 0 || f.replay.buf != nil || !f.answer.rest.empty() {
			w.errorf("flight %d: is over, and holds something: %+v", f.id, f.replay)
		}
		if t := f.timer.t; t != nil && t.Stop() {
			w.errorf("flight %d: is over, and its timer is set", f.id)
		}
		return
	}
	if f.phase == choosing && f.atts[0] == nil && !f.choice.waiting && f.timer.round.IsZero() {
		w.errorf("flight %d: waits for nothing", f.id)
	}
	sent := int64(0)
	for _, a := range f.atts {
		if a == nil || a.stream == nil {
			continue
		}
		sent = max(sent, a.sent)
		w.conns[a.stream.Conn()] = true
		holds := int64(0)
		if f.phase == committed || f.phase == closing {
			holds = f.answer.unsent + int64(len(f.answer.rest.bytes()))
		}
		if held := inside(a.stream, "held", "c.mu"); held != holds && !a.stream.Closed() {
			w.errorf("flight %d: its answer's stream has %d bytes to give back, and %d are held", f.id, held, holds)
		}
	}
	if f.replay.credited < sent {
		w.errorf("flight %d: %d bytes have gone on, the client was given back %d", f.id, sent, f.replay.credited)
	}
	if n := f.answer.unsent; n != int64(f.unsent) {
		w.errorf("flight %d: %d bytes have not left, it thinks %d", f.id, f.unsent, n)
	}
}

// clients tells the events of the client's side. That looks after itself: it does not take a flight back while it has something to say.
func (k eventKind) clients() bool { return k >= evData && k <= evAbandon }

// checkAnswer checks what the client has got.
func (f *simFlight) checkAnswer() {
	if f.heads == 0 || f.headEnd && len(f.got) == 0 {
		return
	}
	from, _ := field(f.head, "x-stream")
	i := slices.IndexFunc(f.streams, func(s *simStream) bool { return s.String() == from })
	if i < 0 {
		f.w.errorf("flight %d: its head is of no stream: %v", f.id, f.head)
		return
	}
	s := f.streams[i]
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if sent := s.answer[:s.sent]; !bytes.HasPrefix(sent, f.got) {
		f.w.errorf("flight %d: the client got %d bytes that are not those of %s", f.id, len(f.got), s)
	} else if f.trailers != nil && f.resets == 0 && f.Call.Result.Source == call.SourceWire && len(f.got) != s.sent {
		f.w.errorf("flight %d: status of the upstream's after %d bytes of %d", f.id, len(f.got), s.sent)
	}
}

// checkSends checks that a flight that is over was not sent more often than it may be.
func (w *simWorld) checkSends(f *simFlight) {
	streams, processed, refused := f.all(), 0, 0
	for _, s := range streams {
		s.c.mu.Lock()
		switch {
		case !s.unprocessed:
			processed++
		case !s.c.shut:
			refused++
		}
		s.c.mu.Unlock()
	}
	if processed > 1+f.hedges {
		w.errorf("flight %d: was sent to %d upstreams that may have processed it", f.id, processed)
	}
	if refused > 2+f.hedges {
		w.errorf("flight %d: was refused %d times", f.id, refused)
	}
	if most := len(w.peers) + 1 + f.hedges; w.simple && len(streams) > most {
		w.errorf("flight %d: was sent %d times", f.id, len(streams))
	}
	if r := &f.Call.Result; w.simple && r.Attempts < len(streams) {
		w.errorf("flight %d: was sent %d times in %d attempts", f.id, len(streams), r.Attempts)
	}
}

// close brings all flights to an end, and everything down.
func (w *simWorld) close() {
	for _, f := range w.all() {
		f.during.Store(nil) // it would meet what follows
	}
	w.quiet()
	for _, p := range w.peers {
		p.mu.Lock()
		p.mode, p.most, p.win = accepts, 100, 1<<20
		p.mu.Unlock()
		for _, c := range p.all() {
			c.speak()
			c.allow(100)
		}
	}
	for i := range w.listed {
		w.listed[i] = true
	}
	w.list()
	for _, f := range w.all() {
		f.cmu.Lock()
		f.window = 1 << 20
		f.cmu.Unlock()
	}
	running := func() bool { return slices.ContainsFunc(w.all(), func(f *simFlight) bool { return !f.done() }) }
	for i := 0; i < 60 && running() && !w.failed(); i++ {
		for _, f := range w.all() {
			f.push(math.MaxInt, false)
			if n, _ := f.whole(); n == len(f.request) {
				f.push(0, true)
			}
			f.allow(-1)
			f.tellSent(math.MaxInt)
		}
		w.settle()
		for _, s := range w.streams() {
			s.grant(1 << 20)
			synctest.Wait()
			if _, ended := s.flight.whole(); !ended || !s.open() {
				continue
			}
			s.complete()
			w.settle()
		}
		if i > 3 {
			time.Sleep(time.Second)
			w.settle()
		}
	}
	for _, f := range w.all() {
		if !f.done() {
			w.errorf("flight %d: does not end (phase %d)", f.id, f.phase)
		}
	}
	w.p.EndAll(Fail(14, ReasonExit, "exit"))
	time.Sleep(time.Second)
	w.settle()
	attempts := 0
	for _, f := range w.all() {
		w.checkSends(f)
		attempts += f.Call.Result.Attempts
	}
	if n := w.observed.Load(); n != int64(attempts) && !w.failed() {
		w.errorf("%d attempts were made, %d observed", attempts, n)
	}
	for c := range w.conns {
		if n := inside(c, "held", "mu"); n != 0 {
			w.errorf("a connection has %d bytes to give back, and there are no calls", n)
		}
	}
	w.down()
	w.settle()
}

// down ends what runs, in whatever state it is.
func (w *simWorld) down() {
	w.cluster.Close()
	for _, p := range w.peers {
		p.set(refuses)
		for _, c := range p.all() {
			c.close()
		}
	}
	time.Sleep(2 * time.Minute) // whatever is still set fires
}

// complete answers a stream to the end.
func (s *simStream) complete() {
	s.c.mu.Lock()
	head, foreign, left := s.head, s.foreign, len(s.answer)-s.sent
	s.c.mu.Unlock()
	switch {
	case foreign:
		s.stop()
		return
	case !head:
		s.respond(100)
		left = 100
	}
	s.send(left)
	s.c.mu.Lock()
	whole := s.sent == len(s.answer)
	s.c.mu.Unlock()
	if whole {
		s.finish("grpc-status", "0")
	}
}

// stale brings a flight news that were under way when it began to wait anew.
func (w *simWorld) stale(f *simFlight) {
	w.quiet()
	f.mu.Lock()
	waiting, wake := f.choice.waiting, f.choice.waiter.Wake
	f.mu.Unlock()
	if waiting {
		w.note("flight %d: stale news", f.id)
		wake()
	}
}

// hedge begins a second attempt of a flight. It stands in for what will do that one day, and must be all that is needed.
func (w *simWorld) hedge(f *simFlight) {
	w.quiet()
	f.mu.Lock()
	if f.phase == over {
		f.mu.Unlock()
		return
	}
	f.running = true
	f.mu.Unlock()
	if a := f.atts[0]; f.phase == sending && a != nil && f.atts[1] == nil && f.replay.keep {
		in := f.pickInfo()
		in.Tried = append([]int(nil), in.Tried...)
		for i, e := range f.choice.view.Endpoints {
			if e == a.end {
				in.Tried = append(in.Tried, i)
			}
		}
		if pick, ok := f.choice.view.Picker.Pick(in); ok {
			w.note("flight %d: a second attempt", f.id)
			f.hedges++
			f.try(pick)
		}
	}
	f.run(&event{kind: evTick}, nil) // which may come for nothing
}
