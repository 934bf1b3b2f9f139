package transport

import (
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Calls that wait for a stream are data: tickets in a line. While there are any, one goroutine per endpoint, serve, gives them the
// streams that become free. Connections only mark that something has changed (kick), since they must not be called back from
// their own callbacks; nobody's Opener is called with mu held.

func (e *Endpoint) refuseLocked(tickets []*Ticket, kind Kind, why error) {
	if len(tickets) > 0 {
		e.turnAwayLocked(tickets, e.refusal(kind, why))
	}
}

func (e *Endpoint) turnAwayLocked(tickets []*Ticket, err *Error) {
	for _, t := range tickets {
		e.mu.refused = append(e.mu.refused, refused{t, err})
	}
}

// park puts a call into the line, or returns why it does not.
func (e *Endpoint) park(t *Ticket) *Error {
	now := time.Now()
	t.come(now, e.limits.Load().queueTimeout)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.mayWaitLocked(t.Since); err != nil {
		return err
	}
	if full := len(*e.conns.Load()) > 0; !full || e.fullLocked() {
		e.startDialLocked()
		if full && !t.Queue {
			return e.refusal(KindElsewhere, errElsewhere)
		}
	}
	evicted, late, ok := e.line.admit(t, now, e.limitLocked())
	e.refuseLocked(evicted, KindQueueFull, errQueueFull)
	switch {
	case late:
		return e.refusal(KindQueueFull, errTooLate)
	case !ok:
		return e.refusal(KindQueueFull, errQueueFull)
	}
	e.parkedLocked()
	return nil
}

// parkedLocked sees to it that the line, which is longer now, is served.
func (e *Endpoint) parkedLocked() {
	e.lineChangedLocked()
	if e.shortLocked() {
		e.startDialLocked()
	}
	if !e.serving {
		e.serving = true
		go e.serve()
	}
	e.kick()
}

// lineChangedLocked is called whenever a call has come into the line, or has left it.
func (e *Endpoint) lineChangedLocked() {
	e.waiting.Store(int32(len(e.line.waiters)))
	if len(e.line.waiters) == 0 {
		if e.expiry != nil {
			e.expiry.Stop()
		}
		e.expires = time.Time{}
		return
	}
	if due := e.line.waiters[0].due; !due.Equal(e.expires) {
		e.expires = due
		if e.expiry == nil {
			e.expiry = time.AfterFunc(time.Until(due), e.expire)
		} else {
			e.expiry.Reset(time.Until(due))
		}
	}
}

// expire ends the wait of those whose time is over.
func (e *Endpoint) expire() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.expires = time.Time{}
	var late []*Ticket
	now := time.Now()
	for len(e.line.waiters) > 0 && !now.Before(e.line.waiters[0].due) {
		t := e.line.waiters[0]
		e.line.remove(t)
		late = append(late, t)
	}
	if len(late) > 0 {
		e.turnAwayLocked(late, e.noStream())
	}
	e.leftLocked()
}

// Leave takes a parked call back. It returns false if the call's Opener was told already, or is about to be.
func (e *Endpoint) Leave(t *Ticket) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.line.remove(t) {
		t.left = t.granting
		return false
	}
	e.leftLocked()
	return true
}

func (e *Endpoint) leftLocked() {
	e.lineChangedLocked()
	e.restLocked()
	e.kick()
}

// kick has the line looked at, if there is one.
func (e *Endpoint) kick() {
	select {
	case e.kicked <- struct{}{}:
	default: // that is about to be done
	}
}

// serve gives parked calls streams, until none is left.
func (e *Endpoint) serve() {
	for {
		e.mu.Lock()
		t, early := e.nextLocked(time.Now())
		over := t == nil && len(e.line.waiters) == 0
		if over {
			e.serving = false
			e.noteRoomLocked()
			e.restLocked()
		}
		e.mu.Unlock()
		switch {
		case over:
			return
		case t == nil:
			<-e.kicked
		default:
			e.grant(t, early)
		}
	}
}

// nextLocked takes the call whose turn it is out of the line, if there is room for one. early is the connection that it is to be
// sent on before its peer has spoken.
func (e *Endpoint) nextLocked(now time.Time) (t *Ticket, early *conn) {
	for n := e.freed.Swap(0); n > 0 && len(e.line.waiters) > 0; n-- {
		e.line.pace.passed(now)
	}
	if t = e.firstEarlyLocked(); t != nil {
		early, e.early = e.early, nil
		e.line.remove(t)
	} else if e.roomLocked(1) > 0 {
		var dropped []*Ticket
		t, dropped = e.line.next(now)
		e.refuseLocked(dropped, KindQueueTimeout, errTooLate)
	}
	if t != nil {
		t.granting = true
		e.lineChangedLocked()
	}
	return t, early
}

// firstEarlyLocked is the first call that may be sent on the connection whose peer is silent, if there is such a one.
func (e *Endpoint) firstEarlyLocked() *Ticket {
	if e.early != nil {
		for _, t := range e.line.waiters {
			if t.Early {
				return t
			}
		}
	}
	return nil
}

// grant opens the call's stream.
func (e *Endpoint) grant(t *Ticket, early *conn) {
	fields, end, recv := t.Head()
	s, err := e.openFor(early, fields, end, recv)

	e.mu.Lock()
	left := t.left
	t.granting, t.left = false, false
	if s == nil && err == nil {
		switch err = e.mayWaitLocked(t.Since); {
		case left:
			err = e.gaveUp()
		case err == nil: // somebody was faster: it keeps its place
			t.Early = t.Early && early == nil
			e.line.insert(t, time.Now())
			e.parkedLocked()
			e.mu.Unlock()
			return
		}
	}
	e.mu.Unlock()
	if s != nil {
		t.Opened(s)
	} else {
		t.Refused(err)
	}
}

func (e *Endpoint) openFor(early *conn, fields []h2.Field, end bool, recv h2.Receiver) (*h2.Stream, *Error) {
	if early != nil {
		return e.openOn(early, fields, end, recv)
	}
	return e.tryOpen(fields, end, recv)
}

// silentAfter is how long a new connection's peer may say nothing before a call is sent there early (see Ticket.Early): some
// servers send their SETTINGS with the first answer.
const silentAfter = 500 * time.Millisecond

// silent lets one call be sent early on the connection.
func (e *Endpoint) silent(c *conn) {
	e.mu.Lock()
	e.early = c
	e.mu.Unlock()
	e.kick()
}

// newStreams is how many streams a new connection brings, as long as its peer has not said so: RFC 9113 section 6.5.2
// advises servers not to allow fewer than 100.
const newStreams = 100

// limitLocked is how many calls may wait. Those for which there is a stream, or for which a connection is being made, do not
// count.
func (e *Endpoint) limitLocked() int {
	limit := max(e.limits.Load().queueSize, 0)
	if conns := len(*e.conns.Load()); e.dialing || conns == 0 || e.released {
		limit = max(limit, e.bringsLocked())
	}
	return limit + e.roomLocked(len(e.line.waiters)+1)
}

// bringsLocked is how many calls a new connection can take at first.
func (e *Endpoint) bringsLocked() int {
	if most := e.cfg.MaxStreamsPerConn; most > 0 {
		return int(min(most, newStreams))
	}
	return newStreams
}

// shortLocked tells whether more calls wait than there are streams for.
func (e *Endpoint) shortLocked() bool {
	n := len(e.line.waiters)
	return n > 0 && e.roomLocked(n) < n
}

// mayWaitLocked tells whether a call that has looked for a stream since then may wait, or why not: after a failed dial nothing is
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

// Room is how many calls could be sent now, beside those that wait, and how many have a place, if only in the line; most if these
// are more. Without a connection, room is what a new one may bring.
func (e *Endpoint) Room(most int) (room, places int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := len(e.line.waiters)
	if room = e.bringsLocked(); len(*e.conns.Load()) > 0 {
		room = e.roomLocked(most + n)
	}
	room = min(max(room-n, 0), most)
	return room, min(max(e.limitLocked()-n, room), most)
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
		e.mu.changed(e.link.SetRoom(true))
	}
	return false
}

// noteRoomLocked notes that there is room again, if there is more than those who wait need. A client's part has no say in that.
func (e *Endpoint) noteRoomLocked() {
	if e.clients.parent == nil && e.link.Has(upstream.NoRoom) && len(e.line.waiters) == 0 && e.roomLocked(1) > 0 {
		e.mu.changed(e.link.SetRoom(true))
	}
}

// trimLocked turns away those that are too many when no connection is being made for them any more.
func (e *Endpoint) trimLocked() {
	e.refuseLocked(e.line.trim(e.limitLocked()), KindQueueFull, errQueueFull)
	e.lineChangedLocked()
	e.kick()
}

func (e *Endpoint) failQueueLocked(err *Error) {
	e.turnAwayLocked(e.line.trim(0), err)
	e.lineChangedLocked()
	e.kick()
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
