package main

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func TestBackend(t *testing.T) {
	backends, err := startBackends(2, time.Microsecond)
	if err != nil {
		t.Fatal(err)
	}
	defer stopBackends(backends)
	if backends[0].delay != 0 || backends[1].delay != time.Microsecond {
		t.Errorf("delays %s and %s", backends[0].delay, backends[1].delay)
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	conn := dial(t, backends[1].port, insecure.NewCredentials())
	rpc := testpb.NewTestServiceClient(conn)

	var head metadata.MD
	resp, err := rpc.UnaryCall(ctx, &testpb.SimpleRequest{FillServerId: true, ResponseSize: 7}, grpc.Header(&head))
	if err != nil || resp.GetServerId() != "b2" || len(resp.GetPayload().GetBody()) != 7 {
		t.Errorf("got %v, %v", resp, err)
	}
	if got := head.Get(backendKey); len(got) != 1 || got[0] != "b2" {
		t.Errorf("head names %q", got)
	}
	for _, size := range []int32{-1, maxPayload + 1} {
		if _, err := rpc.UnaryCall(ctx, &testpb.SimpleRequest{ResponseSize: size}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("size %d: got %v", size, err)
		}
	}
	_, err = rpc.UnaryCall(ctx, &testpb.SimpleRequest{ResponseStatus: &testpb.EchoStatus{Code: 5, Message: "gone"}}, grpc.Header(&head))
	if s := status.Convert(err); s.Code() != codes.NotFound || s.Message() != "gone" || len(head.Get(backendKey)) != 1 {
		t.Errorf("got %v, head %v", err, head)
	}
	if _, err := rpc.UnimplementedCall(ctx, &testpb.Empty{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
	if _, err := rpc.EmptyCall(ctx, &testpb.Empty{}); err != nil {
		t.Error(err)
	}
	health, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: testService})
	if err != nil || health.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("got %v, %v", health, err)
	}
	// The six calls above; health does not count.
	if got := backends[1].calls.Load(); got != 6 {
		t.Errorf("%d calls counted", got)
	}
}

// The kinds and statuses the client makes, straight to a backend, and what it finds out about each.
func TestClientAgainstBackend(t *testing.T) {
	backends, err := startBackends(1, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer stopBackends(backends)
	s := newStats(backends)
	conn := dial(t, backends[0].port, insecure.NewCredentials())
	c := &client{conn: conn, rpc: testpb.NewTestServiceClient(conn), stats: s, ctx: t.Context()}
	steps := []step{
		{unary, codes.OK},
		{unary, codes.NotFound},
		{clientStream, codes.OK},
		{serverStream, codes.OK},
		{serverStream, codes.DeadlineExceeded},
		{bidi, codes.OK},
	}
	for i, step := range steps {
		before := s.report()
		c.call(step)
		after := s.report()
		if n := after.backends[0].calls; n != int64(i+1) {
			t.Errorf("%v: backend has %d calls, want %d", step, n, i+1)
		}
		if got := after.kinds[step.kind].codes[step.want] - before.kinds[step.kind].codes[step.want]; got != 1 {
			t.Errorf("%v: ended with another status: %v", step, after.all.codes)
		}
	}
	if got := backends[0].calls.Load(); got != int64(len(steps)) {
		t.Errorf("the backend saw %d calls", got)
	}

	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	c.ctx = canceled
	c.call(step{bidi, codes.OK})
	if r := s.report(); r.unanswered.codes[codes.Canceled] != 1 {
		t.Errorf("a call that reached no backend: %+v", r.unanswered)
	}
}

// Open streams, idle on both sides, do not hold up the stop for longer than backendGrace.
func TestStopBackendsCutsStreams(t *testing.T) {
	backends, err := startBackends(3, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	stream, err := testpb.NewTestServiceClient(dial(t, backends[0].port, insecure.NewCredentials())).FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Header(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	stopBackends(backends)
	if took := time.Since(begin); took < backendGrace || took > backendGrace+5*time.Second {
		t.Errorf("took %s", took)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
}

// Each cycle of calls has all kinds and both statuses; and the calls that fail go round any number of backends.
func TestPlan(t *testing.T) {
	seen := make(map[step]int)
	for n := range 37 {
		seen[plan(n)]++
		if plan(n) != plan(n+37) {
			t.Errorf("%d is %v, then %v", n, plan(n), plan(n+37))
		}
	}
	for _, s := range []step{{unary, codes.OK}, {clientStream, codes.OK}, {serverStream, codes.OK}, {bidi, codes.OK}} {
		if seen[s] < 5 {
			t.Errorf("%v %d times in a cycle", s, seen[s])
		}
	}
	for _, s := range []step{{unary, codes.NotFound}, {serverStream, codes.DeadlineExceeded}} {
		if seen[s] != 1 {
			t.Errorf("%v %d times in a cycle", s, seen[s])
		}
	}
	for backends := 2; backends <= 9; backends++ {
		if 37%backends == 0 {
			t.Errorf("with %d backends in turn, the same one always fails", backends)
		}
	}
}
