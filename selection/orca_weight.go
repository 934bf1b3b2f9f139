package selection

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/orca"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// reported is the weight of an endpoint by its own reports: gRFC A58, "Subchannel Weights". Times are in nanoseconds since
// 1970, as those of connections are.
type reported struct {
	weight  atomic.Uint64 // the bits of a float64
	updated atomic.Int64  // A58's last_updated
	since   atomic.Int64  // A58's non_empty_since, 0 for its infinity
}

// receive takes a report.
func (r *reported) receive(s *upstream.State, m *orca.Metrics, key reportedKey, report []byte) {
	load, err := m.Read(report)
	if err != nil {
		return
	}
	weight := weightOf(load, key.penalty)
	if weight == 0 {
		return
	}
	now := time.Now().UnixNano()
	since, updated := r.since.Load(), r.updated.Load()
	// A58: non_empty_since "is reset when a subchannel comes back to READY or the weight expires so that it can be
	// updated with the next non-zero load report". Here, that is noticed when that report comes.
	if since == 0 || since < connectedAt(s) || now-updated >= key.expiration.Nanoseconds() {
		r.since.CompareAndSwap(since, now)
	}
	r.weight.Store(math.Float64bits(weight))
	r.updated.Store(now)
}

// weightOf is A58's formula: qps / (utilization + eps/qps × error_utilization_penalty). It is 0 for a report that says
// nothing.
func weightOf(l orca.Load, penalty float64) float64 {
	if !(l.QPS > 0 && l.Utilization > 0) {
		return 0
	}
	w := l.QPS / (l.Utilization + max(l.EPS, 0)/l.QPS*penalty)
	if !(w > 0 && w <= math.MaxFloat64) {
		return 0
	}
	return w
}

// current is the weight now, 0 if it is not to be used (A58, GetWeight).
func (r *reported) current(s *upstream.State, now int64, expiration, blackout time.Duration) float64 {
	since, updated := r.since.Load(), r.updated.Load()
	switch {
	case updated == 0, now-updated >= expiration.Nanoseconds():
		return 0
	case since < connectedAt(s): // Nothing was reported on this connection.
		return 0
	case blackout > 0 && now-since < blackout.Nanoseconds():
		return 0
	}
	return math.Float64frombits(r.weight.Load())
}

// connectedAt is when the endpoint's oldest connection was made. Without any, what was reported stays valid until it
// expires: connections that nobody used are closed, and are made again with the next call.
func connectedAt(s *upstream.State) int64 {
	if t := s.Connected(); !t.IsZero() {
		return t.UnixNano()
	}
	return 0
}
