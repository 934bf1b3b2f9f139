package transport

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Client is implemented by callers that act for a client, which gets its share of the places to wait.
type Client interface {
	// Client is who it is.
	Client() netip.Addr
}

// Choosy is implemented by callers that may find another endpoint instead of waiting for this one.
type Choosy interface {
	// Since is when the caller began to look for a stream. Without a deadline it waits for Config.QueueTimeout from then on, at
	// however many endpoints.
	Since() time.Time
	// Patience is asked when Open has to wait: for a stream, if all are taken (full), or else for a connection that is being
	// made since so long. limited: Open returns an error of KindElsewhere if there is no stream after d; but if all are taken
	// it is asked again before that, with how long it has waited, and if d is not 0 then, the call keeps its place.
	Patience(full bool, since time.Duration) (d time.Duration, limited bool)
	// Early is asked, when a new connection's peer is silent, whether the call may be sent before its SETTINGS have come (RFC
	// 9113 section 3.4), for lack of a better endpoint. It counts as sent then.
	Early() bool
}

// openSlow is Open when no connection has room at first sight.
func (e *Endpoint) openSlow(c Caller, fields []h2.Field, end bool, recv h2.Receiver) (*h2.Stream, *Error) {
	done, deadline := c.Wait()
	choosy, _ := c.(Choosy)
	var client netip.Addr
	if c, ok := c.(Client); ok {
		client = c.Client()
	}
	came := time.Now()
	since := came
	if choosy != nil {
		since = choosy.Since()
	}
	w := newWaiter(deadline, since.Add(e.limits.Load().queueTimeout), client)
	var (
		timer *time.Timer
		limit time.Duration
		stays bool // in the line
	)
	for again := false; ; again = true {
		// Without mu: a connection may call back from OpenStream.
		if again && !stays {
			refresh(c, fields)
		}
		if !stays && (again || e.waiting.Load() == 0) {
			if s, err := e.tryOpen(fields, end, recv); s != nil || err != nil {
				if again && err != nil {
					e.capacity() // its turn goes to the next
				}
				return s, err
			}
		}
		if !stays {
			var err *Error
			if limit, err = e.queue(w, again, choosy, since); err != nil {
				return nil, err
			}
		}
		stays = false
		wait := time.Until(w.due)
		hurried := limit < wait
		if hurried {
			wait = limit
		}
		if timer == nil {
			timer = time.NewTimer(wait)
			defer timer.Stop()
		} else {
			timer.Reset(wait)
		}
		select {
		case err := <-w.turn:
			if err != nil {
				return nil, err
			}
			select {
			case <-done: // its turn and its end came together: do not send what nobody waits for
				e.leave(w)
				return nil, e.gaveUp()
			default:
			}
			if w.early != nil {
				refresh(c, fields)
				if s, err := e.openEarly(w, choosy, fields, end, recv); s != nil || err != nil {
					return s, err
				}
			}
		case <-done:
			e.leave(w)
			return nil, e.gaveUp()
		case <-timer.C:
			if hurried {
				if limit, stays = e.stays(choosy, time.Since(came)); stays {
					continue
				}
			}
			e.leave(w)
			if hurried {
				return nil, e.refusal(KindElsewhere, errElsewhere)
			}
			return nil, e.refusal(KindQueueTimeout, fmt.Errorf("no stream became free on the %d connections to the upstream in time", e.Conns()))
		}
	}
}

// stays asks a call that waits for a stream whether it goes on waiting here, and for how long.
func (e *Endpoint) stays(choosy Choosy, waited time.Duration) (d time.Duration, ok bool) {
	if e.Conns() == 0 {
		return 0, false
	}
	d, limited := choosy.Patience(true, waited)
	if !limited {
		d = math.MaxInt64
	}
	return d, d > 0
}

// queue puts the call into the line. It returns how long it waits there at most, or why it does not.
func (e *Endpoint) queue(w *waiter, again bool, choosy Choosy, since time.Time) (limit time.Duration, _ *Error) {
	limit = math.MaxInt64
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.mayWaitLocked(since); err != nil {
		return 0, err
	}
	full := len(*e.conns.Load()) > 0
	if !again && (!full || e.fullLocked()) {
		e.startDialLocked()
		if full && choosy != nil {
			if d, limited := choosy.Patience(true, 0); limited && d == 0 {
				return 0, e.refusal(KindElsewhere, errElsewhere)
			}
		}
	}
	now := time.Now()
	if !again {
		evicted, late, ok := e.line.admit(w, now, e.limitLocked())
		e.refuseLocked(evicted, KindQueueFull, errQueueFull)
		switch {
		case late:
			return 0, e.refusal(KindQueueFull, errTooLate)
		case !ok:
			return 0, e.refusal(KindQueueFull, errQueueFull)
		}
	} else { // it was its turn, but somebody was faster: it keeps its place
		e.line.insert(w, now)
	}
	e.waiting.Store(int32(len(e.line.waiters)))
	e.wakeLocked(false)
	if len(e.line.waiters) > 0 {
		e.startDialLocked()
	}
	if choosy != nil {
		since := time.Duration(0)
		if e.dialing {
			since = now.Sub(e.dialled)
		}
		if d, limited := choosy.Patience(full, since); limited {
			limit = d
		}
	}
	return limit, nil
}

// newStreams is how many streams a new connection brings, as long as its peer has not said so: RFC 9113 section 6.5.2
// advises servers not to allow fewer than 100.
const newStreams = 100

// limitLocked is how many calls may wait. Those for which a connection is being made do not count.
func (e *Endpoint) limitLocked() int {
	limit := max(e.limits.Load().queueSize, 0)
	if conns := len(*e.conns.Load()); e.dialing || conns == 0 || e.released {
		n := newStreams
		if most := e.cfg.MaxStreamsPerConn; most > 0 {
			n = int(min(most, newStreams))
		}
		limit = max(limit, n)
	}
	return limit
}

func (e *Endpoint) refusal(kind Kind, err error) *Error {
	return &Error{Kind: kind, Side: SideInternal, Unprocessed: true, Endpoint: e.Address(), Err: err}
}

func (e *Endpoint) gaveUp() *Error {
	return &Error{Kind: KindCanceled, Side: SideDownstream, Unprocessed: true, Endpoint: e.Address(), Err: errors.New("the client gave up")}
}

// mayWaitLocked tells whether a call that has looked for a stream since then may queue, or why not: after a failed dial nothing is
// to be expected soon. If that was begun for the call it is what the call gets, as if it had waited for it.
func (e *Endpoint) mayWaitLocked(since time.Time) *Error {
	b := &e.backoff
	switch {
	case len(*e.conns.Load()) > 0 || e.dialing || !b.activeLocked() || b.last == nil || b.paused:
		return nil
	case !e.dialled.Before(since):
		return b.last
	}
	return &Error{Kind: KindBackoff, Unprocessed: true, Endpoint: e.Address(), Err: errBackoff(b.last)}
}

// roomLocked is how many streams can be opened now, or most if these are more.
func (e *Endpoint) roomLocked(most int) (room int) {
	for _, c := range *e.conns.Load() {
		if room += min(c.Available(), most); room >= most { // the sum of all may be more than an int holds
			return most
		}
	}
	return room
}

// fullLocked notes, and returns, that all streams are taken: pickers pass the endpoint over while another has room.
func (e *Endpoint) fullLocked() bool {
	if e.clients.parent == nil {
		e.link.SetRoom(false)
	}
	// Only now it is looked: a stream that ends meanwhile either is seen here or sees what was noted.
	if e.roomLocked(1) == 0 {
		return true
	}
	if e.clients.parent == nil {
		e.link.SetRoom(true)
	}
	return false
}

// wakeLocked gives their turn to as many waiters as there is room for now. freed: since streams ended.
func (e *Endpoint) wakeLocked(freed bool) {
	n := len(e.line.waiters)
	room := e.roomLocked(n + 1)
	if n > 0 && room > 0 {
		now := time.Now()
		if freed {
			e.line.pace.passed(now)
		}
		for ; room > 0 && len(e.line.waiters) > 0; room-- {
			w, dropped := e.line.next(now)
			e.refuseLocked(dropped, KindQueueTimeout, errTooLate)
			w.turn <- nil
		}
		e.waiting.Store(int32(len(e.line.waiters)))
	}
	e.wakeEarlyLocked()
	if room > 0 && e.clients.parent == nil && e.link.Has(upstream.NoRoom) { // a client's part has no say in that
		e.link.SetRoom(true)
	}
}

func (e *Endpoint) refuseLocked(waiters []*waiter, kind Kind, why error) {
	for _, w := range waiters {
		w.turn <- e.refusal(kind, why)
	}
}

// trimLocked turns away those that are too many when no connection is being made for them any more.
func (e *Endpoint) trimLocked() {
	e.refuseLocked(e.line.trim(e.limitLocked()), KindQueueFull, errQueueFull)
	e.waiting.Store(int32(len(e.line.waiters)))
}

func (e *Endpoint) failQueueLocked(err *Error) {
	woken := e.line.trim(0)
	e.waiting.Store(0)
	for _, w := range woken {
		w.turn <- err
	}
}

// leave takes a waiter out of the queue; if its turn had come just then, the turn goes to the next.
func (e *Endpoint) leave(w *waiter) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.line.remove(w) {
		e.waiting.Store(int32(len(e.line.waiters)))
	} else {
		e.takeBackEarlyLocked(w)
		e.wakeLocked(false)
	}
	e.restLocked()
}

// Took tells how long a call took, from its stream on, that had waited for that. whole: it was answered, and not cut off
// before.
func (e *Endpoint) Took(d time.Duration, whole bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if t := &e.line.took; whole || d > time.Duration(*t) {
		t.add(d)
	}
}
