package upstream

import (
	"slices"
	"sync"
	"testing"
	"time"
)

// What is true of the connections is seen at once by all who are attached, and told when the caller says so.
func TestLink(t *testing.T) {
	var l Link
	if !l.SetBackoff(true) || l.SetBackoff(true) || !l.SetConnected(time.Unix(1000, 0)) || l.SetConnected(time.Unix(2000, 0)) {
		t.Error("what changes is not told from what does not")
	}
	l.SetRoom(false)
	var a, b State
	detach := l.Attach(&a)
	defer l.Attach(&b)()
	for _, s := range []*State{&a, &b} {
		if !s.Has(Backoff) || !s.Has(NoRoom) || !s.Connected().Equal(time.Unix(1000, 0)) {
			t.Errorf("attached: %+v, room %v, connected since %v", s.Status(), !s.Has(NoRoom), s.Connected())
		}
	}
	a.Set(Unhealthy) // which is nothing of the other's
	if b.Has(Unhealthy) || l.Has(Unhealthy) {
		t.Error("a verdict is shared")
	}
	var told []Change
	defer b.Watch(func(c Change) {
		if c != Stirred {
			told = append(told, c)
		}
	})()
	var conditions []Condition
	defer b.WatchStatus(func(_, to Status) { conditions = append(conditions, to.Condition) })()
	l.SetBackoff(false)
	l.SetRoom(true)
	l.SetConnected(time.Time{})
	if !b.Usable() || a.Has(Backoff|NoRoom) || b.IsConnected() || len(told) > 0 {
		t.Errorf("usable %v, connected %v, told %v before its time", b.Usable(), b.IsConnected(), told)
	}
	l.Tell()
	l.Tell()
	if !slices.Equal(told, []Change{BecameUsable, Disconnected}) || !slices.Equal(conditions, []Condition{ConditionHealthy}) {
		t.Errorf("told %v, %v", told, conditions)
	}
	if l.SetBackoff(false) || l.SetConnected(time.Time{}) {
		t.Error("there is something to tell, though nothing has changed")
	}
	l.SetBackoff(true)
	detach()
	detach()
	if a.Has(Backoff) || !b.Has(Backoff) {
		t.Error("detached, it thinks ill of the connections, or the other one does not")
	}
	l.SetConnected(time.Unix(3000, 0))
	l.SetRoom(false)
	if a.Has(NoRoom) || a.IsConnected() {
		t.Error("detached, it shows the connections")
	}
}

// Those who share a State each attach it, and it stays so until the last of them goes.
func TestLinkAttachedTwice(t *testing.T) {
	var l Link
	var s State
	first, second := l.Attach(&s), l.Attach(&s)
	first()
	l.SetBackoff(true)
	if !s.Has(Backoff) {
		t.Error("not attached any more")
	}
	second()
	if s.Has(Backoff) || len(l.attached) > 0 {
		t.Error("still attached")
	}
	defer l.Attach(&s)()
	if !s.Has(Backoff) {
		t.Error("attached again, it does not show the connections")
	}
}

// Changes that come at once, by several clients' connections, leave no old reason behind, whoever comes and goes meanwhile.
func TestLinkConcurrently(t *testing.T) {
	for range 50 {
		var l Link
		var stays, shared State
		defer l.Attach(&stays)()
		// Told in order, it hears of both in turn.
		backoff := false
		defer stays.WatchStatus(func(_, to Status) {
			if now := to.Reason == Backoff; to.Reason == Unhealthy || now == backoff {
				t.Errorf("told %+v", to)
			} else {
				backoff = now
			}
		})()
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				for j := range 50 {
					l.SetBackoff((i+j)%2 == 0)
					l.SetRoom((i+j)%3 == 0)
					l.SetConnected([]time.Time{{}, time.Unix(1, 0)}[(i+j)%2])
					l.Tell()
					shared.Change(Unhealthy, Connecting, "")
					shared.Change(Connecting, Unhealthy, "")
				}
			})
			wg.Go(func() {
				for range 50 {
					var comes State
					one, other := l.Attach(&comes), l.Attach(&shared)
					one()
					other()
					if comes.Has(Backoff | NoRoom) {
						t.Error("a reason is left after the end")
					}
				}
			})
		}
		wg.Wait()
		if stays.Has(Backoff) != l.Has(Backoff) || stays.Has(NoRoom) != l.Has(NoRoom) || stays.connected.Load() != l.connected.Load() {
			t.Fatalf("it shows %b, connected %v; true is %b, %v", stays.reasons.Load(), stays.connected.Load(), l.reasons.Load(), l.connected.Load())
		}
		if shared.Has(Backoff | NoRoom) {
			t.Error("a reason is left after the end")
		}
		if backoff != l.Has(Backoff) || len(l.news) > 0 {
			t.Errorf("the last that was told is that it is in backoff: %v; true is %v", backoff, l.Has(Backoff))
		}
	}
}
