package transport

import (
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// backoff is the wait after failed dials, and after connections that ended before they were of use. It doubles from 100 ms
// to 10 s, ×[0.8, 1.2]: shorter than gRPC's 1 s to 120 s, since a proxy has other endpoints to send the call to and should see
// soon that this one is back.
type backoff struct {
	// failures is how many there were in a row. The series goes on until a connection has proved itself.
	failures int
	since    time.Time // of the first failure
	told     string    // why, as it was logged last
	until    time.Time // no dial before; zero if there may be one
	last     *Error    // why there is no connection, nil once there is one
	// paused: last is the end of a connection. That the endpoint can be connected to is known, so calls may wait until it is.
	paused bool
	barred bool        // the endpoint takes no calls because of this
	timer  *time.Timer // dials at due
	due    time.Time
}

// proofTime is how long a connection lives that proves itself without having completed a stream.
const proofTime = 10 * time.Second

// proven tells whether the connection was, or is, of use.
func (c *conn) proven() bool {
	return time.Since(c.made) >= proofTime || c.Stats().Completed > 0
}

func (b *backoff) activeLocked() bool { return time.Now().Before(b.until) }

func (b *backoff) resetLocked() {
	if b.timer != nil {
		b.timer.Stop()
	}
	*b = backoff{}
}

// endLocked ends the series of delays. The next failure begins another outage, which is told of, whatever its reason.
func (b *backoff) endLocked() { b.failures, b.told = 0, "" }

// delay is the wait after the n-th failure in a row, n from 1, before jitter.
func backoffDelay(n int) time.Duration {
	if n > 7 {
		return backoffMax
	}
	return min(backoffBase<<(n-1), backoffMax)
}

// delayLocked notes a failure and puts the next dial off.
func (e *Endpoint) delayLocked(err *Error) {
	b := &e.backoff
	for _, c := range *e.conns.Load() {
		if b.failures > 0 && c.proven() {
			b.endLocked()
		}
	}
	if b.failures++; b.failures == 1 {
		b.since = time.Now()
	}
	wait := jitter(backoffDelay(b.failures), 0.2)
	b.last, b.until = err, time.Now().Add(wait)
	level := zap.DebugLevel
	why := err.Text()
	if err.Kind == KindNotHTTP2 {
		why = "not HTTP/2" // the text quotes an answer, which may have a date in it
	}
	if why != b.told {
		level = zap.WarnLevel // what is new; the rest is repetition
		b.told = why
	}
	if c := e.logger.Load().Check(level, "cannot connect to upstream"); c != nil {
		c.Write(zap.String("upstream", e.Address()), zap.Error(err), zap.Int("failures", b.failures), zap.Duration("next_dial_in", wait))
	}
}

// dialFailedLocked puts the endpoint into backoff and, if it has no connection, turns away who waits for one.
func (e *Endpoint) dialFailedLocked(err *Error) {
	if e.released {
		e.failQueueLocked(err)
		e.restLocked()
		return
	}
	e.delayLocked(err)
	e.backoff.paused = false
	e.wakeUpLocked()
	if len(*e.conns.Load()) > 0 {
		e.trimLocked() // the connections there are still serve, and who waits for them may wait on, as far as there is a queue
		return
	}
	e.barLocked(err)
	e.failQueueLocked(err)
}

// barLocked keeps new calls away from the endpoint. Where clients have connections of their own, what an upstream does with one
// of these says nothing about the others, only that it cannot be reached at all, if nobody has a connection.
func (e *Endpoint) barLocked(err *Error) {
	if p := e.clients.parent; p == nil || err.unreached && p.clients.connected.Load() == 0 && p.Conns() == 0 {
		e.backoff.barred = true
		e.mu.changed(e.link.SetBackoff(true))
	}
}

// wakeUpLocked has the next dial made when the wait is over.
func (e *Endpoint) wakeUpLocked() {
	b := &e.backoff
	if b.due.Equal(b.until) {
		return
	}
	if b.timer != nil {
		b.timer.Stop()
	}
	b.due = b.until
	b.timer = time.AfterFunc(time.Until(b.until), e.backoffOver)
}

// dialledLocked ends the backoff, but not the series of delays: the connection has to prove itself.
func (e *Endpoint) dialledLocked(conns int) {
	b := &e.backoff
	if b.failures > 0 && b.last != nil {
		e.logger.Load().Info("connected to upstream again", zap.String("upstream", e.Address()),
			zap.Int("failures", b.failures), zap.Duration("after", time.Since(b.since)))
	} else {
		e.logger.Load().Debug("connected", zap.String("upstream", e.Address()), zap.Int("connections", conns))
	}
	if b.timer != nil {
		b.timer.Stop()
	}
	b.due = time.Time{}
	b.until, b.last, b.paused, b.barred, b.timer = time.Time{}, nil, false, false, nil
	e.mu.changed(e.link.SetBackoff(false))
}

// lostLocked handles the end of a connection that the upstream has ended, or is ending. It is replaced if it was the last and
// was of use, so that the next call finds another one ready, and an endpoint that is down is known to be before the next call
// meets it; but not without a pause if it ended as soon as it was made. A replacement that nobody used is not replaced, so that
// a server which closes idle connections is not dialled for ever.
func (e *Endpoint) lostLocked(c *conn, err *h2.Error) {
	if e.released {
		if len(e.line.waiters) > 0 {
			e.startDialLocked()
		}
		return
	}
	if c.proven() {
		e.backoff.endLocked()
		e.replaceLocked(c)
		return
	}
	e.delayLocked(e.dialError(KindDial, endedSoonError{err}))
	b := &e.backoff
	b.paused = true
	switch {
	case e.neededLocked(c):
		if len(*e.conns.Load()) == 0 {
			e.barLocked(b.last)
		}
		e.wakeUpLocked()
	case e.clients.parent != nil:
		e.wakeUpLocked() // the part is forgotten then
	default:
		b.last = nil // nobody has missed it
	}
}

// backoffOver dials again. The endpoint takes no calls before that has succeeded; of a client's part nobody may ever want to
// know again.
func (e *Endpoint) backoffOver() {
	e.mu.Lock()
	b := &e.backoff
	over := !e.released && !b.until.IsZero() && !b.activeLocked() // else it is an earlier wait that is over
	if over {
		b.until = time.Time{}
		switch {
		case e.clients.parent == nil || len(e.line.waiters) > 0:
			e.startDialLocked()
		case b.barred:
			b.barred = false
			e.mu.changed(e.link.SetBackoff(false))
		}
	}
	unused := over && e.unusedLocked()
	e.mu.Unlock()
	if unused {
		e.leaveParent()
	}
}

// askEvery is the least time between dials that calls ask for.
const askEvery = time.Second

// Ask is for a call that finds no usable endpoint: the endpoint is dialled, if the last dial did not begin within the last
// second. Ask tells whether there is something to wait for.
func (e *Endpoint) Ask() (worthwhile bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	b := &e.backoff
	switch next := e.dialled.Add(askEvery); {
	case e.released || e.dialing || len(*e.conns.Load()) > 0:
		return true
	case !b.activeLocked() || !time.Now().Before(next):
		b.until = time.Time{}
		e.startDialLocked()
		return true
	case next.Before(b.until):
		b.until = next
		e.wakeUpLocked()
	}
	return b.paused
}

// Connect begins to make the first connection, unless that has failed lately. It returns false if that was begun before.
func (e *Endpoint) Connect() (begun bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.dialing || len(*e.conns.Load()) > 0 {
		return false
	}
	e.startDialLocked()
	return e.dialing
}

// Retry dials an endpoint without a connection now, even if it is in backoff. It is for who has reason to think that the
// endpoint is back, or asks so seldom that there is no harm in it.
func (e *Endpoint) Retry() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.released || e.dialing || len(*e.conns.Load()) > 0 {
		return
	}
	e.backoff.until = time.Time{}
	e.startDialLocked()
}

// Dialing tells whether a connection is being made.
func (e *Endpoint) Dialing() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.dialing
}

// LastError is why the last dial failed, nil if it did not. Clients' parts of the endpoint count as well.
func (e *Endpoint) LastError() *Error {
	e.mu.Lock()
	err := e.backoff.last
	e.mu.Unlock()
	if err != nil {
		return err
	}
	e.clients.mu.Lock()
	defer e.clients.mu.Unlock()
	for _, p := range e.clients.parts {
		if err := p.LastError(); err != nil {
			return err
		}
	}
	return nil
}

// Hopeful tells whether a connection to the endpoint may be there soon: one is being made, or will be.
func (e *Endpoint) Hopeful() bool {
	if e.cfg.ProxyProtocol != 0 && e.clients.parent == nil { // then only clients' parts are dialled
		e.clients.mu.Lock()
		defer e.clients.mu.Unlock()
		for _, p := range e.clients.parts {
			if p.Hopeful() {
				return true
			}
		}
		return e.clients.released
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	b := &e.backoff
	return e.released || e.dialing || len(*e.conns.Load()) > 0 || !b.activeLocked() || b.paused
}
