package grpcproxy

import (
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
)

// startTimers arms the call's one timer for whatever comes first: the deadline, the end of its allowed life, or the
// next look at whether it is idle. A call without any has no timer.
func (x *exchange) startTimers() {
	x.idleSince = x.call.Start
	if d, ok := x.nextTick(x.call.Start); ok {
		x.mu.Lock()
		x.timer = time.AfterFunc(d, x.tick)
		x.mu.Unlock()
	}
}

func (x *exchange) nextTick(now time.Time) (time.Duration, bool) {
	const never = time.Duration(1<<63 - 1)
	next := never
	if d := x.call.Deadline; !d.IsZero() {
		next = min(next, d.Sub(now))
	}
	if s := time.Duration(x.h.StreamTimeout); s > 0 {
		next = min(next, x.call.Start.Add(s).Sub(now))
	}
	if s := time.Duration(x.h.StreamIdleTimeout); s > 0 {
		next = min(next, s/4)
	}
	return max(next, 0), next != never
}

// tick runs when the timer fires.
func (x *exchange) tick() {
	now := time.Now()
	switch {
	case x.deadlinePassed():
		x.cut(deadlineExceeded())
		return
	case x.h.StreamTimeout > 0 && now.Sub(x.call.Start) >= time.Duration(x.h.StreamTimeout):
		x.cut(proxyFailure(grpcwire.Unavailable, reasonStreamTimeout,
			"the call lasted longer than the proxy allows (stream_timeout "+time.Duration(x.h.StreamTimeout).String()+")"))
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.over {
		return
	}
	if limit := time.Duration(x.h.StreamIdleTimeout); limit > 0 {
		if moved := x.moved.Load(); moved != x.movedSeen {
			// Something moved since the last look, at an unknown time: the idle time counts from here, so that a
			// call is never ended too early, and at most a quarter of the limit late.
			x.movedSeen, x.idleSince = moved, now
		} else if now.Sub(x.idleSince) >= limit {
			go x.cut(proxyFailure(grpcwire.Unavailable, reasonStreamIdle,
				"nothing moved on the stream for "+limit.String()+" (stream_idle_timeout)"))
			return
		}
	}
	if d, ok := x.nextTick(now); ok {
		x.timer.Reset(d)
	}
}

func (x *exchange) stopTimers() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.over = true
	if x.timer != nil {
		x.timer.Stop()
	}
	if x.cancelWait != nil {
		x.cancelWait()
	}
}
