package e2e

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"google.golang.org/grpc"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
)

// kind is one of gRPC's four kinds of RPC, by a method of grpc.testing.TestService.
type kind struct {
	name, method   string
	client, server bool // which side streams
}

var kinds = []kind{
	{"unary", "UnaryCall", false, false},
	{"client", "StreamingInputCall", true, false},
	{"server", "StreamingOutputCall", false, true},
	{"bidi", "FullDuplexCall", true, true},
}

func (k kind) path() string { return "/" + backendtest.Service + "/" + k.method }

// stream is a client's end of a call, whatever carries it.
type stream interface {
	Send(m proto.Message) error
	CloseSend() error
	// Recv returns io.EOF after the last message of a call that ended with OK, and else the status as an error.
	Recv(m proto.Message) error
	// Header waits for the header metadata; it is empty for Trailers-Only. Trailer is complete after Recv has failed.
	Header() (metadata.MD, error)
	Trailer() metadata.MD
}

// opener begins a call.
type opener func(ctx context.Context, k kind) (stream, error)

// grpcStream is grpc-go's.
type grpcStream struct{ grpc.ClientStream }

func (s grpcStream) Send(m proto.Message) error { return s.SendMsg(m) }
func (s grpcStream) Recv(m proto.Message) error { return s.RecvMsg(m) }

func openGRPC(cc *grpc.ClientConn) opener {
	return func(ctx context.Context, k kind) (stream, error) {
		s, err := cc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: k.client, ServerStreams: k.server}, k.path(),
			grpc.MaxCallRecvMsgSize(64<<20))
		if err != nil {
			return nil, err
		}
		return grpcStream{s}, nil
	}
}

// sizes are those of the messages' payloads: nothing at all, less and more than a frame, more than a flow-control window.
var sizes = []int{0, 1, 1000, 20_000, 100_000}

// body is the payload of the n-th message of one side.
func body(side byte, n, size int) *testgrpc.Payload {
	b := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{side, byte(n)}).Read(b)
	return &testgrpc.Payload{Body: b}
}

const (
	fromClient byte = iota
	fromServer
)

// hour in microseconds: a response that does not come.
const hour = 3600 * 1_000_000 / 2

// requests are what the client says in a call of the kind, responses what a whole answer consists of.
func (k kind) requests() (in []proto.Message) {
	switch {
	case k.client && k.server:
		for i, n := range sizes {
			in = append(in, &testgrpc.StreamingOutputCallRequest{Payload: body(fromClient, i, n)})
		}
	case k.client:
		for i, n := range sizes {
			in = append(in, &testgrpc.StreamingInputCallRequest{Payload: body(fromClient, i, n)})
		}
	case k.server:
		in = append(in, streamRequest(sizes))
	default:
		in = append(in, &testgrpc.SimpleRequest{Payload: body(fromClient, 0, 30_000), FillServerId: true})
	}
	return in
}

func streamRequest(sizes []int) *testgrpc.StreamingOutputCallRequest {
	r := &testgrpc.StreamingOutputCallRequest{Payload: body(fromClient, 0, 500)}
	for _, n := range sizes {
		r.ResponseParameters = append(r.ResponseParameters, &testgrpc.ResponseParameters{Size: int32(n)})
	}
	return r
}

func (k kind) responses(backend string) (out []proto.Message) {
	switch {
	case k.client && k.server: // echoed
		for i, n := range sizes {
			out = append(out, &testgrpc.StreamingOutputCallResponse{Payload: body(fromClient, i, n)})
		}
	case k.client:
		sum := 0
		for _, n := range sizes {
			sum += n
		}
		out = append(out, &testgrpc.StreamingInputCallResponse{AggregatedPayloadSize: int32(sum)})
	case k.server:
		for i, n := range sizes {
			out = append(out, &testgrpc.StreamingOutputCallResponse{Payload: body(fromServer, i, n)})
		}
	default:
		out = append(out, &testgrpc.SimpleResponse{Payload: body(fromClient, 0, 30_000), ServerId: backend, Hostname: backend})
	}
	return out
}

// response is an empty message of the kind's type.
func (k kind) response() proto.Message {
	switch {
	case k.server:
		return new(testgrpc.StreamingOutputCallResponse)
	case k.client:
		return new(testgrpc.StreamingInputCallResponse)
	}
	return new(testgrpc.SimpleResponse)
}

// talk holds the whole conversation: in a bidirectional call in turns, else all requests first. It returns what came
// back and the error that ended it, nil for OK.
func talk(s stream, k kind) (got []proto.Message, err error) {
	for _, m := range k.requests() {
		// A call that has ended refuses messages; Recv tells why it has.
		if s.Send(m) != nil {
			break
		}
		if k.client && k.server {
			if got, err = recv(s, k, got); err != nil {
				return got, ended(err)
			}
		}
	}
	_ = s.CloseSend()
	for err == nil {
		got, err = recv(s, k, got)
		if !k.server && err == nil {
			// grpc-go knows that there is but one, and has seen the end already; others have to look.
			if _, ok := s.(grpcStream); ok {
				return got, nil
			}
		}
	}
	return got, ended(err)
}

func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func recv(s stream, k kind, got []proto.Message) ([]proto.Message, error) {
	m := k.response()
	if err := s.Recv(m); err != nil {
		return got, err
	}
	return append(got, m), nil
}

// begin leads the conversation into its middle, where either side waits for the other: two messages each way, where
// the kind has as many. It returns what came back and what the backend must have seen.
func begin(t *testing.T, s stream, k kind) (got, sent []proto.Message) {
	t.Helper()
	switch {
	case k.client:
		sent = k.requests()[1:3]
	case k.server:
		r := streamRequest(sizes[1:3])
		r.ResponseParameters = append(r.ResponseParameters, &testgrpc.ResponseParameters{IntervalUs: hour})
		sent = append(sent, r)
	default:
		sent = k.requests()
	}
	for _, m := range sent {
		if err := s.Send(m); err != nil {
			t.Fatalf("sending: %v", err)
		}
		if k.client && k.server {
			var err error
			if got, err = recv(s, k, got); err != nil {
				t.Fatalf("receiving: %v", err)
			}
		}
	}
	if !k.client {
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
	}
	if k.server && !k.client {
		for range 2 {
			var err error
			if got, err = recv(s, k, got); err != nil {
				t.Fatalf("receiving: %v", err)
			}
		}
	}
	return got, sent
}

// halfway are the responses that begin receives.
func (k kind) halfway() (out []proto.Message) {
	switch {
	case !k.server:
	case k.client:
		out = k.responses("")[1:3]
	default:
		for i, n := range sizes[1:3] {
			out = append(out, &testgrpc.StreamingOutputCallResponse{Payload: body(fromServer, i, n)})
		}
	}
	return out
}

func sameMessages(t *testing.T, what string, got, want []proto.Message) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: %d messages, want %d", what, len(got), len(want))
		return
	}
	for i := range got {
		if !proto.Equal(got[i], want[i]) {
			t.Errorf("%s: message %d differs: %d bytes, want %d", what, i, proto.Size(got[i]), proto.Size(want[i]))
		}
	}
}

// keyStall, in the metadata of a unary call, makes its handler wait for the call's end.
const keyStall = "x-witness-stall"

// witness is a part of a backend that keeps the requests of the call that came last, and puts content into the
// responses that the backend makes up.
type witness struct {
	mu  sync.Mutex
	got []proto.Message
}

func (w *witness) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			w.reset(proto.Clone(req.(proto.Message)))
			if len(metadata.ValueFromIncomingContext(ctx, keyStall)) > 0 {
				<-ctx.Done()
				return nil, status.FromContextError(ctx.Err()).Err()
			}
			return h(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			w.reset()
			return h(srv, &witnessed{ServerStream: ss, w: w, fill: !info.IsClientStream})
		}),
	}
}

func (w *witness) reset(first ...proto.Message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.got = first
}

func (w *witness) seen() []proto.Message {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.got
}

type witnessed struct {
	grpc.ServerStream
	w    *witness
	fill bool
	sent int
}

func (s *witnessed) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if err == nil {
		s.w.mu.Lock()
		s.w.got = append(s.w.got, proto.Clone(m.(proto.Message)))
		s.w.mu.Unlock()
	}
	return err
}

func (s *witnessed) SendMsg(m any) error {
	if r, ok := m.(*testgrpc.StreamingOutputCallResponse); ok && s.fill {
		m = &testgrpc.StreamingOutputCallResponse{Payload: body(fromServer, s.sent, len(r.GetPayload().GetBody()))}
	}
	s.sent++
	return s.ServerStream.SendMsg(m)
}
