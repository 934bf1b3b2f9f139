package proxy

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

func TestCancels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const window = 30 * time.Second
		c := &cancels{budget: 3, window: window}
		a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
		cancel := func(client netip.Addr, n int) {
			for range n {
				c.note(client, time.Now())
			}
		}
		check := func(what string, wantA, wantB bool) {
			t.Helper()
			if gotA, gotB := c.spent(a), c.spent(b); gotA != wantA || gotB != wantB {
				t.Errorf("%s: budgets spent %v and %v, want %v and %v", what, gotA, gotB, wantA, wantB)
			}
		}
		cancel(a, 3)
		check("as many as allowed", false, false)
		time.Sleep(window + 1)
		cancel(a, 3)
		check("as many in the next window", false, false)
		cancel(a, 1)
		cancel(b, 1)
		check("one more", true, false)
		time.Sleep(window)
		check("at the end of the window", true, false)
		time.Sleep(time.Nanosecond)
		check("after it", false, false)
		if c.until.Load() != 0 {
			t.Error("clients are looked up, none is over its budget")
		}
		cancel(a, 4)
		time.Sleep(window + 1)
		if c.spent(b) || c.until.Load() != 0 {
			t.Error("everybody is looked up, for one that has not come back")
		}
		cancel(a, 4)
		time.Sleep(window / 2)
		cancel(a, 1)
		time.Sleep(window)
		check("while it goes on", true, false)

		off := &cancels{budget: -1}
		for range 1000 {
			off.note(a, time.Now())
		}
		if off.spent(a) || off.clients != nil {
			t.Error("clients are counted although that is off")
		}
	})
}

// What is remembered of clients is bounded by how many there are in a window.
func TestCancelsForget(t *testing.T) {
	c := &cancels{budget: 1, window: 30 * time.Second}
	now := time.Now()
	client := netip.MustParseAddr("10.0.0.0")
	for i := range 100_000 {
		client = client.Next()
		c.note(client, now)
		if i%10 == 0 {
			c.note(client, now)
		}
		now = now.Add(time.Second)
	}
	if n := len(c.clients); n > 2*minPrune {
		t.Errorf("%d clients are remembered, of which 31 have cancelled a call lately", n)
	}
}
