package e2e

import (
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// endpointAt is the endpoint with this address that the running Caddy has.
func endpointAt(t *testing.T, addr string) (end *transport.Endpoint) {
	t.Helper()
	eventually(t, "the endpoint is there", func() bool {
		transport.Pool.Range(func(_ string, e *transport.Endpoint) bool {
			if e.Address() == addr {
				end = e
			}
			return end == nil
		})
		return end != nil
	})
	return end
}
