// Package rpc makes the proxy's own calls to upstreams, those of health checks and of load reports: one request message, any
// number of answers. It needs neither grpc-go nor a connection of its own; the caller opens the stream, on the connections
// that clients' calls use.
package rpc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// Request is what a call is begun with.
type Request struct {
	Scheme, Authority, Path string
	// UserAgent is the user-agent, unless Metadata has one.
	UserAgent string
	Metadata  []h2.Field
	// Timeout is what the server is told how long the call may take; none if it is not above 0. It is the caller's context
	// that ends it.
	Timeout time.Duration
	// Message is the one message of the request, as protobuf writes it.
	Message []byte
	// MaxAnswer is how large a message of the answer may be, in bytes.
	MaxAnswer int
}

// Call is one call. One goroutine may use it at a time. Whoever begins it closes it.
type Call struct {
	stream *h2.Stream
	recv   *h2.Blocking
	head   []h2.Field
	buf    []byte // read and not used yet
	most   int
}

// Begin sends the request on the stream that open opens. That may wait for the peer's windows, and ends with ctx.
func Begin(ctx context.Context, open func(fields []h2.Field, recv h2.Receiver) (*h2.Stream, error), r *Request) (*Call, error) {
	c := &Call{recv: h2.NewBlocking(), most: r.MaxAnswer}
	var err error
	if c.stream, err = open(r.fields(), c.recv); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, c.Close)
	herr := c.stream.Write(frame(r.Message), true)
	if herr == nil {
		c.stream.Conn().Flush()
	} // else the receiver is told why
	if !stop() && herr != nil {
		return nil, context.Cause(ctx)
	}
	return c, nil
}

// fields is the header block: gRPC over HTTP/2, "Requests".
func (r *Request) fields() []h2.Field {
	f := append(make([]h2.Field, 0, 8+len(r.Metadata)),
		h2.Field{Name: ":method", Value: http.MethodPost},
		h2.Field{Name: ":scheme", Value: r.Scheme},
		h2.Field{Name: ":path", Value: r.Path},
		h2.Field{Name: ":authority", Value: r.Authority},
		h2.Field{Name: "te", Value: "trailers"},
	)
	if r.Timeout > 0 {
		f = append(f, h2.Field{Name: "grpc-timeout", Value: grpcwire.FormatTimeout(r.Timeout)})
	}
	f = append(f, h2.Field{Name: "content-type", Value: "application/grpc"})
	if !slices.ContainsFunc(r.Metadata, func(f h2.Field) bool { return f.Name == "user-agent" }) {
		f = append(f, h2.Field{Name: "user-agent", Value: r.UserAgent})
	}
	return append(f, r.Metadata...)
}

// prefixLen is the length of what stands before each message (PROTOCOL-HTTP2, "Length-Prefixed-Message").
const prefixLen = 5

func frame(msg []byte) []byte {
	b := make([]byte, prefixLen, prefixLen+len(msg))
	binary.BigEndian.PutUint32(b[1:], uint32(len(msg)))
	return append(b, msg...)
}

// Conn is the connection that the call is on.
func (c *Call) Conn() *h2.Conn { return c.stream.Conn() }

// ErrLeaving: the call's connection takes no more streams, or others need its room there.
var ErrLeaving = errors.New("the connection is being closed")

// WhileServing returns a context that ends, with ErrLeaving as its cause, when the call's connection takes no more streams,
// or crowded is closed. A long call should end then: a server that closes in good order waits for it, and it is the next
// connection that leads to where calls go from now on.
func (c *Call) WhileServing(ctx context.Context, crowded <-chan struct{}) (context.Context, context.CancelFunc) {
	return while(ctx, c.Conn().Leaving(), crowded)
}

// WhileRoom returns a context that ends, with ErrLeaving as its cause, when crowded is closed.
func WhileRoom(ctx context.Context, crowded <-chan struct{}) (context.Context, context.CancelFunc) {
	return while(ctx, nil, crowded)
}

func while(ctx context.Context, leaving, crowded <-chan struct{}) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-leaving:
			cancel(ErrLeaving)
		case <-crowded:
			cancel(ErrLeaving)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// Close abandons the call, if it is not over. What was not read of an answer that is over would stay charged to the connection,
// whose window all calls share, so it gives that back in any case.
func (c *Call) Close() {
	c.stream.Reset(h2.Cancel)
	c.stream.Conn().Flush()
}

// NotGRPCError is an answer that is not gRPC's.
type NotGRPCError struct{ HTTPStatus, ContentType string }

// Error implements error.
func (e *NotGRPCError) Error() string {
	if e.HTTPStatus != "200" {
		return fmt.Sprintf("the answer is not gRPC: HTTP status %s (%v)", e.HTTPStatus, e.Code())
	}
	return fmt.Sprintf("the answer is not gRPC (content-type %q)", e.ContentType)
}

// Code is the gRPC code that stands for the HTTP status.
func (e *NotGRPCError) Code() grpcwire.Code {
	n, err := strconv.Atoi(e.HTTPStatus)
	if err != nil {
		n = 0
	}
	return grpcwire.FromHTTPStatus(n)
}

// Next waits for the next message. It returns io.EOF when no more will come; Status then tells how the call ended. Other
// errors are *NotGRPCError, the *h2.Error that ended the stream, the context's cause, or say what is wrong with the answer.
func (c *Call) Next(ctx context.Context) ([]byte, error) {
	if c.head == nil {
		head, err := c.recv.WaitHead(ctx)
		if err != nil {
			return nil, err
		}
		c.head = head
	}
	if value(c.head, "grpc-status") != "" {
		return nil, io.EOF // Trailers-Only
	}
	if s, ct := value(c.head, ":status"), value(c.head, "content-type"); s != "200" || grpcwire.ContentKind(ct) != grpcwire.GRPC {
		return nil, &NotGRPCError{s, ct}
	}
	for {
		if msg, ok, err := c.message(); ok || err != nil {
			return msg, err
		}
		var p [512]byte
		n, err := c.recv.ReadContext(ctx, p[:])
		c.buf = append(c.buf, p[:n]...)
		if errors.Is(err, io.EOF) && len(c.buf) > 0 {
			return nil, errors.New("the answer ends inside a message")
		}
		if err != nil {
			return nil, err
		}
	}
}

// message takes a message from the buffer, if a whole one is there.
func (c *Call) message() (msg []byte, ok bool, _ error) {
	if len(c.buf) < prefixLen {
		return nil, false, nil
	}
	n := uint64(binary.BigEndian.Uint32(c.buf[1:]))
	switch {
	case c.buf[0] != 0:
		return nil, false, errors.New("the answer is compressed, which was not asked for")
	case n > uint64(c.most):
		return nil, false, fmt.Errorf("the answer is %d bytes long, which is more than the %d expected at most", n, c.most)
	case uint64(len(c.buf)) < prefixLen+n:
		return nil, false, nil
	}
	end := prefixLen + int(n)
	msg, c.buf = c.buf[prefixLen:end:end], c.buf[end:]
	return msg, true, nil
}

// Status is how a call ended.
type Status struct {
	Code    grpcwire.Code
	Message string
}

func (s Status) String() string {
	if s.Message == "" {
		return s.Code.String()
	}
	return s.Code.String() + ": " + s.Message
}

// Status is the status of a call whose end Next has returned.
func (c *Call) Status() (Status, error) {
	fields := c.recv.Trailers()
	if fields == nil {
		fields = c.head
	}
	code, ok := grpcwire.ParseStatus(value(fields, "grpc-status"))
	if !ok {
		return Status{}, errors.New("the answer has no status")
	}
	return Status{code, grpcwire.DecodeMessage(value(fields, "grpc-message"))}, nil
}

func value(fields []h2.Field, name string) string {
	for _, f := range fields {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}
