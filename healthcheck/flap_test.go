package healthcheck

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// A server that changes its mind all the time is believed the bad news at once, and the good news only so often. Good news
// that lasts counts in the end.
func TestFlapping(t *testing.T) {
	for name, tc := range map[string]struct {
		mode           WatchMode
		interval, last time.Duration
	}{
		"watch":          {WatchOnly, 2 * time.Second, 2 * time.Second},
		"auto":           {WatchAndProbe, 2 * time.Second, 2 * time.Second},
		"a long time":    {WatchOnly, time.Hour, maxFlapInterval},
		"and asked, too": {WatchAndProbe, time.Hour, maxFlapInterval},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWatcher(tc.mode)
				w.say(Serving, "")
				info, end := endpoint(t, "127.0.0.1:1")
				s := end.State
				changes := 0
				m := &Monitor{OnChange: func(Transition) { changes++ }}
				defer m.Attend(info, end.Endpoint)()
				defer active(t, steady(&Active{Interval: caddy.Duration(tc.interval)}), w).Attend(info, end.Endpoint)()
				<-w.watched
				tell := func(v Verdict) {
					w.tell <- v
					synctest.Wait()
				}
				const toggles = 2000
				for i := range toggles {
					tell(Verdict{Answer: Serving})
					if i < flaps-1 && !s.Usable() {
						t.Fatalf("not usable though it was back only %d times", i)
					}
					after(5 * time.Millisecond)
					tell(Verdict{NotServing, "no"})
					if s.Usable() {
						t.Fatal("usable though it is not serving")
					}
					after(5 * time.Millisecond)
				}
				over := toggles * 10 * time.Millisecond
				if most := 2 * (flaps + 1) * int(over/tc.last+1); changes > most || changes < 2*flaps {
					t.Errorf("%d changes within %v, want at most %d", changes, over, most)
				}
				tell(Verdict{Answer: Serving})
				if st := s.Status(); !s.Usable() && !strings.Contains(st.Text, "back too often: 5 times within") {
					t.Errorf("%+v", st)
				}
				after(tc.last)
				if !s.Usable() {
					t.Errorf("not usable after %v: %+v", tc.last, s.Status())
				}
				after(tc.last)
				tell(Verdict{NotServing, "no"})
				tell(Verdict{Answer: Serving})
				if !s.Usable() {
					t.Error("not usable at once, though it has not changed for long")
				}
			})
		})
	}
}

// What has to last is broken by an answer to a probe as well, and by the end of the checks.
func TestFlappingHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatcher(WatchAndProbe)
		w.say(Serving, "")
		info, end := endpoint(t, "127.0.0.1:1")
		stop := active(t, steady(&Active{Interval: 10 * testSecond, HealthyEdgeInterval: 5 * testSecond}), w).Attend(info, end.Endpoint)
		<-w.watched
		after(spread) // asked for the first time
		for range flaps + 1 {
			w.tell <- Verdict{NotServing, "no"}
			w.tell <- Verdict{Answer: Serving}
		}
		w.say(NoAnswer, "gone")
		after(9 * time.Second)
		if st := end.State.Status(); st.Condition != upstream.ConditionUnhealthy || st.Text != "gone" {
			t.Errorf("%+v", st)
		}
		after(20 * time.Second)
		if end.State.Usable() {
			t.Error("usable though it does not answer")
		}
		w.tell <- Verdict{Answer: Serving}
		w.tell <- Verdict{NotServing, "no"}
		synctest.Wait()
		stop()
	})
}
