package orca

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/rpc"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// Stream asks one endpoint for load reports, out of band.
type Stream struct {
	Endpoint *transport.Endpoint
	// Authority is the :authority to ask with.
	Authority string
	// Interval is how often the endpoint should report. Servers have a lowest interval, often 30 s, that they report at
	// if they are asked to do so more often.
	Interval time.Duration
	// Receive is called with each report, an xds.data.orca.v3.OrcaLoadReport in wire format, by one goroutine. It must
	// not keep the slice.
	Receive func(report []byte)
	// Logger is told once, for each connection, that a server does not have the service, and of failures. Default: none.
	Logger *zap.Logger
}

// The wait after a stream that failed doubles, from one second as in gRPC, and no longer than transport's own wait
// between dials, so that an endpoint that is back is soon heard of. gRFC A51 would ask again at once after a stream that
// had brought a report; so a server that ends each stream after one report would be asked without a pause.
const (
	backoffBase = time.Second
	backoffMax  = 10 * time.Second
)

var randFloat = rand.Float64

// renewEvery is how often a stream that ends since its connection leaves is opened again without a pause.
const renewEvery = 100 * time.Millisecond

// lookAround is how often it is looked whether there is a connection again.
const lookAround = time.Second

var errUnimplemented = errors.New("the server does not have the service xds.service.orca.v3.OpenRcaService")

// Run asks until the context ends, on one connection after the other.
//
// gRFC A51: "the backend will terminate the call with status UNIMPLEMENTED, in which case the client must not retry the
// call on the same connection", "If the StreamCoreMetrics call returns any other status, the client will retry the call",
// with exponential backoff that ends "when the client receives a message".
func (s *Stream) Run(ctx context.Context) {
	log := s.Logger
	if log == nil {
		log = zap.NewNop()
	}
	log = log.With(zap.String("upstream", s.Endpoint.Address()))
	var own *transport.Endpoint
	beside := func() *transport.Endpoint {
		if own == nil {
			own = s.Endpoint.Beside()
		}
		return own
	}
	defer func() {
		if own != nil {
			_ = own.Destruct()
		}
	}()
	wait := backoffBase
	soon := false // the last stream was on a connection that has left, but within renewEvery
	for {
		began := time.Now()
		conn, reported, err := s.once(ctx, beside)
		if ctx.Err() != nil {
			return
		}
		if reported {
			wait = backoffBase
		}
		switch {
		case errors.Is(err, errUnimplemented):
			log.Error("no load reports", zap.Error(err))
			s.waitForNext(ctx, conn)
			continue
		case isLeaving(err): // servers end connections that are some time old: the next one is to be asked
			before := soon
			if soon = time.Since(began) < renewEvery; !soon || !before {
				continue
			}
		default:
			soon = false
		}
		log.Debug("stream of load reports ended", zap.Error(err), zap.Duration("next_in", wait))
		sleep(ctx, time.Duration((0.8+0.4*randFloat())*float64(wait)))
		wait = min(2*wait, backoffMax)
	}
}

// isLeaving tells whether a stream has ended since its connection takes no more streams.
func isLeaving(err error) bool {
	var he *h2.Error
	return errors.Is(err, rpc.ErrLeaving) || errors.As(err, &he) && he.Kind == h2.KindGoAway
}

// waitForNext waits until the endpoint has another connection than this one.
func (s *Stream) waitForNext(ctx context.Context, conn *h2.Conn) {
	select {
	case <-conn.Leaving():
	case <-ctx.Done():
	}
	for ctx.Err() == nil && s.Endpoint.Conns() == 0 { // it is not for us to dial
		sleep(ctx, lookAround)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

const path = "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics"

// once asks once and hands on what comes until the stream ends. gRFC A51: "when the backend sends a GOAWAY, the client will
// cancel the StreamCoreMetrics call"; a server that closes in good order waits for that.
func (s *Stream) once(ctx context.Context, beside func() *transport.Endpoint) (conn *h2.Conn, reported bool, _ error) {
	var crowded <-chan struct{}
	c, err := rpc.Begin(ctx, func(fields []h2.Field, recv h2.Receiver) (*h2.Stream, error) {
		stream, ch, err := s.Endpoint.OpenGuest(ctx, beside, fields, recv)
		if err != nil {
			return nil, err
		}
		crowded = ch
		return stream, nil
	}, &rpc.Request{
		Scheme: s.Endpoint.Scheme(), Authority: s.Authority, Path: path, UserAgent: "caddy-grpc-proxy-orca",
		Message: request(s.Interval), MaxAnswer: maxReport,
	})
	if err != nil {
		return nil, false, err
	}
	defer c.Close()
	conn = c.Conn()
	ctx, cancel := c.WhileServing(ctx, crowded)
	defer cancel()
	for {
		report, err := c.Next(ctx)
		if err != nil {
			return conn, reported, ending(c, err)
		}
		reported = true
		s.Receive(report)
	}
}

// ending says why there are no more reports.
func ending(c *rpc.Call, err error) error {
	if answer := new(rpc.NotGRPCError); errors.As(err, &answer) && answer.Code() == grpcwire.Unimplemented {
		return errUnimplemented
	}
	if !errors.Is(err, io.EOF) {
		return err
	}
	status, err := c.Status()
	switch {
	case err != nil:
		return err
	case status.Code == grpcwire.Unimplemented:
		return errUnimplemented
	}
	return fmt.Errorf("the server ended the stream with %v", status)
}
