package orca

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
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

// lookAround is how often it is looked whether the connection is still in use, while nothing comes.
const lookAround = time.Second

var errUnimplemented = errors.New("the server does not have the service xds.service.orca.v3.OpenRcaService")

// errConnection: the connection goes out of use, and the next one is to be asked.
var errConnection = errors.New("the connection is being closed")

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
	wait := backoffBase
	for {
		conn, reported, err := s.once(ctx)
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
		case errors.Is(err, errConnection) && reported:
			continue
		}
		log.Debug("stream of load reports ended", zap.Error(err), zap.Duration("next_in", wait))
		sleep(ctx, time.Duration((0.8+0.4*randFloat())*float64(wait)))
		wait = min(2*wait, backoffMax)
	}
}

// waitForNext waits until the endpoint has another connection than this one.
func (s *Stream) waitForNext(ctx context.Context, conn *h2.Conn) {
	for ctx.Err() == nil && (!conn.Draining() || s.Endpoint.Conns() == 0) {
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

// waiter bounds the wait for a stream.
type waiter struct{ ctx context.Context }

// Wait implements transport.Caller.
func (w waiter) Wait() (<-chan struct{}, time.Time) { return w.ctx.Done(), time.Time{} }

const path = "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics"

// once asks once and hands on what comes until the stream ends.
func (s *Stream) once(ctx context.Context) (conn *h2.Conn, reported bool, _ error) {
	fields := []h2.Field{
		{Name: ":method", Value: http.MethodPost},
		{Name: ":scheme", Value: s.Endpoint.Scheme()},
		{Name: ":path", Value: path},
		{Name: ":authority", Value: s.Authority},
		{Name: "te", Value: "trailers"},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "user-agent", Value: "caddy-grpc-proxy-orca"},
	}
	recv := h2.NewBlocking()
	stream, terr := s.Endpoint.Open(waiter{ctx}, fields, false, recv) //nolint:contextcheck // the waiter carries it
	if terr != nil {
		return nil, false, terr
	}
	conn = stream.Conn()
	defer func() {
		if !stream.Closed() {
			stream.Reset(h2.Cancel)
			conn.Flush()
		}
	}()
	if herr := stream.Write(request(s.Interval), true); herr != nil {
		return conn, false, herr
	}
	conn.Flush()

	r := reader{recv: recv, conn: conn}
	if err := r.begin(ctx); err != nil {
		return conn, false, err
	}
	for {
		report, err := r.next(ctx)
		if errors.Is(err, io.EOF) {
			return conn, reported, r.status()
		}
		if err != nil {
			return conn, reported, err
		}
		reported = true
		s.Receive(report)
	}
}

// reader takes messages from a stream.
type reader struct {
	recv *h2.Blocking
	conn *h2.Conn
	head []h2.Field
	buf  []byte // what was read
	used int    // how much of it was handed out
}

// begin waits for the head of the answer. It fails with its status if that is all there is.
func (r *reader) begin(ctx context.Context) error {
	err := r.wait(ctx, func(ctx context.Context) (err error) {
		r.head, err = r.recv.WaitHead(ctx)
		return err
	})
	switch {
	case err != nil:
		return err
	case value(r.head, "grpc-status") != "":
		return r.status()
	case value(r.head, ":status") != "200" || grpcwire.ContentKind(value(r.head, "content-type")) != grpcwire.GRPC:
		status, _ := strconv.Atoi(value(r.head, ":status"))
		if grpcwire.FromHTTPStatus(status) == grpcwire.Unimplemented {
			return errUnimplemented
		}
		return fmt.Errorf("the answer is not gRPC: HTTP status %s, content-type %q", value(r.head, ":status"), value(r.head, "content-type"))
	}
	return nil
}

// next returns the next message, which is there until it is called again; io.EOF at the end.
func (r *reader) next(ctx context.Context) ([]byte, error) {
	r.buf = append(r.buf[:0], r.buf[r.used:]...)
	r.used = 0
	for {
		msg, n, err := message(r.buf)
		if err != nil || n > 0 {
			r.used = n
			return msg, err
		}
		var p [512]byte
		err = r.wait(ctx, func(ctx context.Context) error {
			n, err := r.recv.ReadContext(ctx, p[:])
			r.buf = append(r.buf, p[:n]...)
			return err
		})
		if errors.Is(err, io.EOF) && len(r.buf) > 0 {
			return nil, errors.New("the stream ends inside a message")
		}
		if err != nil {
			return nil, err
		}
	}
}

// wait runs f, which waits, again and again, and ends when the connection goes out of use. gRFC A51: "when the backend
// sends a GOAWAY, the client will cancel the StreamCoreMetrics call"; a server that closes in good order waits for that.
func (r *reader) wait(ctx context.Context, f func(context.Context) error) error {
	for {
		if r.conn.Draining() {
			return errConnection
		}
		short, cancel := context.WithTimeout(ctx, lookAround)
		err := f(short)
		cancel()
		if err == nil || !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			return err
		}
	}
}

// status is how the stream ended.
func (r *reader) status() error {
	fields := r.recv.Trailers()
	if fields == nil {
		fields = r.head
	}
	code, ok := grpcwire.ParseStatus(value(fields, "grpc-status"))
	switch {
	case !ok:
		return errors.New("the stream ended without a status")
	case code == grpcwire.Unimplemented:
		return errUnimplemented
	}
	return fmt.Errorf("the server ended the stream with status %v %q", code, grpcwire.DecodeMessage(value(fields, "grpc-message")))
}

func value(fields []h2.Field, name string) string {
	for _, f := range fields {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}
