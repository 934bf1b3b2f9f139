package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
)

const (
	// backendKey is the response metadata in which a backend gives its name, so that the client can tell who answered
	// each call, whatever its kind and status.
	backendKey = "demo-backend"
	// testService is the service the demo's calls go to, grpc's own interop service.
	testService = "grpc.testing.TestService"
	// maxPayload bounds the payload a caller may ask for, in bytes: grpc-go's default limit for one message.
	maxPayload = 4 << 20
	// backendGrace is how long a stopping backend lets open streams go on. What is left then is cut, which the proxy
	// turns into a status for its client.
	backendGrace = 200 * time.Millisecond
)

// backend is one real gRPC server (grpc-go, h2c) on a free loopback port, with health and reflection services.
type backend struct {
	name   string
	port   int
	delay  time.Duration // before each call of the test service is handled
	server *grpc.Server
	health *health.Server
	calls  atomic.Int64 // of the test service, as the backend sees them
	served chan struct{}
}

// startBackends starts n backends named b1, b2, …; with more than one, the last takes slow longer for each call.
func startBackends(n int, slow time.Duration) ([]*backend, error) {
	var backends []*backend
	for i := range n {
		b := &backend{name: fmt.Sprintf("b%d", i+1)}
		if n > 1 && i == n-1 {
			b.delay = slow
		}
		if err := b.start(); err != nil {
			stopBackends(backends)
			return nil, fmt.Errorf("starting backend %s: %w", b.name, err)
		}
		backends = append(backends, b)
	}
	return backends, nil
}

func (b *backend) start() error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	b.port = ln.Addr().(*net.TCPAddr).Port
	b.server = grpc.NewServer(grpc.UnaryInterceptor(b.interceptUnary), grpc.StreamInterceptor(b.interceptStream))
	testpb.RegisterTestServiceServer(b.server, &testServer{name: b.name})
	b.health = health.NewServer()
	b.health.SetServingStatus(testService, grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(b.server, b.health)
	reflection.Register(b.server)

	b.served = make(chan struct{})
	go func() {
		defer close(b.served)
		// Serve only fails when the listener does, and then its upstream is seen to be down: what the demo is about.
		_ = b.server.Serve(ln)
	}()
	return nil
}

// stopBackends stops all of them at once and returns when they are gone, after backendGrace at most.
func stopBackends(backends []*backend) {
	drained := make(chan struct{})
	for _, b := range backends {
		b.health.Shutdown()
		go func() {
			b.server.GracefulStop()
			drained <- struct{}{}
		}()
	}
	deadline := time.NewTimer(backendGrace)
	defer deadline.Stop()
	for left := len(backends); left > 0; {
		select {
		case <-drained:
			left--
		case <-deadline.C:
			for _, b := range backends {
				b.server.Stop()
			}
		}
	}
	for _, b := range backends {
		<-b.served
	}
}

func (b *backend) interceptUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := grpc.SetHeader(ctx, metadata.Pairs(backendKey, b.name)); err != nil {
		return nil, err
	}
	if err := b.enter(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// interceptStream sends the head at once: a call that ends by its deadline then still knows who was to answer it.
func (b *backend) interceptStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := ss.SendHeader(metadata.Pairs(backendKey, b.name)); err != nil {
		return err
	}
	if err := b.enter(ss.Context(), info.FullMethod); err != nil {
		return err
	}
	return handler(srv, ss)
}

// enter counts and delays calls of the test service; health and reflection are neither counted nor slow.
func (b *backend) enter(ctx context.Context, fullMethod string) error {
	if !strings.HasPrefix(fullMethod, "/"+testService+"/") {
		return nil
	}
	b.calls.Add(1)
	return sleep(ctx, b.delay)
}

// sleep waits for d, or until ctx ends, whose error it then returns as a gRPC status.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// testServer answers the calls of grpc.testing.TestService that the demo and the lines it prints make: EmptyCall,
// UnaryCall and the three streaming kinds. The other methods answer UNIMPLEMENTED.
type testServer struct {
	testpb.UnimplementedTestServiceServer
	name string
}

func (s *testServer) EmptyCall(context.Context, *testpb.Empty) (*testpb.Empty, error) {
	return &testpb.Empty{}, nil
}

func (s *testServer) UnaryCall(_ context.Context, req *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
	if err := echoStatus(req.GetResponseStatus()); err != nil {
		return nil, err
	}
	payload, err := newPayload(req.GetResponseSize())
	if err != nil {
		return nil, err
	}
	resp := &testpb.SimpleResponse{Payload: payload}
	if req.GetFillServerId() {
		resp.ServerId = s.name
	}
	return resp, nil
}

func (s *testServer) StreamingOutputCall(req *testpb.StreamingOutputCallRequest, stream grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error {
	if err := sendAll(stream, req.GetResponseParameters()); err != nil {
		return err
	}
	return echoStatus(req.GetResponseStatus())
}

func (s *testServer) StreamingInputCall(stream grpc.ClientStreamingServer[testpb.StreamingInputCallRequest, testpb.StreamingInputCallResponse]) error {
	var size int
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&testpb.StreamingInputCallResponse{AggregatedPayloadSize: int32(min(size, 1<<31-1))})
		}
		if err != nil {
			return err
		}
		size += len(req.GetPayload().GetBody())
	}
}

func (s *testServer) FullDuplexCall(stream grpc.BidiStreamingServer[testpb.StreamingOutputCallRequest, testpb.StreamingOutputCallResponse]) error {
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := echoStatus(req.GetResponseStatus()); err != nil {
			return err
		}
		if err := sendAll(stream, req.GetResponseParameters()); err != nil {
			return err
		}
	}
}

// sendAll sends one message for each of params, each after its interval.
func sendAll(stream grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse], params []*testpb.ResponseParameters) error {
	for _, p := range params {
		if err := sleep(stream.Context(), time.Duration(p.GetIntervalUs())*time.Microsecond); err != nil {
			return err
		}
		payload, err := newPayload(p.GetSize())
		if err != nil {
			return err
		}
		if err := stream.Send(&testpb.StreamingOutputCallResponse{Payload: payload}); err != nil {
			return err
		}
	}
	return nil
}

// echoStatus returns the status a request asks for, nil for none.
func echoStatus(want *testpb.EchoStatus) error {
	if want.GetCode() == 0 {
		return nil
	}
	return status.Error(codes.Code(want.GetCode()), want.GetMessage())
}

func newPayload(size int32) (*testpb.Payload, error) {
	if size < 0 || size > maxPayload {
		return nil, status.Errorf(codes.InvalidArgument, "response size %d is not in 0 to %d", size, maxPayload)
	}
	return &testpb.Payload{Body: make([]byte, size)}, nil
}
