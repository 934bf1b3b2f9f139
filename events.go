package grpcproxy

import (
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"

	"github.com/caddygrpc/caddy-grpc-proxy/healthcheck"
)

// events passes changes of upstreams' health on to Caddy's events app, in their order. Handlers of events may take their
// time, which whoever found the change must not wait for.
type events struct {
	app *caddyevents.App // nil: nobody is told
	ctx caddy.Context

	mu      sync.Mutex
	queue   []healthcheck.Transition
	running bool
}

// maxEvents bounds how many events wait for handlers that are too slow; the oldest are dropped.
const maxEvents = 4096

// tell is called when an upstream's health has changed.
func (e *events) tell(t healthcheck.Transition) {
	if e.app == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.queue) == maxEvents {
		e.queue = e.queue[1:]
	}
	e.queue = append(e.queue, t)
	if !e.running {
		e.running = true
		go e.emit()
	}
}

func (e *events) emit() {
	for {
		e.mu.Lock()
		if len(e.queue) == 0 {
			e.running = false
			e.mu.Unlock()
			return
		}
		t := e.queue[0]
		e.queue = e.queue[1:]
		e.mu.Unlock()
		e.app.Emit(e.ctx, t.Event(), map[string]any{
			"upstream":  t.Endpoint.Address,
			"origin":    t.Endpoint.Origin,
			"condition": t.To.Condition.String(),
			"before":    t.From.Condition.String(),
			"reason":    t.To.Text,
			"since":     t.To.Since,
		})
	}
}
