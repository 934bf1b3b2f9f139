package healthcheck

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// Values of grpc.health.v1.HealthCheckResponse.ServingStatus.
const (
	servingUnknown        = 0
	serving               = 1
	notServing            = 2
	servingServiceUnknown = 3
)

// Field numbers of grpc.health.v1.HealthCheckRequest and HealthCheckResponse.
const (
	requestService = 1
	responseStatus = 1
)

// maxMessage is more than any answer to a health check needs.
const maxMessage = 4096

// prefixLen is the length of what stands before each message (PROTOCOL-HTTP2, "Length-Prefixed-Message").
const prefixLen = 5

// healthCall is a call of the health service.
type healthCall struct {
	stream *h2.Stream
	recv   *h2.Blocking
	head   []h2.Field
	buf    []byte // read and not used yet
}

// call begins a call of the health service. A Check has a deadline, which the server is told; a Watch has none.
func (g *GRPC) call(ctx context.Context, t *Target, path string, deadline bool) (*healthCall, error) {
	authority := g.Authority
	if authority == "" {
		authority = t.HostPort()
	}
	fields := make([]h2.Field, 0, 8+len(g.metadata))
	fields = append(fields,
		h2.Field{Name: ":method", Value: http.MethodPost},
		h2.Field{Name: ":scheme", Value: t.Scheme()},
		h2.Field{Name: ":path", Value: path},
		h2.Field{Name: ":authority", Value: authority},
		h2.Field{Name: "te", Value: "trailers"},
	)
	if d, ok := ctx.Deadline(); ok && deadline {
		fields = append(fields, h2.Field{Name: "grpc-timeout", Value: grpcwire.FormatTimeout(time.Until(d))})
	}
	fields = append(fields, h2.Field{Name: "content-type", Value: "application/grpc"})
	named := false
	for _, f := range g.metadata {
		named = named || f.Name == "user-agent"
	}
	if !named {
		fields = append(fields, h2.Field{Name: "user-agent", Value: DefaultUserAgent})
	}
	fields = append(fields, g.metadata...)

	c := &healthCall{recv: h2.NewBlocking()}
	var err error
	if c.stream, err = open(ctx, t, fields, c.recv); err != nil {
		return nil, err
	}
	if herr := c.stream.Write(request(t.Service), true); herr == nil {
		c.stream.Conn().Flush()
	} // else the receiver is told why
	return c, nil
}

// open avoids a nil *transport.Error in an error.
func open(ctx context.Context, t *Target, fields []h2.Field, recv h2.Receiver) (*h2.Stream, error) {
	s, err := t.Open(ctx, fields, recv)
	if err != nil {
		return nil, errors.New(err.Text())
	}
	return s, nil
}

// request is a length-prefixed HealthCheckRequest.
func request(service string) []byte {
	b := make([]byte, prefixLen, prefixLen+4+len(service))
	if service != "" {
		b = protowire.AppendTag(b, requestService, protowire.BytesType)
		b = protowire.AppendString(b, service)
	}
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-prefixLen))
	return b
}

// close abandons the call, if it is not over.
func (c *healthCall) close() {
	if !c.stream.Closed() {
		c.stream.Reset(h2.Cancel)
		c.stream.Conn().Flush()
	}
}

// next returns the next message, nil if no more will come.
func (c *healthCall) next(ctx context.Context) ([]byte, error) {
	if c.head == nil {
		head, err := c.recv.WaitHead(ctx)
		if err != nil {
			return nil, err
		}
		c.head = head
		if code := value(head, "grpc-status"); code != "" {
			return nil, nil // Trailers-Only
		}
		if err := checkHead(head); err != nil {
			return nil, err
		}
	}
	for {
		if len(c.buf) >= prefixLen {
			n := binary.BigEndian.Uint32(c.buf[1:])
			switch {
			case c.buf[0] != 0:
				return nil, errors.New("the server compressed its answer to the health check, which it was not told to")
			case n > maxMessage:
				return nil, fmt.Errorf("the server's answer to the health check is %d bytes long", n)
			case len(c.buf) >= prefixLen+int(n):
				msg := c.buf[prefixLen : prefixLen+n : prefixLen+n]
				c.buf = c.buf[prefixLen+n:]
				return msg, nil
			}
		}
		var p [512]byte
		n, err := c.recv.ReadContext(ctx, p[:])
		c.buf = append(c.buf, p[:n]...)
		if errors.Is(err, io.EOF) {
			if len(c.buf) > 0 {
				return nil, errors.New("the server's answer to the health check ends inside a message")
			}
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func checkHead(head []h2.Field) error {
	if s := value(head, ":status"); s != "200" {
		code := 0
		if n, err := strconv.Atoi(s); err == nil {
			code = n
		}
		return fmt.Errorf("the health check was answered with HTTP status %s (%v)", s, grpcwire.FromHTTPStatus(code))
	}
	if ct := value(head, "content-type"); grpcwire.ContentKind(ct) != grpcwire.GRPC {
		return fmt.Errorf("the answer to the health check is not gRPC (content-type %q)", ct)
	}
	return nil
}

// ending is how a call ended.
type ending struct {
	code    grpcwire.Code
	message string
}

func (e ending) String() string {
	if e.message == "" {
		return e.code.String()
	}
	return e.code.String() + ": " + e.message
}

// end reads on to the call's end and returns its status.
func (c *healthCall) end(ctx context.Context) (ending, error) {
	for range maxTrailing {
		msg, err := c.next(ctx)
		if err != nil {
			return ending{}, err
		}
		if msg == nil {
			break
		}
	}
	fields := c.recv.Trailers()
	if fields == nil {
		fields = c.head
	}
	code, ok := grpcwire.ParseStatus(value(fields, "grpc-status"))
	if !ok {
		return ending{}, errors.New("the answer to the health check has no status")
	}
	return ending{code, grpcwire.DecodeMessage(value(fields, "grpc-message"))}, nil
}

// maxTrailing bounds how many messages are read past the first.
const maxTrailing = 16

func value(fields []h2.Field, name string) string {
	for _, f := range fields {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// verdictOf reads a HealthCheckResponse.
func verdictOf(msg []byte) Verdict {
	status := int32(servingUnknown) // proto3: left out means 0
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 || num > protowire.MaxValidNumber {
			return Verdict{NoAnswer, "the server's answer to the health check cannot be read"}
		}
		msg = msg[n:]
		if num == responseStatus && typ == protowire.VarintType {
			var v uint64
			v, n = protowire.ConsumeVarint(msg)
			status = int32(v) // as protobuf reads enums
		} else {
			n = protowire.ConsumeFieldValue(num, typ, msg)
		}
		if n < 0 {
			return Verdict{NoAnswer, "the server's answer to the health check cannot be read"}
		}
		msg = msg[n:]
	}
	switch status {
	case serving:
		return Verdict{Answer: Serving}
	case notServing:
		return Verdict{NotServing, "the server says NOT_SERVING"}
	case servingUnknown:
		return Verdict{NotServing, "the server says UNKNOWN"}
	case servingServiceUnknown:
		return Verdict{NoSuchService, "the server says SERVICE_UNKNOWN"}
	}
	return Verdict{NotServing, "the server says " + strconv.Itoa(int(status))}
}

func unknownService(name string) string {
	return fmt.Sprintf("the server does not know the service %q", name)
}

// lostBy marks an error that ended the connection and not the stream alone.
func lostBy(err error) error {
	var he *h2.Error
	if errors.As(err, &he) && (he.Connection || he.Kind == h2.KindGoAway || he.Kind == h2.KindConnLost || he.Kind == h2.KindTimeout || he.Kind == h2.KindLocal) {
		return fmt.Errorf("%w: %w", ErrConnectionLost, err)
	}
	return err
}
