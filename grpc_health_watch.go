package grpcproxy

import "github.com/caddygrpc/caddy-grpc-proxy/grpcwire"

// watched is a name that calls wait for news about, shared by all of them.
type watched struct {
	calls int
	// The rest is under the Health's mu.
	status  grpcwire.ServingStatus
	known   bool          // status has been found out
	changed chan struct{} // closed and replaced when status changes
}

// watch begins to follow a name. unwatch is its counterpart.
func (h *Health) watch(name string) *watched {
	h.mu.Lock()
	w := h.names[name]
	if w == nil {
		w = &watched{changed: make(chan struct{})}
		h.names[name] = w
	}
	w.calls++
	if len(h.names) == 1 && w.calls == 1 {
		running.subscribe(h)
	}
	known := w.known
	h.mu.Unlock()
	if !known { // found out after subscribing, so that no change is missed
		status := h.report(name)
		h.mu.Lock()
		if !w.known { // else somebody has newer news
			w.status, w.known = status, true
		}
		h.mu.Unlock()
		h.lookAgain()
	}
	return w
}

func (h *Health) unwatch(name string, w *watched) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if w.calls--; w.calls == 0 {
		delete(h.names, name)
		if len(h.names) == 0 {
			running.unsubscribe(h)
		}
	}
}

// now is what is known about the name, and what is closed when that changes.
func (h *Health) now(w *watched) (grpcwire.ServingStatus, <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return w.status, w.changed
}

// lookAgain brings what is known about the watched names up to date. It does not block.
func (h *Health) lookAgain() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dirty = true
	if !h.looking && len(h.names) > 0 {
		h.looking = true
		go h.look()
	}
}

func (h *Health) look() {
	for {
		h.mu.Lock()
		if !h.dirty || len(h.names) == 0 {
			h.looking = false
			h.mu.Unlock()
			return
		}
		h.dirty = false
		shutdown := h.shutdown
		names := make([]string, 0, len(h.names))
		for name := range h.names {
			names = append(names, name)
		}
		h.mu.Unlock()

		// Before the reports: where calls are to end, those say why.
		_, _, up := running.look(h.app)
		for _, name := range names {
			h.set(name, h.report(name))
		}
		if shutdown && !up {
			h.end()
		}
	}
}

// set makes a status known to the calls that follow the name.
func (h *Health) set(name string, status grpcwire.ServingStatus) {
	h.mu.Lock()
	defer h.mu.Unlock()
	w := h.names[name]
	if w == nil || w.known && w.status == status {
		return
	}
	w.status, w.known = status, true
	close(w.changed)
	w.changed = make(chan struct{})
}

// end ends all calls that follow names.
func (h *Health) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-h.over:
	default:
		close(h.over)
	}
}

// onShutdown runs when the handler's server begins to shut down. If a newer configuration is running, calls that follow
// names go on and follow that one. Else Caddy exits, and waits for them.
func (h *Health) onShutdown() {
	h.mu.Lock()
	h.shutdown = true
	h.mu.Unlock()
	h.lookAgain()
}
