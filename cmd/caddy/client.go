package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	// callTimeout is the deadline of an ordinary call; shortTimeout that of a call made to miss it.
	callTimeout  = 10 * time.Second
	shortTimeout = 100 * time.Millisecond
	// clientGrace is how long running calls may go on when the client stops; the rest is cancelled.
	clientGrace = 300 * time.Millisecond
	// maxOpen bounds the calls in flight: below the 250 streams that Caddy's server allows on one connection, so that
	// no call waits in the client, unseen by the proxy.
	maxOpen = 200
	// messages and messageSize are what a streaming call carries each way, and the payload of each message in bytes.
	messages    = 5
	messageSize = 64
)

// client sends all four kinds of RPC at a steady rate over one grpc.ClientConn, and counts what comes back.
type client struct {
	conn  *grpc.ClientConn
	rpc   testpb.TestServiceClient
	stats *stats

	dials atomic.Int64 // connections ever dialled
	open  atomic.Int64 // calls in flight

	ctx    context.Context // of the calls, not of their sending
	cancel context.CancelFunc
	halt   chan struct{} // closed: no more calls
	idle   chan struct{} // closed: all calls have ended
}

// newClient prepares a client of the proxy's TLS port that trusts roots alone. It dials with the first call.
func newClient(tlsPort int, roots *x509.CertPool, s *stats) (*client, error) {
	c := &client{stats: s, halt: make(chan struct{}), idle: make(chan struct{})}
	addr := fmt.Sprintf("127.0.0.1:%d", tlsPort)
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		c.dials.Add(1)
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
	// The passthrough resolver hands the name to the dialer as it is; grpc-go's retries are off, so that what is
	// counted is what the proxy did.
	conn, err := grpc.NewClient(fmt.Sprintf("passthrough:///localhost:%d", tlsPort),
		grpc.WithContextDialer(dial),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12})),
		grpc.WithIdleTimeout(0), grpc.WithDisableRetry())
	if err != nil {
		return nil, fmt.Errorf("making the client of %s: %w", addr, err)
	}
	c.conn, c.rpc = conn, testpb.NewTestServiceClient(conn)
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c, nil
}

// send makes rate calls a second until stop. It must be called once.
func (c *client) send(rate float64) {
	defer close(c.idle)
	var calls sync.WaitGroup
	defer calls.Wait()
	slots := make(chan struct{}, maxOpen)
	ticker := time.NewTicker(2 * time.Millisecond)
	defer ticker.Stop()
	// Due calls follow from the time passed, not from the number of ticks, which come late or are dropped on a busy
	// machine. What all slots being taken has cost is not made up for.
	last, due := time.Now(), 1.0
	for n := 0; ; {
		for ; due >= 1; due-- {
			select {
			case <-c.halt:
				return
			case slots <- struct{}{}:
			}
			next := plan(n)
			n++
			calls.Go(func() {
				defer func() { <-slots }()
				c.call(next)
			})
		}
		select {
		case <-c.halt:
			return
		case now := <-ticker.C:
			due = min(due+now.Sub(last).Seconds()*rate, maxOpen)
			last = now
		}
	}
}

// stop ends the sending, lets calls in flight finish for clientGrace, cancels the rest and closes the connection.
func (c *client) stop() {
	close(c.halt)
	timer := time.NewTimer(clientGrace)
	defer timer.Stop()
	select {
	case <-c.idle:
	case <-timer.C:
	}
	c.cancel()
	<-c.idle
	// Close reports only that it was called before.
	_ = c.conn.Close()
}

// step is one call to make.
type step struct {
	kind kind
	// want is the status the call is made to end with.
	want codes.Code
}

// plan says what the n-th call is. Its cycle is a prime number long, so that with any number of backends the calls
// that fail on purpose go round all of them.
func plan(n int) step {
	switch n %= 37; {
	case n == 18:
		return step{unary, codes.NotFound}
	case n == 27:
		return step{serverStream, codes.DeadlineExceeded}
	case n%6 == 1:
		return step{clientStream, codes.OK}
	case n%6 == 3:
		return step{serverStream, codes.OK}
	case n%6 == 5:
		return step{bidi, codes.OK}
	}
	return step{unary, codes.OK}
}

// call makes one call and records how it went.
func (c *client) call(s step) {
	c.open.Add(1)
	defer c.open.Add(-1)
	timeout := callTimeout
	if s.want == codes.DeadlineExceeded {
		timeout = shortTimeout
	}
	ctx, cancel := context.WithTimeout(c.ctx, timeout)
	defer cancel()
	begin := time.Now()
	var head metadata.MD
	var err error
	switch s.kind {
	case unary:
		head, err = c.unary(ctx, s.want)
	case clientStream:
		head, err = c.clientStream(ctx)
	case serverStream:
		head, err = c.serverStream(ctx, s.want)
	case bidi:
		head, err = c.bidi(ctx)
	}
	latency := time.Since(begin)
	var name string
	if v := head.Get(backendKey); len(v) > 0 {
		name = v[0]
	}
	c.stats.record(s.kind, name, status.Code(err), latency)
}

func (c *client) unary(ctx context.Context, want codes.Code) (metadata.MD, error) {
	req := &testpb.SimpleRequest{ResponseSize: messageSize, Payload: body()}
	if want != codes.OK {
		req.ResponseStatus = &testpb.EchoStatus{Code: int32(want), Message: "asked for by the demo"}
	}
	var head metadata.MD
	resp, err := c.rpc.UnaryCall(ctx, req, grpc.Header(&head))
	if err == nil {
		err = sameSize(messageSize, len(resp.GetPayload().GetBody()))
	}
	return head, err
}

func (c *client) clientStream(ctx context.Context) (metadata.MD, error) {
	stream, err := c.rpc.StreamingInputCall(ctx)
	if err != nil {
		return nil, err
	}
	for range messages {
		// An error of Send is only io.EOF; CloseAndRecv then has the status.
		if stream.Send(&testpb.StreamingInputCallRequest{Payload: body()}) != nil {
			break
		}
	}
	resp, err := stream.CloseAndRecv()
	if err == nil {
		err = sameSize(messages*messageSize, int(resp.GetAggregatedPayloadSize()))
	}
	return headOf(stream), err
}

// serverStream asks for a few messages; for one that would come ten deadlines late if it is to miss its deadline.
func (c *client) serverStream(ctx context.Context, want codes.Code) (metadata.MD, error) {
	req := &testpb.StreamingOutputCallRequest{}
	for range messages {
		req.ResponseParameters = append(req.ResponseParameters, &testpb.ResponseParameters{Size: messageSize})
	}
	if want == codes.DeadlineExceeded {
		req.ResponseParameters[0].IntervalUs = int32(10 * shortTimeout / time.Microsecond)
	}
	stream, err := c.rpc.StreamingOutputCall(ctx, req)
	if err != nil {
		return nil, err
	}
	size := 0
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return headOf(stream), sameSize(messages*messageSize, size)
		}
		if err != nil {
			return headOf(stream), err
		}
		size += len(resp.GetPayload().GetBody())
	}
}

// bidi sends a message and waits for its answer, in turn: full duplex, or it would hang.
func (c *client) bidi(ctx context.Context) (metadata.MD, error) {
	stream, err := c.rpc.FullDuplexCall(ctx)
	if err != nil {
		return nil, err
	}
	req := &testpb.StreamingOutputCallRequest{
		Payload:            body(),
		ResponseParameters: []*testpb.ResponseParameters{{Size: messageSize}},
	}
	for range messages {
		// As above: where Send fails, Recv has the status.
		_ = stream.Send(req)
		resp, err := stream.Recv()
		if err == nil {
			err = sameSize(messageSize, len(resp.GetPayload().GetBody()))
		}
		if err != nil {
			return headOf(stream), err
		}
	}
	_ = stream.CloseSend()
	switch resp, err := stream.Recv(); {
	case errors.Is(err, io.EOF):
		return headOf(stream), nil
	case err != nil:
		return headOf(stream), err
	default:
		return headOf(stream), sameSize(0, 1+len(resp.GetPayload().GetBody()))
	}
}

// headOf returns the response metadata of a stream that has ended, nil if none came.
func headOf(stream grpc.ClientStream) metadata.MD {
	head, err := stream.Header()
	if err != nil {
		return nil
	}
	return head
}

func body() *testpb.Payload {
	return &testpb.Payload{Body: make([]byte, messageSize)}
}

// sameSize is the client's check that it got what it asked for; a call that did not counts as DATA_LOSS.
func sameSize(want, got int) error {
	if want != got {
		return status.Errorf(codes.DataLoss, "answer of %d bytes, want %d", got, want)
	}
	return nil
}
