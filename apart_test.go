package grpcproxy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
)

// Nothing of a call reaches another one, however many come and go at once, and however they end: what calls are made of is used again.
func TestCallsKeepApart(t *testing.T) {
	one, two := backendtest.Start(t, backendtest.Options{}), backendtest.Start(t, backendtest.Options{})
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "grpc_proxy " + one.Addr() + " " + two.Addr()}})
	calls := 150
	if testing.Short() {
		calls = 60
	}
	var wg sync.WaitGroup
	for i := range 4 {
		cc, err := grpc.NewClient(r.H2C, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = cc.Close() }()
		for j := range 8 {
			wg.Go(func() {
				random := rand.New(rand.NewPCG(uint64(i), uint64(j)))
				for k := range calls {
					c := &apartCall{client: testpb.NewTestServiceClient(cc), random: random, id: fmt.Sprintf("%d-%d-%d", i, j, k)}
					if err := c.do(t.Context()); err != nil {
						t.Errorf("call %s: %v", c.id, err)
						return
					}
				}
			})
		}
	}
	wg.Wait()
}

// apartCall is a call that knows its own answer.
type apartCall struct {
	client testpb.TestServiceClient
	random *rand.Rand
	id     string
}

// body is some bytes that no other call has.
func (c *apartCall) body() []byte {
	most := [...]int{5, 50, 3000}[c.random.IntN(3)]
	return bytes.Repeat([]byte(c.id+" "), 1+c.random.IntN(most))
}

func (c *apartCall) do(ctx context.Context) error {
	ctx = metadata.AppendToOutgoingContext(ctx, backendtest.KeyHeader, "x-id="+c.id, backendtest.KeyTrailer, "x-id="+c.id)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ending := []codes.Code{codes.OK}
	switch c.random.IntN(8) {
	case 0: // the client gives up
		ctx = metadata.AppendToOutgoingContext(ctx, backendtest.KeyDelay, "2ms")
		time.AfterFunc(time.Duration(c.random.IntN(4000))*time.Microsecond, cancel)
		ending = append(ending, codes.Canceled)
	case 1: // the deadline passes, or does not
		ctx = metadata.AppendToOutgoingContext(ctx, backendtest.KeyDelay, "2ms")
		ctx, cancel = context.WithTimeout(ctx, time.Duration(1+c.random.IntN(5))*time.Millisecond)
		defer cancel()
		ending = append(ending, codes.DeadlineExceeded)
	case 2:
		ctx = metadata.AppendToOutgoingContext(ctx, backendtest.KeyStatus, "FAILED_PRECONDITION", backendtest.KeyMessage, c.id)
		return c.failed(c.unary(ctx))
	case 3: // a deadline that the call keeps
		ctx, cancel = context.WithTimeout(ctx, time.Minute)
		defer cancel()
	case 4:
		return c.conversation(ctx)
	}
	if err := c.unary(ctx); !slices.Contains(ending, status.Code(err)) {
		return err
	}
	return nil
}

// failed checks the status that was asked for.
func (c *apartCall) failed(err error) error {
	if s := status.Convert(err); s.Code() != codes.FailedPrecondition || s.Message() != c.id {
		return fmt.Errorf("want its own status, got %w", err)
	}
	return nil
}

func (c *apartCall) unary(ctx context.Context) error {
	var header, trailer metadata.MD
	in := &testpb.SimpleRequest{Payload: &testpb.Payload{Body: c.body()}}
	out, err := c.client.UnaryCall(ctx, in, grpc.Header(&header), grpc.Trailer(&trailer))
	if err != nil {
		return err
	}
	if !bytes.Equal(out.GetPayload().GetBody(), in.GetPayload().GetBody()) {
		return fmt.Errorf("%d bytes came back that are not the %d that were sent", len(out.GetPayload().GetBody()), len(in.GetPayload().GetBody()))
	}
	if h, t := header.Get("x-id"), trailer.Get("x-id"); !slices.Equal(h, []string{c.id}) || !slices.Equal(t, []string{c.id}) {
		return fmt.Errorf("header %q, trailer %q", h, t)
	}
	return nil
}

// conversation is a stream of some messages, each of which is answered.
func (c *apartCall) conversation(ctx context.Context) error {
	stream, err := c.client.FullDuplexCall(ctx)
	if err != nil {
		return err
	}
	for range c.random.IntN(4) {
		body := c.body()
		err := stream.Send(&testpb.StreamingOutputCallRequest{Payload: &testpb.Payload{Body: body}})
		if err != nil {
			return err
		}
		out, err := stream.Recv()
		if err != nil {
			return err
		}
		if !bytes.Equal(out.GetPayload().GetBody(), body) {
			return fmt.Errorf("%d bytes came back that are not the %d that were sent", len(out.GetPayload().GetBody()), len(body))
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		return err
	}
	if got := stream.Trailer().Get("x-id"); !slices.Equal(got, []string{c.id}) {
		return fmt.Errorf("trailer %q", got)
	}
	return nil
}
