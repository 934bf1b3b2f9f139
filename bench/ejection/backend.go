package main

import (
	"net"
	"net/http"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

// backend answers StreamingOutputCall in a way of its own.
type backend struct {
	testpb.UnimplementedTestServiceServer
	addr   string
	calls  atomic.Int64
	answer func(grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error
	stop   func()
}

// StreamingOutputCall counts the call and answers it.
func (b *backend) StreamingOutputCall(_ *testpb.StreamingOutputCallRequest, s grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error {
	b.calls.Add(1)
	return b.answer(s)
}

func startGRPC(answer func(grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error) (*backend, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := grpc.NewServer()
	b := &backend{addr: l.Addr().String(), answer: answer, stop: s.Stop}
	testpb.RegisterTestServiceServer(s, b)
	go func() { _ = s.Serve(l) }()
	return b, nil
}

func startSound() (*backend, error) {
	return startGRPC(func(s grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error {
		return s.Send(new(testpb.StreamingOutputCallResponse))
	})
}

var errDatabase = status.Error(codes.Unavailable, "the database is away")

func startTrailersOnly() (*backend, error) {
	return startGRPC(func(grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error { return errDatabase })
}

func startAfterMessage() (*backend, error) {
	return startGRPC(func(s grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error {
		if err := s.Send(new(testpb.StreamingOutputCallResponse)); err != nil {
			return err
		}
		return errDatabase
	})
}

// startSilent takes calls and never says anything, not even that their time is over, as a server does whose threads are
// all stuck.
func startSilent() (*backend, error) {
	over := make(chan struct{})
	b, err := startGRPC(func(grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error {
		<-over
		return nil
	})
	if err != nil {
		return nil, err
	}
	stop := b.stop
	b.stop = func() {
		close(over)
		stop()
	}
	return b, nil
}

// start503 answers as another proxy does that has lost its servers.
func start503() (*backend, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	b := &backend{addr: l.Addr().String()}
	s := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			b.calls.Add(1)
			http.Error(w, "no server is available", http.StatusServiceUnavailable)
		}),
		Protocols: new(http.Protocols),
	}
	s.Protocols.SetUnencryptedHTTP2(true)
	b.stop = func() { _ = s.Close() }
	go func() { _ = s.Serve(l) }()
	return b, nil
}
