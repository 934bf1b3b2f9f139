package healthcheck

import (
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

// Transition is a change of an endpoint's condition.
type Transition struct {
	// Endpoint is the endpoint as its source described it when it came.
	Endpoint *upstream.Endpoint
	From, To upstream.Status
}

// Event names the transition: healthy, unhealthy, ejected, readmitted or drained. It is empty for those that are no event:
// an endpoint that waits for its first answer, one that comes back from an ejection on trial, and one that cannot be
// connected to, which comes and goes with each try and is logged with the connections.
func (t *Transition) Event() string {
	from, to := t.From, t.To
	switch to.Condition {
	case upstream.ConditionUnhealthy:
		if to.Reason == upstream.Backoff {
			return ""
		}
		return EventUnhealthy
	case upstream.ConditionEjected:
		if to.Reason == upstream.Probation {
			return ""
		}
		return EventEjected
	case upstream.ConditionDraining:
		return EventDrained
	case upstream.ConditionConnecting:
		return ""
	default: // healthy, warming
		switch {
		case from.Condition == upstream.ConditionEjected:
			return EventReadmitted
		case from.Reason == upstream.Backoff:
			return ""
		}
		return EventHealthy
	}
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
	end.State.Found(time.Now())
	return end.State.WatchStatus(func(from, to upstream.Status) { m.changed(Transition{info, from, to}) })
}

func (m *Monitor) changed(t Transition) {
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
