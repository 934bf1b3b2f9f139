package grpcproxy

import (
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
)

// ServeHTTP proxies one RPC, or passes a request that is not gRPC to the next handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if !web.IsGRPC(r) {
		return passOn(w, r, next)
	}
	h.web.Serve(w, r)
	return nil
}
