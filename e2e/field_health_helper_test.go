package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
)

// rawCodec sends and takes messages as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (rawCodec) Name() string                       { return "proto" }

// A provocation is what one client does to get a bad answer from servers that are well.
type provocation struct {
	name string
	do   func(ctx context.Context, cc *grpc.ClientConn) error
	want codes.Code
}

// asks makes a call with metadata that tells the server how to answer.
func asks(namesAndValues ...string) func(context.Context, *grpc.ClientConn) error {
	return func(ctx context.Context, cc *grpc.ClientConn) error {
		_, err := testgrpc.NewTestServiceClient(cc).EmptyCall(metadata.AppendToOutgoingContext(ctx, namesAndValues...), new(testgrpc.Empty))
		return err
	}
}

var provocations = []provocation{
	{"a message that cannot be read", func(ctx context.Context, cc *grpc.ClientConn) error {
		in, out := []byte{0xff, 0xff, 0xff}, []byte(nil)
		return cc.Invoke(ctx, "/grpc.testing.TestService/UnaryCall", &in, &out, grpc.ForceCodec(rawCodec{}))
	}, codes.Internal},
	{"a method that there is not", func(ctx context.Context, cc *grpc.ClientConn) error {
		return cc.Invoke(ctx, "/grpc.testing.TestService/Nothing", new(testgrpc.Empty), new(testgrpc.Empty))
	}, codes.Unimplemented},
	{"a request that the server's code stumbles over", asks(backendtest.KeyStatus, "UNKNOWN"), codes.Unknown},
	{"a deadline that the server sees run out", asks(backendtest.KeyStatus, "DEADLINE_EXCEEDED"), codes.DeadlineExceeded},
	{"a deadline that is too short", func(ctx context.Context, cc *grpc.ClientConn) error {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		return asks(backendtest.KeyDelay, "1s")(ctx, cc)
	}, codes.DeadlineExceeded},
	{"a call that is cancelled", func(ctx context.Context, cc *grpc.ClientConn) error {
		ctx, cancel := context.WithCancel(ctx)
		time.AfterFunc(10*time.Millisecond, cancel)
		return asks(backendtest.KeyDelay, "1s")(ctx, cc)
	}, codes.Canceled},
	{"an answer with more metadata than is accepted", asks(backendtest.KeyTrailerSize, fmt.Sprint(1100<<10)), codes.Internal},
}

// provoke does it some times, so that each of two upstreams gets it.
func (p *provocation) provoke(t *testing.T, cc *grpc.ClientConn) {
	t.Helper()
	for range 8 {
		if err := p.do(within(t, timeout), cc); status.Code(err) != p.want {
			t.Errorf("%s: %v, want %v", p.name, err, p.want)
		}
	}
}
