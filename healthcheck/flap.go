package healthcheck

import (
	"fmt"
	"time"
)

// What an endpoint tells unasked counts at once. One that changes its mind all the time would so move its calls to and
// fro, and fill the log: its good news counts only when it has lasted.
const (
	// flaps is how many times within the interval good news counts at once.
	flaps = 5
	// maxFlapInterval bounds that interval, which is the time for which good news has to last then, too.
	maxFlapInterval = 10 * time.Second
)

// recoveries has the times at which the last good news counted.
type recoveries struct {
	at   [flaps]time.Time
	next int
}

func (r *recoveries) add(now time.Time) {
	r.at[r.next] = now
	r.next = (r.next + 1) % flaps
}

// tooMany tells whether one more would be too many within the interval.
func (r *recoveries) tooMany(now time.Time, interval time.Duration) bool {
	oldest := r.at[r.next]
	return !oldest.IsZero() && now.Sub(oldest) < interval
}

// goodNewsLocked takes it that the endpoint says that it is well.
func (c *checker) goodNewsLocked() {
	if c.status == unhealthy {
		if !c.holdUntil.IsZero() {
			return
		}
		interval := min(time.Duration(c.g.settings.Load().Interval), maxFlapInterval)
		if now := time.Now(); c.recoveries.tooMany(now, interval) {
			c.holdUntil = now.Add(interval)
			c.hold = time.AfterFunc(interval, c.lasted)
			c.sayLocked(fmt.Sprintf("back too often: %d times within %v; now it has to last for as long", flaps, interval))
			return
		}
	}
	c.recoverLocked()
}

func (c *checker) recoverLocked() {
	unejectOn(c.g.state)
	if c.status != healthy {
		c.recoveries.add(time.Now())
		c.becomeLocked(healthy, "")
	}
}

// badNewsLocked makes good news begin anew to last.
func (c *checker) badNewsLocked() {
	if !c.holdUntil.IsZero() {
		c.holdUntil = time.Time{}
		c.hold.Stop()
	}
}

// lasted runs when good news has lasted.
func (c *checker) lasted() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.holdUntil.IsZero() && !time.Now().Before(c.holdUntil) {
		c.holdUntil = time.Time{}
		c.recoverLocked()
	}
}
