package grpcproxy_test

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

type tp struct{}

func (tp) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.grpc_proxy.selection_policies.least_request", New: func() caddy.Module { return new(tp) }}
}
func (tp) Build(s *upstream.Snapshot) selection.Picker { return tpick{s} }

type tpick struct{ s *upstream.Snapshot }

func (p tpick) Pick(in selection.PickInfo) (int, bool) {
	for i := range p.s.Endpoints {
		ok := p.s.Endpoints[i].State.Usable()
		for _, j := range in.Tried {
			if i == j {
				ok = false
			}
		}
		if ok {
			return i, true
		}
	}
	return 0, false
}

func TestMain(m *testing.M) { caddy.RegisterModule(tp{}); proxytest.Main(m) }

func TestSmoke(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	testgrpc.RegisterTestServiceServer(s, interop.NewTestServer())
	go s.Serve(l)
	defer s.Stop()
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + l.Addr().String()})
	cc, err := grpc.NewClient(p.H2C, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	c := testgrpc.NewTestServiceClient(cc)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	interop.DoEmptyUnaryCall(ctx, c)
	t.Log("empty")
	interop.DoLargeUnaryCall(ctx, c)
	t.Log("large")
	interop.DoClientStreaming(ctx, c)
	interop.DoServerStreaming(ctx, c)
	interop.DoPingPong(ctx, c)
	interop.DoEmptyStream(ctx, c)
	interop.DoTimeoutOnSleepingServer(ctx, c)
	interop.DoCancelAfterBegin(ctx, c)
	interop.DoCancelAfterFirstResponse(ctx, c)
	interop.DoCustomMetadata(ctx, c)
	interop.DoStatusCodeAndMessage(ctx, c)
	interop.DoUnimplementedMethod(ctx, cc)
	interop.DoSpecialStatusMessage(ctx, c)
	start := time.Now()
	for range 1000 {
		interop.DoEmptyUnaryCall(ctx, c)
	}
	t.Log(time.Since(start))
}
