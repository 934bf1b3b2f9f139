package transport

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// Opener is a call that wants a stream. Its methods run with no lock of the transport held. They must not block.
type Opener interface {
	// Head returns the request's head, whether it ends the request, and who receives the answer: see h2.Conn.OpenStream. It is
	// asked for at the moment at which there is a stream, so that the time which the head says is left is right; once more if
	// somebody was faster.
	Head() (fields []h2.Field, end bool, recv h2.Receiver)
	// Opened gives a parked call its stream. HEADERS are queued and not flushed. The receiver may have heard of the stream
	// before.
	Opened(s *h2.Stream)
	// Refused ends the wait of a parked call without a stream.
	Refused(err *Error)
}

// Ticket is a call's request for a stream and, while it is parked, its place in the line. It may be used for one request after
// the other, at any endpoint.
type Ticket struct {
	Opener
	// Deadline is when the call is over. Without one it waits for Config.QueueTimeout from Since on.
	Deadline time.Time
	// Since is when the call began to look for a stream, at however many endpoints. Default: when it is parked.
	Since time.Time
	// Client is whose call it is. Where many wait, each client has its share of the places.
	Client netip.Addr
	// Queue: the call waits also where all streams of all connections are taken. Else it gets an error of KindElsewhere there.
	Queue bool
	// Early: there is no better endpoint, so the call may be sent before a new connection's peer has sent its SETTINGS, if that
	// takes long. RFC 9113 section 3.4: "clients are permitted to send additional frames to the server immediately after sending
	// the client connection preface, without waiting to receive the server connection preface". It counts as sent then.
	Early bool

	// Guarded by the mu of the endpoint where it is parked.

	due      time.Time // Deadline, or what stands in for it
	bound    bool      // due is the call's deadline, by which it has to be answered, too
	seq      uint64    // in the order in which they came
	granting bool      // out of the line, and about to be told
	left     bool      // given up meanwhile
}

// come begins the wait of a call that would wait for that long if it had no deadline.
func (t *Ticket) come(now time.Time, patience time.Duration) {
	if t.Since.IsZero() {
		t.Since = now
	}
	t.seq = 0
	if t.due, t.bound = t.Deadline, !t.Deadline.IsZero(); !t.bound {
		t.due = t.Since.Add(patience)
	}
}

func (t *Ticket) before(v *Ticket) bool {
	if !t.due.Equal(v.due) {
		return t.due.Before(v.due)
	}
	return t.seq < v.seq
}

// Open opens a stream: on the oldest connection with room, else on one dialled for it. HEADERS are queued and not flushed. It
// does not wait: where there is no stream yet it parks the call, the one with the earliest deadline first, and returns neither
// stream nor error. The ticket's Opener is told then, once, unless Leave takes the call back before. An error is always
// Unprocessed: nothing was sent.
func (e *Endpoint) Open(t *Ticket) (*h2.Stream, *Error) {
	if e.waiting.Load() == 0 {
		if s, err := e.tryOpen(t.Head()); s != nil || err != nil {
			return s, err
		}
	}
	return nil, e.park(t)
}

// tryOpen opens a stream on one of the connections. Where none has room it returns neither stream nor error; an error means
// that to wait does not help. Connections whose window is nearly used up by streams that stall come last: another was dialled
// when they became so (nearlyFull).
func (e *Endpoint) tryOpen(fields []h2.Field, end bool, recv h2.Receiver) (*h2.Stream, *Error) {
	conns := *e.conns.Load()
	for _, tight := range [...]bool{false, true} {
		for _, c := range conns {
			if c.Tight() != tight {
				continue
			}
			if s, err := e.openOn(c, fields, end, recv); s != nil || err != nil {
				return s, err
			}
		}
	}
	return nil, nil
}

func (e *Endpoint) openOn(c *conn, fields []h2.Field, end bool, recv h2.Receiver) (*h2.Stream, *Error) {
	s, err := c.OpenStream(fields, end, recv)
	switch {
	case err == nil:
		if !c.used.Load() {
			c.used.Store(true)
		}
		return s, nil
	case err.Kind == h2.KindHeaderListSize:
		return nil, FromStream(err, e.Address())
	}
	return nil, nil
}

// OpenWait is Open for those who have a goroutine to wait with. It gives up when ctx ends.
func (e *Endpoint) OpenWait(ctx context.Context, fields []h2.Field, end bool, recv h2.Receiver) (*h2.Stream, *Error) {
	w := &sleeper{fields: fields, end: end, recv: recv, told: make(chan opened, 1)}
	deadline, _ := ctx.Deadline()
	t := &Ticket{Opener: w, Deadline: deadline, Queue: true}
	if s, err := e.Open(t); s != nil || err != nil {
		return s, err
	}
	select {
	case o := <-w.told:
		return o.stream, o.err
	case <-ctx.Done():
	}
	if !e.Leave(t) {
		if o := <-w.told; o.stream != nil { // both came together: do not send what nobody waits for
			o.stream.Reset(h2.Cancel)
		}
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, e.noStream()
	}
	return nil, e.gaveUp()
}

// sleeper is the Opener of a goroutine.
type sleeper struct {
	fields []h2.Field
	end    bool
	recv   h2.Receiver
	told   chan opened
}

type opened struct {
	stream *h2.Stream
	err    *Error
}

// Head implements Opener.
func (w *sleeper) Head() ([]h2.Field, bool, h2.Receiver) { return w.fields, w.end, w.recv }

// Opened implements Opener.
func (w *sleeper) Opened(s *h2.Stream) { w.told <- opened{stream: s} }

// Refused implements Opener.
func (w *sleeper) Refused(err *Error) { w.told <- opened{err: err} }

func (e *Endpoint) refusal(kind Kind, err error) *Error {
	return &Error{Kind: kind, Side: SideInternal, Unprocessed: true, Endpoint: e.Address(), Err: err}
}

func (e *Endpoint) noStream() *Error {
	return e.refusal(KindQueueTimeout, fmt.Errorf("no stream became free on the %d connections to the upstream in time", e.Conns()))
}

func (e *Endpoint) gaveUp() *Error {
	return &Error{Kind: KindCanceled, Side: SideDownstream, Unprocessed: true, Endpoint: e.Address(), Err: errors.New("the client gave up")}
}
