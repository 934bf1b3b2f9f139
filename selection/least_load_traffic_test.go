package selection

import (
	"container/heap"
	"flag"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// traffic is what comes to servers of four processors each, in a time that is not real. Requests and messages take a
// processor for a while, exponentially distributed, and queue when there is none.
type traffic struct {
	name    string
	servers int
	slow    float64 // the first server's speed, the others' being 1
	weights bool    // they say so
	restart bool    // the first server was away when it is measured, and its streams have gone to the others

	unary      float64       // a second; a tenth of them takes long
	short      time.Duration // the others
	long       time.Duration
	unaryBytes uint64

	streams     float64 // open at a time, on average for 100 s
	busy        float64 // a part of them, the others are silent
	messages    float64 // a second on a busy one, each with an answer
	cost        time.Duration
	streamBytes uint64
}

var traffics = func() (all []traffic) {
	for _, change := range []struct {
		name string
		to   func(f *traffic)
	}{
		{"mixed", func(*traffic) {}},
		{"mixed, 1500 streams", func(f *traffic) { f.streams, f.busy = 1500, 0.02 }},
		{"mixed, few heavy streams", func(f *traffic) { f.busy, f.messages = 0.02, 200 }},
		{"mixed, 20 servers", func(f *traffic) { f.servers, f.unary, f.streams = 20, 4000, 1200 }},
		{"mixed, after a restart", func(f *traffic) { f.restart = true }},
		{"unary and silent streams, after a restart", func(f *traffic) { f.restart, f.busy, f.unary = true, 0, 1850 }},
		{"streams only", func(f *traffic) { f.unary, f.messages, f.cost = 0, 80, 5400*time.Microsecond }},
		{"unary only", func(f *traffic) { f.streams, f.unary = 0, 1850 }},
		{"mixed, one at 70 %", func(f *traffic) { f.slow, f.unary = 0.7, 900 }},
		{"mixed, one at 50 %", func(f *traffic) { f.slow, f.unary = 0.5, 800 }},
		{"mixed, one at 50 % by weight", func(f *traffic) { f.slow, f.unary, f.weights = 0.5, 800, true }},
		{"unary only, one at 50 %", func(f *traffic) { f.streams, f.slow, f.unary = 0, 0.5, 1600 }},
		{"cheap large messages", func(f *traffic) { f.cost, f.streamBytes, f.unary = 300*time.Microsecond, 64<<10, 1750 }},
	} {
		f := traffic{
			name: change.name, servers: 5, slow: 1,
			unary: 1000, short: 2 * time.Millisecond, long: 50 * time.Millisecond, unaryBytes: 500,
			streams: 300, busy: 0.1, messages: 40, cost: 5 * time.Millisecond, streamBytes: 1000,
		}
		change.to(&f)
		all = append(all, f)
	}
	return all
}()

var seeds = flag.Int("traffic", 0, "run all of TestLeastLoadTraffic with so many seeds each, and show what comes of it")

// Busy and silent streams together with unary calls are spread better by work than by number, and after a restart calls wait
// less. Other traffic is shown on demand, good and bad (docs/selection.md has the figures):
//
//	go test -timeout 0 -run LeastLoadTraffic -v ./selection -traffic 3
func TestLeastLoadTraffic(t *testing.T) {
	for _, f := range traffics {
		if *seeds == 0 && f.name != "mixed, after a restart" {
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			load, number := f.median(t, new(LeastLoad).Build), f.median(t, new(LeastRequest).Build)
			for _, x := range []struct {
				policy string
				figures
			}{{"least_request", number}, {"least_load", load}} {
				t.Logf("%-13s  call p99 %6.1f ms  message p99 %6.1f ms  spread %4.1f %%", x.policy, x.call, x.message, x.spread)
			}
			if *seeds == 0 && (load.call > 0.9*number.call || load.message > 0.9*number.message || load.spread > 0.5*number.spread) {
				t.Error("least_load is not better")
			}
		})
	}
}

// figures are the 99th percentiles of calls and of streams' messages in milliseconds, and how uneven the servers' work is in
// ten seconds: the standard deviation in percent of the mean.
type figures struct{ call, message, spread float64 }

func (f traffic) median(t *testing.T, build func(*upstream.Snapshot) Picker) figures {
	old := randUint64
	t.Cleanup(func() { randUint64 = old })
	var calls, messages, spreads []float64
	for seed := range max(*seeds, 1) {
		synctest.Test(t, func(*testing.T) {
			r := newRush(f, build, uint64(seed))
			randUint64 = rand.New(rand.NewPCG(uint64(seed), 2)).Uint64 // every run is the same
			r.run()
			calls = append(calls, percentile99(r.calls))
			messages = append(messages, percentile99(r.messages))
			spreads = append(spreads, r.spread())
		})
	}
	middle := func(all []float64) float64 {
		slices.Sort(all)
		return all[len(all)/2]
	}
	return figures{middle(calls), middle(messages), middle(spreads)}
}

func percentile99(times []time.Duration) float64 {
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return float64(times[len(times)*99/100]) / float64(time.Millisecond)
}

const (
	rushWarm    = 60 * time.Second // before it is measured
	rushLasts   = 90 * time.Second
	rushAway    = 10 * time.Second // a restart
	rushLife    = 100 * time.Second
	rushWindow  = 10 * time.Second
	rushWorkers = 4
)

// rush is traffic as it comes.
type rush struct {
	traffic
	random  *rand.Rand
	state   *upstream.Snapshot
	picker  Picker
	servers []*rushServer

	now    time.Duration
	events rushEvents
	serial int

	measuring       bool
	calls, messages []time.Duration
	spreads         []float64
}

type rushServer struct {
	*upstream.State
	speed   float64
	running int
	queue   []func()
	work    time.Duration // in this window
	streams []*rushStream // in the order in which they have come
}

type rushStream struct {
	at   *rushServer
	busy bool
	end  time.Duration
}

type rushEvent struct {
	at     time.Duration
	serial int
	do     func()
}

type rushEvents []rushEvent

func (q rushEvents) Len() int { return len(q) }
func (q rushEvents) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].serial < q[j].serial
}
func (q rushEvents) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *rushEvents) Push(x any)   { *q = append(*q, x.(rushEvent)) }
func (q *rushEvents) Pop() any {
	last := len(*q) - 1
	x := (*q)[last]
	*q = (*q)[:last]
	return x
}

func newRush(f traffic, build func(*upstream.Snapshot) Picker, seed uint64) *rush {
	r := &rush{traffic: f, random: rand.New(rand.NewPCG(seed, 1)), state: snapshot(make([]int, f.servers)...)}
	for i := range r.state.Endpoints {
		e := &r.state.Endpoints[i]
		s := &rushServer{State: e.State, speed: 1}
		if i == 0 {
			s.speed = f.slow
		}
		if f.weights {
			e.Weight = uint32(100 * s.speed)
		}
		r.servers = append(r.servers, s)
	}
	r.picker = build(r.state)
	return r
}

func (r *rush) after(d time.Duration, do func()) {
	r.serial++
	heap.Push(&r.events, rushEvent{r.now + d, r.serial, do})
}

func (r *rush) about(mean time.Duration) time.Duration {
	return time.Duration(r.random.ExpFloat64() * float64(mean))
}

func (r *rush) per(rate float64) time.Duration {
	return r.about(time.Duration(float64(time.Second) / rate))
}

func (r *rush) run() {
	if r.unary > 0 {
		r.after(0, r.call)
	}
	if r.streams > 0 {
		for range int(r.streams) {
			r.after(time.Duration(r.random.Float64()*float64(rushWindow)), r.stream)
		}
		r.after(rushWindow, r.arrive)
	}
	r.after(rushWarm, r.measure)
	begin := time.Now()
	for {
		e := heap.Pop(&r.events).(rushEvent)
		if e.at > rushWarm+rushLasts {
			return
		}
		r.now = e.at
		time.Sleep(r.now - time.Since(begin)) // the picker has a clock too
		e.do()
	}
}

func (r *rush) measure() {
	begin := func() {
		r.measuring = true
		r.after(rushWindow, r.window)
	}
	if !r.restart {
		begin()
		return
	}
	s := r.servers[0]
	s.SetUsable(false)
	gone := s.streams
	s.streams = nil
	for _, st := range gone {
		s.End()
		r.open(st)
	}
	r.after(rushAway, func() { s.SetUsable(true); begin() })
}

func (r *rush) window() {
	var sum, squares float64
	for _, s := range r.servers {
		x := float64(s.work)
		sum += x
		squares += x * x
		s.work = 0
	}
	mean := sum / float64(len(r.servers))
	r.spreads = append(r.spreads, 100*math.Sqrt(max(squares/float64(len(r.servers))-mean*mean, 0))/mean)
	r.after(rushWindow, r.window)
}

func (r *rush) spread() float64 {
	sum := 0.0
	for _, x := range r.spreads {
		sum += x
	}
	return sum / float64(len(r.spreads))
}

func (r *rush) pick() *rushServer {
	i, ok := pick(r.picker, PickInfo{})
	if !ok {
		panic("nothing picked")
	}
	synctest.Wait() // work is measured by another goroutine
	return r.servers[i]
}

// serve takes a processor, now or later.
func (r *rush) serve(s *rushServer, cost time.Duration, bytes uint64, to *[]time.Duration, done func()) {
	begin, counts := r.now, r.measuring
	s.Work().Add(1, bytes)
	run := func() {
		s.running++
		took := time.Duration(float64(cost) / s.speed)
		r.after(took, func() {
			s.running--
			if r.measuring {
				s.work += took
			}
			s.Work().Add(1, bytes)
			if counts {
				*to = append(*to, r.now-begin)
			}
			done()
			if len(s.queue) > 0 {
				next := s.queue[0]
				s.queue = s.queue[1:]
				next()
			}
		})
	}
	if s.running < rushWorkers {
		run()
		return
	}
	s.queue = append(s.queue, run)
}

func (r *rush) call() {
	r.after(r.per(r.unary), r.call)
	cost := r.about(r.short)
	if r.random.IntN(10) == 0 {
		cost = r.about(r.long)
	}
	s := r.pick()
	s.Begin()
	r.serve(s, cost, r.unaryBytes, &r.calls, s.End)
}

func (r *rush) arrive() {
	r.after(r.per(r.streams/rushLife.Seconds()), r.arrive)
	r.stream()
}

func (r *rush) stream() {
	r.open(&rushStream{busy: r.random.Float64() < r.busy, end: r.now + r.about(rushLife)})
}

// open opens a stream, or opens it again elsewhere.
func (r *rush) open(st *rushStream) {
	s := r.pick()
	st.at = s
	s.Begin()
	s.streams = append(s.streams, st)
	r.after(st.end-r.now, func() {
		if st.at == s {
			s.streams = slices.DeleteFunc(s.streams, func(other *rushStream) bool { return other == st })
			s.End()
			st.at = nil
		}
	})
	var message func()
	message = func() {
		if st.at == s {
			r.serve(s, r.about(r.cost), r.streamBytes, &r.messages, func() {})
			r.after(r.per(r.traffic.messages), message)
		}
	}
	if st.busy {
		r.after(r.per(r.traffic.messages), message)
	}
}
