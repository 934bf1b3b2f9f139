package grpcproxy

import (
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

// watchExit ends the calls of a configuration that a reload has replaced when Caddy exits. Caddy waits for them then,
// without end if there is no grace period, but its hooks for shutdown belong to the configuration that is running: what
// it was replaced by may not even have a grpc_proxy. So the handler looks for itself, for as long as it has calls.
func (h *Handler) watchExit() {
	look := time.NewTicker(exitLook)
	defer look.Stop()
	for h.proxy.Running() > 0 {
		<-look.C
		if caddy.Exiting() {
			h.endAfter(h.exitDelay(), shuttingDown())
			return
		}
	}
}
