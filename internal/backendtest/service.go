package backendtest

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

// service is grpc.testing.TestService as grpc-go's interop server has it. Besides, a request that asks for no response
// of any size is answered with its own payload.
type service struct {
	testpb.UnimplementedTestServiceServer
	name string
}

func (*service) EmptyCall(context.Context, *testpb.Empty) (*testpb.Empty, error) {
	return new(testpb.Empty), nil
}

func (s *service) UnaryCall(_ context.Context, in *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
	if err := echoStatus(in.GetResponseStatus()); err != nil {
		return nil, err
	}
	out := &testpb.SimpleResponse{Payload: in.GetPayload(), Hostname: s.name}
	if in.GetFillServerId() {
		out.ServerId = s.name
	}
	if in.GetResponseSize() != 0 {
		var err error
		if out.Payload, err = payload(in.GetResponseType(), in.GetResponseSize()); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (*service) StreamingOutputCall(in *testpb.StreamingOutputCallRequest, stream grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error {
	if err := echoStatus(in.GetResponseStatus()); err != nil {
		return err
	}
	return respond(in, stream)
}

func (*service) StreamingInputCall(stream grpc.ClientStreamingServer[testpb.StreamingInputCallRequest, testpb.StreamingInputCallResponse]) error {
	sum := 0
	for {
		in, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&testpb.StreamingInputCallResponse{AggregatedPayloadSize: int32(sum)})
		}
		if err != nil {
			return err
		}
		sum += len(in.GetPayload().GetBody())
	}
}

func (*service) FullDuplexCall(stream grpc.BidiStreamingServer[testpb.StreamingOutputCallRequest, testpb.StreamingOutputCallResponse]) error {
	for {
		in, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := echoStatus(in.GetResponseStatus()); err != nil {
			return err
		}
		if err := respond(in, stream); err != nil {
			return err
		}
	}
}

func (*service) HalfDuplexCall(stream grpc.BidiStreamingServer[testpb.StreamingOutputCallRequest, testpb.StreamingOutputCallResponse]) error {
	var all []*testpb.StreamingOutputCallRequest
	for {
		in, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		all = append(all, in)
	}
	for _, in := range all {
		if err := respond(in, stream); err != nil {
			return err
		}
	}
	return nil
}

// responder is the sending half of both kinds of stream.
type responder interface {
	Context() context.Context
	Send(*testpb.StreamingOutputCallResponse) error
}

// respond sends the responses that a request asks for, or its payload if it asks for none.
func respond(in *testpb.StreamingOutputCallRequest, to responder) error {
	if len(in.GetResponseParameters()) == 0 && in.GetPayload() != nil {
		return to.Send(&testpb.StreamingOutputCallResponse{Payload: in.GetPayload()})
	}
	for _, p := range in.GetResponseParameters() {
		if err := sleep(to.Context(), time.Duration(p.GetIntervalUs())*time.Microsecond); err != nil {
			return err
		}
		body, err := payload(in.GetResponseType(), p.GetSize())
		if err != nil {
			return err
		}
		if err := to.Send(&testpb.StreamingOutputCallResponse{Payload: body}); err != nil {
			return err
		}
	}
	return nil
}

func echoStatus(st *testpb.EchoStatus) error {
	return status.Error(codes.Code(st.GetCode()), st.GetMessage()) // nil for OK.
}

// zeros is what payloads are made of. It is never written to.
var zeros = make([]byte, 1<<20)

func payload(typ testpb.PayloadType, size int32) (*testpb.Payload, error) {
	if typ != testpb.PayloadType_COMPRESSABLE {
		return nil, status.Errorf(codes.InvalidArgument, "payload type %v is not supported", typ)
	}
	if size < 0 {
		return nil, status.Errorf(codes.InvalidArgument, "a payload of size %d is asked for", size)
	}
	body := zeros
	if int(size) > len(body) {
		body = make([]byte, size)
	}
	return &testpb.Payload{Type: typ, Body: body[:size]}, nil
}
