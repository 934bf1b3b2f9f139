package grpcproxy

import (
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
)

// exitLook is how often the handler of an earlier configuration looks whether Caddy exits.
const exitLook = 100 * time.Millisecond

func shuttingDown() *proxy.Failure {
	return proxy.Fail(grpcwire.Unavailable, proxy.ReasonExit, "the proxy is shutting down")
}

// outlasting is how many handlers of earlier configurations have calls.
var outlasting atomic.Int64

// watchExit ends the calls of a configuration that a reload has replaced when Caddy exits. Caddy waits for them then,
// without end if there is no grace period, but its hooks for shutdown belong to the configuration that is running: what
// it was replaced by may not even have a grpc_proxy. So the handler looks for itself, for as long as it has calls.
func (h *Handler) watchExit() {
	outlasting.Add(1)
	defer outlasting.Add(-1)
	look := time.NewTicker(exitLook)
	defer look.Stop()
	for ending := false; h.proxy.Running() > 0; <-look.C {
		if !ending && caddy.Exiting() {
			ending = true
			h.endAfter(h.exitDelay(), shuttingDown())
		}
	}
}
