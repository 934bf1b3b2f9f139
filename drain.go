package grpcproxy

import (
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// noteCalls notes how far the calls on an endpoint are. endThem ends those that are no farther, since the endpoint hangs.
func (h *Handler) noteCalls(end *transport.Endpoint) (endThem func()) {
	endStuck := h.proxy.NoteCalls(end)
	return func() {
		n := endStuck(proxy.Fail(grpcwire.Unavailable, proxy.ReasonHung, "the upstream hangs: it has not answered a health check in time, and nothing has moved on the call since"))
		if n > 0 {
			h.logger.Info("ended calls on an upstream that hangs", zap.String("upstream", end.Address()), zap.Int("calls", n))
		}
	}
}

// exitMargin is kept of a grace period for the last frames to leave.
const exitMargin = 200 * time.Millisecond

// onShutdown runs when the server begins to shut down: on a reload, or because Caddy exits. Cleanup may have run
// already, or not. Running calls go on; how long, depends on which of the two it is.
func (h *Handler) onShutdown() {
	h.shutdown.Do(func() {
		if caddy.Exiting() {
			h.endAfter(h.exitDelay(), shuttingDown())
			return
		}
		go h.watchExit()
		if h.StreamCloseDelay > 0 {
			h.endAfter(time.Duration(h.StreamCloseDelay), proxy.Fail(grpcwire.Unavailable, proxy.ReasonReload,
				"the proxy was reloaded with a new configuration (stream_close_delay)"))
		}
	})
}

// endAfter ends the handler's calls when the delay is over. The timer outlives the handler on purpose: its calls do too.
func (h *Handler) endAfter(delay time.Duration, f *proxy.Failure) {
	time.AfterFunc(delay, func() {
		if n := h.proxy.EndAll(f); n > 0 {
			h.logger.Info("ended running calls", zap.Int("calls", n), zap.String("why", f.Message), zap.Duration("after", delay))
		}
	})
}

// exitDelay is how long calls may go on when Caddy exits: the grace period, if there is one, less what it takes to
// end them properly.
func (h *Handler) exitDelay() time.Duration {
	if app, err := h.ctx.App("http"); err == nil {
		if a, ok := app.(*caddyhttp.App); ok && a.GracePeriod > 0 {
			grace := time.Duration(a.GracePeriod)
			return max(grace-exitMargin, grace/2)
		}
	}
	return time.Duration(h.ExitTimeout)
}
