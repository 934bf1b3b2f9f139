package healthcheck

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/rpc"
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

const (
	// maxMessage is more than any answer to a health check needs.
	maxMessage = 4096
	// maxTrailing bounds how many messages are read past the first.
	maxTrailing = 16
)

// call begins a call of the health service. A Check has a deadline, which the server is told; a Watch has none.
// opened is told which connection it is on, before anything can hang there, and what is closed when its room there is
// needed for calls.
func (g *GRPC) call(ctx context.Context, t *Target, path string, timeout time.Duration, opened func(on *h2.Conn, crowded <-chan struct{})) (*rpc.Call, error) {
	authority := g.Authority
	if authority == "" {
		authority = t.HostPort()
	}
	return rpc.Begin(ctx, func(fields []h2.Field, recv h2.Receiver) (*h2.Stream, error) {
		s, crowded, err := t.open(ctx, fields, recv)
		if err != nil {
			return nil, errors.New(err.Text())
		}
		opened(s.Conn(), crowded)
		return s, nil
	}, &rpc.Request{
		Scheme: t.Scheme(), Authority: authority, Path: path, UserAgent: DefaultUserAgent, Metadata: g.metadata, Timeout: timeout,
		Message: request(t.Service), MaxAnswer: maxMessage,
	})
}

// request is a HealthCheckRequest.
func request(service string) []byte {
	if service == "" {
		return nil
	}
	return protowire.AppendString(protowire.AppendTag(nil, requestService, protowire.BytesType), service)
}

// end reads on to the call's end and returns its status.
func end(ctx context.Context, c *rpc.Call) (rpc.Status, error) {
	for range maxTrailing {
		_, err := c.Next(ctx)
		if errors.Is(err, io.EOF) {
			return c.Status()
		}
		if err != nil {
			return rpc.Status{}, err
		}
	}
	return rpc.Status{}, errors.New("the answer has no end")
}

// verdict reads a HealthCheckResponse.
func (g *GRPC) verdict(t *Target, msg []byte) Verdict {
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
		return g.unknown(t, "the server says SERVICE_UNKNOWN")
	}
	return Verdict{NotServing, "the server says " + strconv.Itoa(int(status))}
}

// lostBy marks an error that ended the connection and not the stream alone, and one that is none.
func lostBy(err error) error {
	var he *h2.Error
	switch {
	case errors.Is(err, rpc.ErrLeaving) || errors.As(err, &he) && he.Kind == h2.KindGoAway:
		return fmt.Errorf("%w: %w", ErrInOrder, err)
	case he != nil && (he.Connection || he.Kind == h2.KindConnLost || he.Kind == h2.KindTimeout || he.Kind == h2.KindLocal):
		return fmt.Errorf("%w: %w", ErrConnectionLost, err)
	}
	return err
}
