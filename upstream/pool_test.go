package upstream

import (
	"errors"
	"testing"
)

type thing struct{ gone *int }

func (t *thing) Destruct() error { *t.gone++; return nil }

// TestLease: a provision that fails half way, cleaned up twice, leaves the running configuration's references alone.
func TestLease(t *testing.T) {
	pool := NewPool[*thing]()
	gone := 0
	create := func() (*thing, error) { return &thing{&gone}, nil }

	running := pool.NewLease()
	a, err := running.Acquire("a", create)
	if err != nil {
		t.Fatal(err)
	}

	failing := pool.NewLease()
	if b, err := failing.Acquire("a", create); err != nil || b != a {
		t.Fatalf("second lease got %p, %v, want the same value %p", b, err, a)
	}
	boom := errors.New("boom")
	if _, err := failing.Acquire("b", func() (*thing, error) { return nil, boom }); !errors.Is(err, boom) {
		t.Fatalf("error %v, want %v", err, boom)
	}
	failing.Release()
	failing.Release()

	if n, ok := pool.References("a"); n != 1 || !ok {
		t.Fatalf("a has %d references (%v), want 1", n, ok)
	}
	if _, ok := pool.References("b"); ok {
		t.Fatal("b stayed in the pool though it was never made")
	}
	if gone != 0 {
		t.Fatal("a was destructed while in use")
	}
	running.Release()
	if gone != 1 {
		t.Fatalf("a was destructed %d times, want once", gone)
	}
	var none *Lease[*thing]
	none.Release()
}

func TestStateReasons(t *testing.T) {
	var s State
	if !s.Usable() {
		t.Fatal("a new state is not usable")
	}
	if !s.Set(Backoff) || s.Set(Backoff) {
		t.Fatal("Set does not tell the first time from the second")
	}
	s.Set(Unhealthy)
	if !s.Clear(Backoff) || s.Usable() || !s.Has(Unhealthy) || s.Has(Backoff) {
		t.Fatal("reasons do not add up")
	}
	s.Clear(Unhealthy)
	if !s.Usable() {
		t.Fatal("still unusable without a reason")
	}
}
