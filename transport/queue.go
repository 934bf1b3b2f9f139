package transport

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// waiter is a call that waits for a stream. It gets nil when it is its turn to try again, or the error that ends its
// wait.
type waiter struct{ turn chan *Error }

// openSlow is Open when no connection has room at first sight.
func (e *Endpoint) openSlow(c Caller, done <-chan struct{}, deadline time.Time, fields []h2.Field, end bool, recv h2.Receiver) (*h2.Stream, *Error) {
	var (
		w     *waiter
		timer *time.Timer
	)
	for {
		// Without mu: a connection may call back from OpenStream.
		if w != nil {
			refresh(c, fields)
		}
		if w != nil || e.waiting.Load() == 0 {
			if s, err := e.tryOpen(fields, end, recv); s != nil || err != nil {
				if w != nil && err != nil {
					e.capacity() // its turn goes to the next
				}
				return s, err
			}
		}
		e.mu.Lock()
		if err := e.mayWaitLocked(w != nil); err != nil {
			e.mu.Unlock()
			if err.Kind == KindLocal {
				return e.openReleased(c, done, deadline, fields, end, recv)
			}
			return nil, err
		}
		if w == nil {
			w = &waiter{turn: make(chan *Error, 1)}
			e.queue = append(e.queue, w)
		} else { // it was its turn, but somebody was faster: it stays first
			e.queue = slices.Insert(e.queue, 0, w)
		}
		e.waiting.Store(int32(len(e.queue)))
		e.wakeLocked()
		if len(e.queue) > 0 {
			e.startDialLocked()
		}
		e.mu.Unlock()

		if timer == nil {
			wait := e.cfg.QueueTimeout
			if !deadline.IsZero() {
				wait = time.Until(deadline)
			}
			timer = time.NewTimer(wait)
			defer timer.Stop()
		}
		select {
		case err := <-w.turn:
			if err != nil && err.Kind == KindLocal {
				return e.openReleased(c, done, deadline, fields, end, recv)
			}
			if err != nil {
				return nil, err
			}
			select {
			case <-done: // its turn and its end came together: do not send what nobody waits for
				e.leave(w)
				return nil, e.gaveUp()
			default:
			}
		case <-done:
			e.leave(w)
			return nil, e.gaveUp()
		case <-timer.C:
			e.leave(w)
			return nil, &Error{Kind: KindQueueTimeout, Side: SideInternal, Unprocessed: true, Endpoint: e.Address(), Err: fmt.Errorf("no stream became free on the %d connections to the upstream in time", e.Conns())}
		}
	}
}

func (e *Endpoint) gaveUp() *Error {
	return &Error{Kind: KindCanceled, Side: SideDownstream, Unprocessed: true, Endpoint: e.Address(), Err: errors.New("the client gave up")}
}

// mayWaitLocked tells whether a call may queue, or why not.
func (e *Endpoint) mayWaitLocked(again bool) *Error {
	switch {
	case e.released:
		return e.releasedError()
	case len(*e.conns.Load()) == 0 && !e.dialing && e.backoff.activeLocked():
		e.backoff.wanted = true
		last := e.backoff.last
		return &Error{Kind: KindBackoff, Unprocessed: true, Endpoint: e.Address(), Err: errBackoff(last)}
	case !again && len(e.queue) >= e.cfg.QueueSize:
		return &Error{Kind: KindQueueFull, Side: SideInternal, Unprocessed: true, Endpoint: e.Address(), Err: errQueueFull}
	}
	return nil
}

// wakeLocked gives their turn to as many waiters as there is room for now.
func (e *Endpoint) wakeLocked() {
	if len(e.queue) == 0 {
		return
	}
	room := 0
	for _, c := range *e.conns.Load() {
		room += c.Available()
	}
	n := min(room, len(e.queue))
	woken := e.queue[:n:n]
	e.queue = e.queue[n:]
	e.waiting.Store(int32(len(e.queue)))
	for _, w := range woken {
		w.turn <- nil
	}
}

func (e *Endpoint) failQueueLocked(err *Error) {
	woken := e.queue
	e.queue = nil
	e.waiting.Store(0)
	for _, w := range woken {
		w.turn <- err
	}
}

// leave takes a waiter out of the queue; if its turn had come just then, the turn goes to the next.
func (e *Endpoint) leave(w *waiter) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if i := slices.Index(e.queue, w); i >= 0 {
		e.queue = slices.Delete(e.queue, i, i+1)
		e.waiting.Store(int32(len(e.queue)))
		return
	}
	e.wakeLocked()
}

// openReleased serves a call of a configuration that is gone: on a connection of its own, which closes with the
// stream.
func (e *Endpoint) openReleased(caller Caller, done <-chan struct{}, deadline time.Time, fields []h2.Field, end bool, recv h2.Receiver) (*h2.Stream, *Error) {
	ctx, cancel := doneContext(done, deadline)
	defer cancel()
	c, err := e.dial(ctx, h2.Config{
		MaxHeaderListSize: e.cfg.MaxHeaderListSize,
		PingInterval:      max(e.cfg.PingInterval, 0),
		PingTimeout:       e.cfg.PingTimeout,
	})
	if err != nil {
		select {
		case <-done:
			return nil, e.gaveUp()
		default:
			return nil, err
		}
	}
	refresh(caller, fields)
	s, herr := c.OpenStream(fields, end, recv)
	if herr != nil {
		c.Close(h2.NoError, "")
		return nil, FromStream(herr, e.Address())
	}
	c.Shutdown()
	return s, nil
}
