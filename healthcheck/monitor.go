package healthcheck

import (
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// The events of a Transition.
const (
	EventHealthy    = "healthy"
	EventUnhealthy  = "unhealthy"
	EventEjected    = "ejected"
	EventReadmitted = "readmitted"
	EventDrained    = "drained"
)

// Transition is a change of an endpoint's condition that somebody should be told of.
type Transition struct {
	// Endpoint is the endpoint as its source described it when it came.
	Endpoint *upstream.Endpoint
	// From is how the endpoint was when it was told of last, To how it is now.
	From, To upstream.Status
}

// Event names the transition: healthy, unhealthy, ejected, readmitted or drained; empty for what is no event.
func (t *Transition) Event() string {
	from, to := t.From.Condition, t.To.Condition
	switch to {
	case upstream.ConditionUnhealthy:
		if from != to {
			return EventUnhealthy
		}
	case upstream.ConditionEjected:
		again := t.To.Reason == upstream.Ejected && !t.From.Since.Equal(t.To.Since) // the trial after the last time has failed
		if from != to || again {
			return EventEjected
		}
	case upstream.ConditionDraining:
		if from != to {
			return EventDrained
		}
	case upstream.ConditionHealthy, upstream.ConditionWarming:
		switch from {
		case upstream.ConditionHealthy, upstream.ConditionWarming:
		case upstream.ConditionEjected:
			return EventReadmitted
		default:
			return EventHealthy
		}
	default: // connecting: it waits for its first answer
	}
	return ""
}

// passing tells whether a status is passed over: an endpoint that cannot be connected to, which comes and goes with each
// try and is logged with the connections, and one that is on trial after an ejection. What comes after it is compared with
// what was before it.
func passing(s upstream.Status) bool {
	return s.Reason == upstream.Backoff || s.Reason == upstream.Probation
}

// Monitor tells of transitions.
type Monitor struct {
	// Logger gets a line for each event. Nil: none.
	Logger *zap.Logger
	// OnChange is called with each transition that is an event. It must not block, and must not call back into the
	// endpoint's State. Nil: nothing is called.
	OnChange func(Transition)
}

// Attend tells of an endpoint's transitions until stop is called. It is a cluster.Companion; it should be the first, so
// that it hears what the others do.
func (m *Monitor) Attend(info *upstream.Endpoint, end *transport.Endpoint) (stop func()) {
	info.State.Found(time.Now())
	var mu sync.Mutex
	known := info.State.Status()
	if known.Reason == upstream.Backoff {
		known = upstream.Status{} // what it was before that, nobody knows any more
	}
	return info.State.WatchStatus(func(_, to upstream.Status) {
		if passing(to) {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		t := Transition{info, known, to}
		known = to
		m.tell(t)
	})
}

func (m *Monitor) tell(t Transition) {
	event := t.Event()
	if event == "" {
		return
	}
	if m.Logger != nil {
		fields := []zap.Field{zap.String("upstream", t.Endpoint.Address), zap.String("condition", t.To.Condition.String()), zap.String("before", t.From.Condition.String())}
		if t.To.Text != "" {
			fields = append(fields, zap.String("reason", t.To.Text))
		}
		if !t.From.Since.IsZero() {
			fields = append(fields, zap.Duration("after", t.To.Since.Sub(t.From.Since)))
		}
		switch event {
		case EventUnhealthy, EventEjected:
			m.Logger.Warn("upstream "+event, fields...)
		default:
			m.Logger.Info("upstream "+event, fields...)
		}
	}
	if m.OnChange != nil {
		m.OnChange(t)
	}
}
