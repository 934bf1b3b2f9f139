package e2e

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// dialTLS runs a proxy with TLS on both sides and returns a client's connection.
func dialTLS(t *testing.T, ca *wiretest.CA, upstream string) *grpc.ClientConn {
	t.Helper()
	cert, key := ca.PairFiles(ca.ServerCert())
	p := proxytest.Start(t, proxytest.Options{
		Site:     "grpc_proxy https://" + upstream + " {\n\ttls_trust_pool file " + ca.File() + "\n}",
		CertFile: cert, KeyFile: key,
	})
	return dial(t, p.TLS, credentials.NewTLS(ca.ClientConfig()))
}

// startTLS runs a backend besides.
func startTLS(t *testing.T) (b *backendtest.Backend, cc *grpc.ClientConn) {
	t.Helper()
	ca := wiretest.NewCA(t)
	b = backendtest.Start(t, backendtest.Options{TLS: ca.ServerConfig(), Name: "b"})
	return b, dialTLS(t, ca, b.Addr())
}

// TestInteropTLS runs the cases of gRPC's interoperability suite with TLS on both sides. A case that fails ends the
// process with a line that begins with FATAL.
func TestInteropTLS(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, addr := listen(t)
	ca := wiretest.NewCA(t)
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(ca.ServerConfig())))
	testgrpc.RegisterTestServiceServer(server, interop.NewTestServer())
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	cc := dialTLS(t, ca, addr)
	c := testgrpc.NewTestServiceClient(cc)
	for _, tc := range []struct {
		name string
		do   func(ctx context.Context)
	}{
		{"empty_unary", func(ctx context.Context) { interop.DoEmptyUnaryCall(ctx, c) }},
		{"large_unary", func(ctx context.Context) { interop.DoLargeUnaryCall(ctx, c) }},
		{"client_streaming", func(ctx context.Context) { interop.DoClientStreaming(ctx, c) }},
		{"server_streaming", func(ctx context.Context) { interop.DoServerStreaming(ctx, c) }},
		{"ping_pong", func(ctx context.Context) { interop.DoPingPong(ctx, c) }},
		{"empty_stream", func(ctx context.Context) { interop.DoEmptyStream(ctx, c) }},
		{"timeout_on_sleeping_server", func(ctx context.Context) { interop.DoTimeoutOnSleepingServer(ctx, c) }},
		{"cancel_after_begin", func(ctx context.Context) { interop.DoCancelAfterBegin(ctx, c) }},
		{"cancel_after_first_response", func(ctx context.Context) { interop.DoCancelAfterFirstResponse(ctx, c) }},
		{"custom_metadata", func(ctx context.Context) { interop.DoCustomMetadata(ctx, c) }},
		{"status_code_and_message", func(ctx context.Context) { interop.DoStatusCodeAndMessage(ctx, c) }},
		{"special_status_message", func(ctx context.Context) { interop.DoSpecialStatusMessage(ctx, c) }},
		{"unimplemented_method", func(ctx context.Context) { interop.DoUnimplementedMethod(ctx, cc) }},
		{"unimplemented_service", func(ctx context.Context) {
			interop.DoUnimplementedService(ctx, testgrpc.NewUnimplementedServiceClient(cc))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			tc.do(ctx)
			if err := ctx.Err(); err != nil {
				t.Errorf("it took too long: %v", err)
			}
		})
	}
}

// TestHealth: grpc.health.v1 through the proxy: Check, and Watch, a stream that tells of changes.
func TestHealth(t *testing.T) {
	wiretest.CheckLeaks(t)
	b, cc := startTLS(t)
	c := healthpb.NewHealthClient(cc)
	ctx := within(t, timeout)
	for service, want := range map[string]codes.Code{"": codes.OK, backendtest.Service: codes.OK, "no.such": codes.NotFound} {
		r, err := c.Check(ctx, &healthpb.HealthCheckRequest{Service: service})
		if status.Code(err) != want || want == codes.OK && r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("%q: %v, %v", service, r, err)
		}
	}
	w, err := c.Watch(ctx, &healthpb.HealthCheckRequest{Service: backendtest.Service})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{
		healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING, healthpb.HealthCheckResponse_SERVING,
	} {
		b.Health.SetServingStatus(backendtest.Service, want)
		if r, err := w.Recv(); err != nil || r.GetStatus() != want {
			t.Fatalf("watching: %v, %v, want %v", r, err, want)
		}
	}
}

// TestReflection: what grpcurl and its like begin with.
func TestReflection(t *testing.T) {
	wiretest.CheckLeaks(t)
	_, cc := startTLS(t)
	s, err := reflectionpb.NewServerReflectionClient(cc).ServerReflectionInfo(within(t, timeout))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	r, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, service := range r.GetListServicesResponse().GetService() {
		names = append(names, service.GetName())
	}
	for _, want := range []string{backendtest.Service, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"} {
		if !slices.Contains(names, want) {
			t.Errorf("the services are %v; %s is missing", names, want)
		}
	}
	if err := s.Send(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: backendtest.Service},
	}); err != nil {
		t.Fatal(err)
	}
	if r, err = s.Recv(); err != nil || len(r.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Errorf("the service's file: %v, %v", r, err)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("the end: %v", err)
	}
}
