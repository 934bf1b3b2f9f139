package upstream

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"
)

// Who judges an upstream's health otherwise still sees the calls of the others, and a limit is of all calls.
func TestLoadIsShared(t *testing.T) {
	l := new(Load)
	a, b := NewState(l), NewState(l)
	b.SetLimit(2)
	a.Begin()
	if _, ok := a.TryBegin(); !ok {
		t.Fatal("no call may begin")
	}
	if b.Active() != 2 || b.Begun() != 2 || !b.Has(Full) {
		t.Errorf("the other sees %d calls, %d have begun; full: %v", b.Active(), b.Begun(), b.Has(Full))
	}
	if a.Has(Full) {
		t.Error("full by a limit that is not its own")
	}
	a.SetLimit(1)
	if !a.Has(Full) {
		t.Error("not full with two calls of one")
	}
	a.End()
	if b.Has(Full) || !a.Has(Full) {
		t.Errorf("with one call: full at two %v, at one %v", b.Has(Full), a.Has(Full))
	}
	b.SetLimit(0)
	b.Begin()
	b.Begin()
	if b.Has(Full) {
		t.Error("full without a limit")
	}
	a.SetLimit(0)
	if a.Has(Full) || l.limited.Load() != nil {
		t.Error("a limit is left")
	}
	apart := new(State)
	apart.Begin()
	if l.Active() != 3 || apart.Active() != 1 {
		t.Errorf("%d and %d calls", l.Active(), apart.Active())
	}
}

// However calls and limits come and go, in the end each State says what is true.
func TestLoadLimitsConcurrently(t *testing.T) {
	l := new(Load)
	states := []*State{NewState(l), NewState(l), NewState(l)}
	var wg sync.WaitGroup
	for i, s := range states {
		wg.Go(func() {
			for range 2000 {
				s.Begin()
				s.End()
			}
			s.Begin() // and goes on
		})
		wg.Go(func() {
			for range 500 {
				s.SetLimit(rand.Int64N(4))
			}
			s.SetLimit(int64(2 * i)) // none, 2 and 4
		})
	}
	wg.Wait()
	for i, want := range []bool{false, true, false} {
		if got := states[i].Has(Full); got != want || states[i].Active() != 3 {
			t.Errorf("limit %d, %d calls: full %v", 2*i, states[i].Active(), got)
		}
	}
	for _, s := range states {
		s.End()
	}
	for i, s := range states {
		if s.Has(Full) || s.Active() != 0 {
			t.Errorf("limit %d, %d calls: full %v", 2*i, s.Active(), s.Has(Full))
		}
	}
}

func BenchmarkLoad(b *testing.B) {
	for name, limit := range map[string]int64{"unlimited": 0, "limited": 1 << 30} {
		b.Run(name, func(b *testing.B) {
			s := NewState(new(Load))
			s.SetLimit(limit)
			for b.Loop() {
				s.Begin()
				s.End()
			}
		})
	}
}

// A load is found by its address as long as somebody has it, and forgotten then.
func TestLoadOf(t *testing.T) {
	a := Address{Network: "tcp", Dial: "load.test:1"}
	s := NewState(LoadOf(a))
	s.Begin()
	runtime.GC()
	if LoadOf(a) != s.shared || LoadOf(a).Active() != 1 || LoadOf(Address{Network: "unix", Dial: a.Dial}) == s.shared {
		t.Error("another load for the same address, or the same for another one")
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 200 {
				l := LoadOf(Address{Network: "tcp", Dial: "load.test:2"})
				l.begin()
				if i%50 == 0 {
					runtime.GC()
				}
				if n := l.Active(); n < 1 || n > 4 {
					t.Errorf("%d calls", n)
				}
				l.end()
			}
		})
	}
	wg.Wait()
	runtime.KeepAlive(s)
	for end := time.Now().Add(10 * time.Second); ; runtime.GC() {
		_, one := loads.Load(a.Key())
		_, two := loads.Load("tcp/load.test:2")
		if !one && !two {
			break
		}
		if time.Now().After(end) {
			t.Fatal("it is remembered")
		}
	}
}
