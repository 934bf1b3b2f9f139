package backendtest

import (
	"context"
	"crypto/tls"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// Call is a call of the service as the backend saw it arrive.
type Call struct {
	// Context is the call's context. It has ended when the call has.
	Context context.Context
	// Method is the whole method, "/grpc.testing.TestService/UnaryCall".
	Method string
	// Metadata is the request's. Its values must not be changed.
	Metadata metadata.MD
	// Authority is the :authority of the call.
	Authority string
	// Peer is the other end of the connection; TLS its state, nil without TLS.
	Peer net.Addr
	TLS  *tls.ConnectionState
	// Start is when the call was handed to us. Timeout is how long its deadline was away then; HasDeadline tells
	// whether there was one.
	Start       time.Time
	Timeout     time.Duration
	HasDeadline bool
}

// Cancellation tells that a call was over for its client before the backend had answered it.
type Cancellation struct {
	Call *Call
	// At is when the backend learned of it.
	At time.Time
	// Err is context.DeadlineExceeded if the call's deadline had passed by then, as the backend knew it, and else
	// context.Canceled: the client ended the call, or the connection broke.
	Err error
}

// Counts are numbers of calls by whole method.
type Counts map[string]int64

// Of is the number of calls of a method, given by its name alone ("UnaryCall", "Check").
func (c Counts) Of(method string) int64 {
	var n int64
	for m, count := range c {
		if strings.HasSuffix(m, "/"+method) {
			n += count
		}
	}
	return n
}

// Total is the number of calls of [Service]; those of health and reflection do not count.
func (c Counts) Total() int64 {
	var n int64
	for m, count := range c {
		if strings.HasPrefix(m, "/"+Service+"/") {
			n += count
		}
	}
	return n
}

// recorder keeps what is known of calls.
type recorder struct {
	counts map[string]*atomic.Int64 // By method; not changed once it is filled.
	active atomic.Int64
	last   atomic.Pointer[Call]
}

func (r *recorder) init(services map[string]grpc.ServiceInfo) {
	r.counts = make(map[string]*atomic.Int64)
	for name, info := range services {
		for _, m := range info.Methods {
			r.counts["/"+name+"/"+m.Name] = new(atomic.Int64)
		}
	}
}

// Calls returns how often each method has been called so far.
func (b *Backend) Calls() Counts {
	c := make(Counts)
	for m, n := range b.recorder.counts {
		if n := n.Load(); n > 0 {
			c[m] = n
		}
	}
	return c
}

// Active is the number of calls of [Service] that are running.
func (b *Backend) Active() int64 { return b.recorder.active.Load() }

// Last is the call of [Service] that came last, nil before the first.
func (b *Backend) Last() *Call { return b.recorder.last.Load() }

// Cancelled has the calls of [Service] that were cancelled while they ran, in their order. It holds 1,024; more are
// dropped.
func (b *Backend) Cancelled() <-chan Cancellation { return b.cancelled }

// begin records a call and returns what ends the record.
func (b *Backend) begin(ctx context.Context, method string) (c *Call, end func()) {
	b.recorder.active.Add(1)
	c = &Call{Context: ctx, Method: method, Start: time.Now()}
	c.Metadata, _ = metadata.FromIncomingContext(ctx)
	if b.opts.NoRecord {
		return c, func() { b.recorder.active.Add(-1) }
	}
	if v := c.Metadata.Get(":authority"); len(v) > 0 {
		c.Authority = v[0]
	}
	if p, ok := peer.FromContext(ctx); ok {
		c.Peer = p.Addr
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			c.TLS = &info.State
		}
	}
	if d, ok := ctx.Deadline(); ok {
		c.Timeout, c.HasDeadline = d.Sub(c.Start), true
	}
	b.recorder.last.Store(c)
	note := func() {
		ended := Cancellation{Call: c, At: time.Now(), Err: context.Canceled}
		// Not ctx.Err(): at the deadline, grpc-go cancels the context itself at about the same time.
		if d, ok := ctx.Deadline(); ok && !ended.At.Before(d) {
			ended.Err = context.DeadlineExceeded
		}
		select {
		case b.cancelled <- ended:
		default:
		}
	}
	stop := context.AfterFunc(ctx, note)
	return c, func() {
		// A handler that waited for the context's end may get here before the context calls note.
		if stop() && ctx.Err() != nil {
			note()
		}
		b.recorder.active.Add(-1)
	}
}
