package e2e

import (
	"slices"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// A fieldCase is a fault that was seen in the field: in trials, in public bug reports of this and of other proxies, or by
// a peer that is not ours.
type fieldCase struct {
	name string
	// origin says in one line what was seen, and where the right behaviour is specified.
	origin string
	run    func(t *testing.T)
}

// TestField runs every fault of the field against a whole Caddy with real clients and upstreams.
func TestField(t *testing.T) {
	for _, c := range slices.Concat(fieldEngine, fieldFlow, fieldTransport, fieldCalls, fieldHealth, fieldCaddy) {
		t.Run(c.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			t.Log(c.origin)
			c.run(t)
		})
	}
}
