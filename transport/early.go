package transport

import (
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// silentAfter is how long a new connection's peer may say nothing before a call is sent there early, if it has no better
// endpoint: some servers send their SETTINGS with the first answer. RFC 9113 section 3.4: "clients are permitted to send
// additional frames to the server immediately after sending the client connection preface, without waiting to receive the
// server connection preface".
const silentAfter = 500 * time.Millisecond

// silent lets one call be sent early on the connection.
func (e *Endpoint) silent(c *conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.early = c
	e.wakeEarlyLocked()
}

// wakeEarlyLocked gives its turn to the first waiter that may want to be sent early.
func (e *Endpoint) wakeEarlyLocked() {
	if e.early == nil {
		return
	}
	for _, w := range e.line.waiters {
		if w.patient {
			continue
		}
		e.line.remove(w)
		e.waiting.Store(int32(len(e.line.waiters)))
		w.early, e.early = e.early, nil
		w.turn <- nil
		return
	}
}

// takeBackEarlyLocked lets another call be sent early in the place of one that was not.
func (e *Endpoint) takeBackEarlyLocked(w *waiter) {
	if e.dialing && w.early != nil {
		e.early = w.early
	}
	w.early = nil
}

// openEarly sends the call before the peer's SETTINGS, if the caller agrees. It returns neither stream nor error if the call
// waits on.
func (e *Endpoint) openEarly(w *waiter, choosy Choosy, fields []h2.Field, end bool, recv h2.Receiver) (*h2.Stream, *Error) {
	c := w.early
	if choosy == nil || !choosy.Early() {
		w.patient = true
		e.mu.Lock()
		e.takeBackEarlyLocked(w)
		e.wakeEarlyLocked()
		e.mu.Unlock()
		return nil, nil
	}
	w.early, w.patient = nil, true // there is one only; if it cannot be had, the call waits on
	c.used.Store(true)
	s, err := c.OpenStream(fields, end, recv)
	if err != nil && err.Kind == h2.KindHeaderListSize {
		return nil, FromStream(err, e.Address())
	}
	return s, nil
}
