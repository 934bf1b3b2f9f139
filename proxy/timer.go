package proxy

import (
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
)

// timer is a flight's only one. It fires for whatever is due first, and at times for nothing: it is set anew when something becomes due
// earlier, but not when it becomes due later.
type timer struct {
	t  *time.Timer
	at time.Time // when it fires; zero if it does not
	// loose: it may have fired, and the flight has not heard of it.
	loose bool

	end     time.Time // of the call, by its deadline or stream_timeout
	idle    time.Time // the next look at whether anything has moved
	look    time.Time // for another endpoint than the one that is being connected to
	round   time.Time // the next round of trying
	excerpt time.Time // an answer that is not gRPC was read for long enough
	late    time.Time // the client has not taken the end of its answer

	seen  int64     // what had moved at the last look
	since time.Time // when something had
}

func (t *timer) stop() {
	if t.t != nil && !t.t.Stop() && !t.at.IsZero() {
		t.loose = true
	}
	t.at = time.Time{}
}

// startTimer sets the timer for what bounds the whole call.
func (f *Flight) startTimer() {
	t, cfg := &f.timer, &f.p.cfg
	start := f.Call.Start
	t.end = f.Call.Deadline
	if d := cfg.StreamTimeout; d > 0 {
		if end := start.Add(d); t.end.IsZero() || end.Before(t.end) {
			t.end = end
		}
	}
	if d := cfg.StreamIdleTimeout; d > 0 {
		t.since, t.idle = start, start.Add(d/4)
	}
	f.arm()
}

// arm sees to it that the timer fires for whatever is due first.
func (f *Flight) arm() {
	t := &f.timer
	var next time.Time
	for _, due := range [...]time.Time{t.end, t.idle, t.look, t.round, t.excerpt, t.late} {
		if !due.IsZero() && (next.IsZero() || due.Before(next)) {
			next = due
		}
	}
	switch {
	case next.IsZero() || !t.at.IsZero() && !next.Before(t.at):
		return
	case t.t == nil:
		t.t = time.AfterFunc(time.Until(next), func() { f.push(&event{kind: evTick}, nil) })
	case !t.t.Reset(time.Until(next)) && !t.at.IsZero():
		t.loose = true
	}
	t.at = next
}

// tick does what is due.
func (f *Flight) tick() {
	t := &f.timer
	now := time.Now()
	t.at = time.Time{}
	due := func(at *time.Time) bool {
		if at.IsZero() || now.Before(*at) {
			return false
		}
		*at = time.Time{}
		return true
	}
	switch {
	case due(&t.end):
		f.timeOver()
	case due(&t.late):
		f.abandon(f.late)
	case due(&t.excerpt):
		for _, a := range f.atts {
			if a != nil && a.foreign {
				f.foreignEnd(a, nil)
				break
			}
		}
	case due(&t.look):
		if a := f.atts[0]; a != nil && a.waits {
			f.choice.impatient = true
			f.moveOn(a)
		}
	case due(&t.round):
		if f.phase == choosing && f.atts[0] == nil {
			f.unwait()
			f.choose()
		}
	case due(&t.idle):
		f.lookForIdleness(now)
	}
	if f.phase != over {
		f.arm()
	}
}

func (f *Flight) timeOver() {
	if f.deadlinePassed() {
		f.cut(deadlineExceeded())
		return
	}
	f.cut(Fail(grpcwire.Unavailable, ReasonStreamTimeout,
		"the call lasted longer than the proxy allows (stream_timeout "+f.p.cfg.StreamTimeout.String()+")"))
}

// lookForIdleness ends a call on which nothing has moved for too long. What has moved since the last look did so at an unknown time:
// the idle time counts from here, so that a call is never ended too early, and at most a quarter of the limit late.
func (f *Flight) lookForIdleness(now time.Time) {
	t, limit := &f.timer, f.p.cfg.StreamIdleTimeout
	if moved := f.moved.Load(); moved != t.seen {
		t.seen, t.since = moved, now
	} else if now.Sub(t.since) >= limit {
		f.cut(Fail(grpcwire.Unavailable, ReasonStreamIdle, "nothing moved on the stream for "+limit.String()+" (stream_idle_timeout)"))
		return
	}
	t.idle = now.Add(limit / 4)
}

// deadlineSlack is how much earlier than here the deadline may pass at the others: an upstream was told the time that
// remained, rounded down; the client began to count before its call came; and all have clocks of their own.
const deadlineSlack = 5 * time.Millisecond

// deadlineNear tells whether the deadline has passed for somebody.
func (f *Flight) deadlineNear() bool {
	d := f.Call.Deadline
	return !d.IsZero() && time.Until(d) < deadlineSlack
}

func (f *Flight) deadlinePassed() bool {
	d := f.Call.Deadline
	return !d.IsZero() && !time.Now().Before(d)
}
