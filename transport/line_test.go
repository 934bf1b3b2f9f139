package transport

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// aService is a simulated endpoint with so many streams, each of which serves a call in service. Calls come to it as
// they come to Endpoint, in simulated time.
type aService struct {
	line    line
	limit   int
	streams int
	service func() time.Duration

	now    time.Time
	active int
	ends   ends
	served map[netip.Addr]int // calls that were answered within their deadline
	sent   map[netip.Addr]int
}

// ends are the calls that run, by when they end.
type ends []running

type running struct {
	at    time.Time
	since time.Time
	w     *Ticket
}

func (e ends) Len() int           { return len(e) }
func (e ends) Less(i, j int) bool { return e[i].at.Before(e[j].at) }
func (e ends) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e *ends) Push(x any)        { *e = append(*e, x.(running)) }
func (e *ends) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

func newService(limit, streams int, service func() time.Duration) *aService {
	return &aService{
		limit: limit, streams: streams, service: service, now: time.Unix(1e9, 0),
		served: make(map[netip.Addr]int), sent: make(map[netip.Addr]int),
	}
}

// until lets time pass.
func (s *aService) until(t time.Time) {
	for len(s.ends) > 0 && !s.ends[0].at.After(t) {
		r := heap.Pop(&s.ends).(running)
		s.now = r.at
		s.active--
		inTime := !r.at.After(r.w.due)
		if inTime {
			s.served[r.w.Client]++
		}
		if r.w.seq > 0 { // it has waited
			if d := r.at.Sub(r.since); inTime || d > time.Duration(s.line.took) {
				s.line.took.add(d)
			}
		}
		for len(s.line.waiters) > 0 && s.line.waiters[0].due.Before(s.now) {
			s.line.remove(s.line.waiters[0]) // its timer
		}
		if len(s.line.waiters) > 0 {
			s.line.pace.passed(s.now)
			if w, _ := s.line.next(s.now); w != nil {
				s.start(w)
			}
		}
	}
	s.now = t
}

// start begins a call. It ends when it is answered, or with its deadline.
func (s *aService) start(w *Ticket) {
	s.active++
	end := s.now.Add(s.service())
	if w.bound && end.After(w.due) {
		end = w.due.Add(1)
	}
	heap.Push(&s.ends, running{end, s.now, w})
}

func (s *aService) call(client netip.Addr, deadline time.Duration) {
	s.sent[client]++
	w := &Ticket{due: s.now.Add(deadline), bound: true, Client: client}
	if s.active < s.streams && len(s.line.waiters) == 0 {
		s.start(w)
		return
	}
	s.line.admit(w, s.now, s.limit)
}

func clientNo(n int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}) }

// TestGoodputUnderOverload: three times as many calls come as can be served. Those that are served are nearly as many as
// the streams can serve, whatever the calls' deadlines are, since no stream is spent on a call that nobody waits for any more.
func TestGoodputUnderOverload(t *testing.T) {
	for _, tc := range []struct {
		name      string
		deadlines []time.Duration
		service   time.Duration
		spread    float64
	}{
		{name: "one deadline", deadlines: []time.Duration{time.Second}, service: 10 * time.Millisecond},
		{name: "short deadline", deadlines: []time.Duration{100 * time.Millisecond}, service: 10 * time.Millisecond},
		{name: "deadlines differ", deadlines: []time.Duration{200 * time.Millisecond, time.Second, 5 * time.Second}, service: 10 * time.Millisecond},
		{name: "times differ", deadlines: []time.Duration{time.Second}, service: 10 * time.Millisecond, spread: 1},
		{name: "slow service", deadlines: []time.Duration{time.Second}, service: 600 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const streams, seconds = 10, 4
			random := rand.New(rand.NewPCG(1, 2))
			s := newService(1024, streams, func() time.Duration {
				return tc.service + time.Duration(tc.spread*(random.Float64()-0.5)*float64(tc.service))
			})
			perSecond := streams * float64(time.Second) / float64(tc.service)
			step := time.Duration(float64(time.Second) / (3 * perSecond))
			start := s.now
			n := 0
			for end := start.Add(seconds * time.Second); s.now.Before(end); n++ {
				s.call(clientNo(n%4), tc.deadlines[n%len(tc.deadlines)])
				s.until(s.now.Add(step))
			}
			got := 0
			for _, k := range s.served {
				got += k
			}
			could := perSecond * seconds // and what is on the way at the end
			t.Logf("%d calls, %d served in time of %.0f that can be", n, got, could)
			if float64(got) < 0.85*could {
				t.Errorf("%d calls were served in time, of %.0f that can be", got, could)
			}
		})
	}
}

// TestGoodputFollowsChange: when the service becomes slower, and faster again, the line follows.
func TestGoodputFollowsChange(t *testing.T) {
	took := 10 * time.Millisecond
	s := newService(1024, 10, func() time.Duration { return took })
	for i, d := range []time.Duration{10 * time.Millisecond, 100 * time.Millisecond, time.Millisecond, 10 * time.Millisecond} {
		took = d
		before := s.served[clientNo(0)]
		span := 250 * took
		for end := s.now.Add(span); s.now.Before(end); {
			s.call(clientNo(0), time.Second)
			s.until(s.now.Add(took / 30))
		}
		got, could := s.served[clientNo(0)]-before, 10*int(span/took)
		t.Logf("phase %d: %d of %d", i, got, could)
		if got < could*8/10 {
			t.Errorf("phase %d, service %v: %d calls were served in time, of %d that can be", i, d, got, could)
		}
	}
}

// TestShareOfTheLine: one client sends far more than can be served. Those that send less than their share get all of it.
func TestShareOfTheLine(t *testing.T) {
	for _, limit := range []int{20, 1024} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			s := newService(limit, 10, func() time.Duration { return 10 * time.Millisecond })
			greedy, modest := clientNo(0), []netip.Addr{clientNo(1), clientNo(2), clientNo(3)}
			n := 0
			for end := s.now.Add(4 * time.Second); s.now.Before(end); n++ {
				s.call(greedy, time.Second)
				if n%30 == 0 { // 100 calls per second, of 1,000 that can be served
					s.call(modest[n/30%3], time.Second)
				}
				s.until(s.now.Add(time.Second / 3000))
			}
			s.until(s.now.Add(2 * time.Second))
			t.Logf("served: %v of %v", s.served, s.sent)
			for _, c := range modest {
				if s.served[c] < s.sent[c]*95/100 {
					t.Errorf("%v got %d of %d calls through", c, s.served[c], s.sent[c])
				}
			}
			if s.served[greedy] < 3200 {
				t.Errorf("the greedy one got %d calls through; the others leave more", s.served[greedy])
			}
		})
	}
}

// TestLineOrder: the earliest deadline is first, and of equal ones who came first; who was there before keeps the place.
func TestLineOrder(t *testing.T) {
	var l line
	now := time.Unix(1e9, 0)
	var ws []*Ticket
	for _, ms := range []int{50, 20, 90, 20, 70} {
		w := &Ticket{due: now.Add(time.Duration(ms) * time.Millisecond)}
		if _, _, ok := l.admit(w, now, 10); !ok {
			t.Fatal("no place")
		}
		ws = append(ws, w)
	}
	first, _ := l.next(now)
	if first != ws[1] {
		t.Fatal("not the earliest deadline")
	}
	l.admit(first, now, 10) // somebody was faster
	for i, want := range []int{1, 3, 0, 4, 2} {
		if w, _ := l.next(now); w != ws[want] {
			t.Fatalf("place %d: not call %d", i, want)
		}
	}
	if len(l.clients) != 0 || len(l.largest) != 0 {
		t.Errorf("%d clients are left in an empty line", len(l.clients))
	}
}

// TestLineGivesWay: in a full line the latest call of the client that has most gives way to one who has fewer.
func TestLineGivesWay(t *testing.T) {
	var l line
	now := time.Unix(1e9, 0)
	call := func(client, ms int) *Ticket {
		return &Ticket{due: now.Add(time.Duration(ms) * time.Millisecond), Client: clientNo(client)}
	}
	admit := func(w *Ticket) []*Ticket {
		t.Helper()
		evicted, _, ok := l.admit(w, now, 4)
		if !ok {
			return nil
		}
		return append(evicted, w)
	}
	var mine []*Ticket
	for i := range 4 {
		w := call(1, 40-i)
		mine = append(mine, w)
		admit(w)
	}
	if admit(call(1, 1)) != nil {
		t.Error("a client's call pushed out its own")
	}
	for i, want := range []*Ticket{mine[3], mine[2]} {
		if got := admit(call(2, 100)); len(got) != 2 || got[0] != want {
			t.Fatalf("call %d of the second client: %v", i, got)
		}
	}
	if admit(call(2, 100)) != nil {
		t.Error("a client got more than its share")
	}
	if admit(call(3, 100)) == nil {
		t.Error("a third client got nothing")
	}
	if got := l.trim(1); len(got) != 3 || len(l.waiters) != 1 {
		t.Errorf("%d trimmed, %d left", len(got), len(l.waiters))
	}
}

// TestLineIsSorted compares the line, through many steps, with what it should be.
func TestLineIsSorted(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	var l line
	var in []*Ticket
	now := time.Unix(1e9, 0)
	for range 5000 {
		switch {
		case random.IntN(3) > 0:
			w := &Ticket{due: now.Add(time.Duration(random.IntN(50)) * time.Second), Client: clientNo(random.IntN(5))}
			evicted, _, ok := l.admit(w, now, 30)
			for _, v := range evicted {
				in = slices.DeleteFunc(in, func(u *Ticket) bool { return u == v })
			}
			if ok {
				in = append(in, w)
			}
		case len(in) > 0:
			i := random.IntN(len(in))
			if !l.remove(in[i]) {
				t.Fatal("a call is not there")
			}
			if l.remove(in[i]) {
				t.Fatal("a call was there twice")
			}
			in = slices.Delete(in, i, i+1)
		}
		if len(in) != len(l.waiters) || len(in) > 30 {
			t.Fatalf("%d calls in the line, want %d", len(l.waiters), len(in))
		}
		if !slices.IsSortedFunc(l.waiters, func(a, b *Ticket) int {
			if a.before(b) {
				return -1
			}
			return 1
		}) {
			t.Fatal("the line is not sorted")
		}
		counts := make(map[netip.Addr]int)
		for _, w := range in {
			counts[w.Client]++
		}
		for c, n := range counts {
			if len(l.clients[c].waiters) != n || n > len(l.largest[0].waiters) {
				t.Fatalf("%v has %d calls, the line says %d, the largest has %d", c, n, len(l.clients[c].waiters), len(l.largest[0].waiters))
			}
		}
		if len(counts) != len(l.clients) || len(counts) != len(l.largest) {
			t.Fatalf("%d clients, want %d", len(l.clients), len(counts))
		}
	}
}
