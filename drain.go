package grpcproxy

import (
	"math/rand/v2"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// drainShards spreads the registry of running calls over several locks, so that calls do not queue up for one.
const drainShards = 16

// drain knows the handler's running calls and ends them when the handler's time is over. The zero value is ready.
type drain struct {
	shards [drainShards]drainShard
	once   sync.Once
}

type drainShard struct {
	mu    sync.Mutex
	first *exchange
	// ended is set once the calls were ended; a call that comes after is ended at once.
	ended *failure
	_     [24]byte // keeps neighbours off the cache line
}

// drainEntry is a call's place in the registry.
type drainEntry struct {
	shard      *drainShard
	prev, next *exchange
}

func (d *drain) enter(x *exchange) {
	s := &d.shards[rand.Uint32()%drainShards] //nolint:gosec // spreading load
	s.mu.Lock()
	x.drained = drainEntry{shard: s, next: s.first}
	if s.first != nil {
		s.first.drained.prev = x
	}
	s.first = x
	ended := s.ended
	s.mu.Unlock()
	if ended != nil {
		x.cut(ended)
	}
}

// leaveDrain takes the call out of the registry, if it is in.
func (x *exchange) leaveDrain() {
	e := &x.drained
	if e.shard == nil {
		return
	}
	e.shard.mu.Lock()
	defer e.shard.mu.Unlock()
	if e.prev != nil {
		e.prev.drained.next = e.next
	} else {
		e.shard.first = e.next
	}
	if e.next != nil {
		e.next.drained.prev = e.prev
	}
}

// endAll ends every running call, and every one that still comes, with the failure. It returns how many there were.
func (d *drain) endAll(f *failure) int {
	return d.end(f, true, func(*exchange) bool { return true })
}

// endWhere ends the running calls that match. It returns how many there were.
func (d *drain) endWhere(match func(*exchange) bool, f *failure) int { return d.end(f, false, match) }

// end ends the running calls that match and, if it is for good, every one that still comes.
func (d *drain) end(f *failure, forGood bool, match func(*exchange) bool) int {
	n := 0
	for i := range d.shards {
		s := &d.shards[i]
		s.mu.Lock()
		if forGood {
			s.ended = f
		}
		var calls []*exchange
		for x := s.first; x != nil; x = x.drained.next {
			if match(x) {
				calls = append(calls, x)
			}
		}
		s.mu.Unlock()
		for _, x := range calls {
			x.cut(f)
		}
		n += len(calls)
	}
	return n
}

// isOn tells whether the call's current attempt is on the endpoint.
func (x *exchange) isOn(end *transport.Endpoint) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.att != nil && x.att.end.Endpoint == end
}

// noteCalls notes how far the calls on an endpoint are. end ends those that are no farther, since the endpoint hangs.
func (h *Handler) noteCalls(end *transport.Endpoint) (endThem func()) {
	moved := make(map[*exchange]int64)
	for i := range h.drain.shards {
		s := &h.drain.shards[i]
		s.mu.Lock()
		for x := s.first; x != nil; x = x.drained.next {
			if x.isOn(end) {
				moved[x] = x.moved.Load()
			}
		}
		s.mu.Unlock()
	}
	return func() {
		n := h.drain.endWhere(func(x *exchange) bool {
			before, ok := moved[x]
			return ok && x.moved.Load() == before && x.isOn(end)
		}, proxyFailure(grpcwire.Unavailable, reasonHung, "the upstream hangs: it has not answered a health check in time, and nothing has moved on the call since"))
		if n > 0 {
			h.logger.Info("ended calls on an upstream that hangs", zap.String("upstream", end.Address()), zap.Int("calls", n))
		}
	}
}

// exitMargin is kept of a grace period for the last frames to leave.
const exitMargin = 200 * time.Millisecond

// onShutdown runs when the server begins to shut down: on a reload, or because Caddy exits. Cleanup may have run
// already, or not. Running calls go on; how long, depends on which of the two it is.
func (h *Handler) onShutdown() {
	h.drain.once.Do(func() {
		if caddy.Exiting() {
			h.endAfter(h.exitDelay(), shuttingDown())
			return
		}
		go h.watchExit()
		if h.StreamCloseDelay > 0 {
			h.endAfter(time.Duration(h.StreamCloseDelay), proxyFailure(grpcwire.Unavailable, reasonReload,
				"the proxy was reloaded with a new configuration (stream_close_delay)"))
		}
	})
}

// endAfter ends the handler's calls when the delay is over. The timer outlives the handler on purpose: its calls do too.
func (h *Handler) endAfter(delay time.Duration, f *failure) {
	time.AfterFunc(delay, func() {
		if n := h.drain.endAll(f); n > 0 {
			h.logger.Info("ended running calls", zap.Int("calls", n), zap.String("why", f.message), zap.Duration("after", delay))
		}
	})
}

// exitDelay is how long calls may go on when Caddy exits: the grace period, if there is one, less what it takes to
// end them properly.
func (h *Handler) exitDelay() time.Duration {
	if app, err := h.ctx.App("http"); err == nil {
		if a, ok := app.(*caddyhttp.App); ok && a.GracePeriod > 0 {
			grace := time.Duration(a.GracePeriod)
			return max(grace-exitMargin, grace/2)
		}
	}
	return time.Duration(h.ExitTimeout)
}
