package e2e

import (
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestManyStreams: 2,000 bidirectional streams at once, over ten client connections (Caddy's server takes 250 streams on
// each), in front of three upstreams. Clients and upstreams are in this process too, and so in its figures.
func TestManyStreams(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	wiretest.CheckLeaks(t)
	const connections, perConnection, rounds = 10, 200, 3
	backends := []*backendtest.Backend{
		backendtest.Start(t, backendtest.Options{}), backendtest.Start(t, backendtest.Options{}), backendtest.Start(t, backendtest.Options{}),
	}
	p := balanced(t, "round_robin", backends...)
	spread(t, client(t, p.H2C), 30, 1, backends...) // all connections to the upstreams are there
	goroutines, memory := runtime.NumGoroutine(), rss(t, os.Getpid())

	ctx := within(t, 40*time.Second)
	var conns []*grpc.ClientConn
	var streams []testgrpc.TestService_FullDuplexCallClient
	for range connections {
		cc, err := grpc.NewClient("passthrough:///"+p.H2C, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, cc)
		for range perConnection {
			s, err := testgrpc.NewTestServiceClient(cc).FullDuplexCall(ctx)
			if err != nil {
				t.Fatal(err)
			}
			streams = append(streams, s)
		}
	}
	for round := range rounds {
		start := time.Now()
		var wg sync.WaitGroup
		for _, s := range streams {
			wg.Go(func() {
				if err := pingPong(s, 100); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		wg.Wait()
		t.Logf("round %d of %d streams took %v", round, len(streams), time.Since(start).Round(time.Millisecond))
		if t.Failed() {
			return
		}
	}
	var open []int64
	for _, b := range backends {
		open = append(open, b.Active())
	}
	t.Logf("streams at the upstreams: %v; goroutines: %d, %d without streams; memory: %.0f MiB, %.0f MiB without",
		open, runtime.NumGoroutine(), goroutines, mib(rss(t, os.Getpid())), mib(memory))
	if open[0]+open[1]+open[2] != connections*perConnection {
		t.Error("some streams are not open")
	}
	for _, s := range streams {
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range streams {
		if _, err := s.Recv(); ended(err) != nil {
			t.Fatalf("a stream ended with %v", err)
		}
	}
	for _, cc := range conns {
		_ = cc.Close()
	}
	// The test's own connection to the proxy and those to the upstreams stay; a few timers may just be running.
	eventually(t, "the goroutines are gone", func() bool { return runtime.NumGoroutine() <= goroutines+5 })
}
