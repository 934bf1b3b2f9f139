package transport

import (
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// backoff is the wait after failed dials. It doubles from 100 ms to 10 s, ×[0.8, 1.2]: shorter than gRPC's 1 s to
// 120 s, since a proxy has other endpoints to send the call to and should see soon that this one is back.
type backoff struct {
	failures int
	since    time.Time // of the first failure
	told     string    // why, as it was logged last
	until    time.Time
	last     *Error
	timer    *time.Timer
	// wanted: a call was turned away meanwhile, so dial as soon as the wait is over.
	wanted bool
}

func (b *backoff) activeLocked() bool { return b.last != nil && time.Now().Before(b.until) }

func (b *backoff) resetLocked() {
	if b.timer != nil {
		b.timer.Stop()
	}
	*b = backoff{}
}

// delay is the wait after the n-th failure in a row, n from 1, before jitter.
func backoffDelay(n int) time.Duration {
	if n > 7 {
		return backoffMax
	}
	return min(backoffBase<<(n-1), backoffMax)
}

// dialFailedLocked puts the endpoint into backoff and, if it has no connection, turns away who waits for one.
func (e *Endpoint) dialFailedLocked(err *Error) {
	if e.released {
		return // nobody waits for it, and it was Destruct that ended the dial
	}
	b := &e.backoff
	if b.failures++; b.failures == 1 {
		b.since = time.Now()
	}
	wait := jitter(backoffDelay(b.failures), 0.2)
	b.last, b.until = err, time.Now().Add(wait)
	if b.timer != nil {
		b.timer.Stop()
	}
	b.timer = time.AfterFunc(wait, e.backoffOver)
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
	if len(*e.conns.Load()) > 0 {
		return // the connections there are still serve, and who waits for them may wait on
	}
	if len(e.queue) > 0 {
		b.wanted = true
	}
	e.State.Set(upstream.Backoff)
	e.failQueueLocked(err)
}

// dialledLocked ends the backoff.
func (e *Endpoint) dialledLocked(conns int) {
	if b := &e.backoff; b.failures > 0 {
		e.logger.Load().Info("connected to upstream again", zap.String("upstream", e.Address()),
			zap.Int("failures", b.failures), zap.Duration("after", time.Since(b.since)))
	} else {
		e.logger.Load().Debug("connected", zap.String("upstream", e.Address()), zap.Int("connections", conns))
	}
	e.backoff.resetLocked()
	e.State.Clear(upstream.Backoff)
}

// backoffOver makes the endpoint eligible again. If calls were turned away meanwhile, or wait for a further connection, it
// is dialled at once, so that it comes back without a call having to find out.
func (e *Endpoint) backoffOver() {
	e.mu.Lock()
	over := !e.released && e.backoff.last != nil
	if over {
		e.backoff.until = time.Time{}
		if e.backoff.wanted || e.keepers > 0 || len(e.queue) > 0 {
			e.backoff.wanted = false
			e.startDialLocked() // Backoff stays set until the dial succeeds
		} else {
			e.State.Clear(upstream.Backoff)
		}
	}
	unused := over && e.unusedLocked()
	e.mu.Unlock()
	if unused {
		e.leaveParent()
	}
}

// Want tells the endpoint that a call would have gone there, had it not been in backoff.
func (e *Endpoint) Want() {
	e.mu.Lock()
	e.backoff.wanted = true
	e.mu.Unlock()
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
