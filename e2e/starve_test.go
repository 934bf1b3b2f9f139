package e2e

import (
	"testing"

	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestStalledReadersHarmNobody: clients that stop reading what they asked for hold up nobody else's calls, though all go
// over one connection to the upstream: neither those that never began to read, nor those whose windows had grown.
func TestStalledReadersHarmNobody(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	for _, tc := range []struct {
		name           string
		clients, first int // first is how many messages each reads before it stops
	}{
		{"few", 2, 0},
		{"many", 100, 0},
		{"one_warm", 1, 60},
		{"many_warm", 20, 60},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			b := backendtest.Start(t, backendtest.Options{})
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr()})
			ctx := within(t, 4*timeout)
			for range tc.clients {
				s := stalled(t, ctx, client(t, p.H2C, small...), 400, 50_000)
				for range tc.first {
					if _, err := s.Recv(); err != nil {
						t.Fatal(err)
					}
				}
			}
			c := client(t, p.H2C)
			for range 20 {
				if _, err := c.UnaryCall(within(t, timeout), &testgrpc.SimpleRequest{ResponseSize: 100_000}); err != nil {
					t.Fatal(err)
				}
			}
			if n := b.Accepted(); n != 1 {
				t.Errorf("%d connections to the upstream: the test proves nothing", n)
			}
		})
	}
}
