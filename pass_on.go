package grpcproxy

import (
	"errors"
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
)

var errNotGRPC = errors.New("the request is not gRPC, and no other handler takes it")

// passOn gives the next handler a request that is not for this one. If nobody takes it, Caddy would answer 200 with nothing
// in it, which looks like success. For a POST it is the answer here: by gRPC's PROTOCOL-HTTP2.md, "if Content-Type does not
// begin with "application/grpc", gRPC servers SHOULD respond with HTTP status of 415". And a call that nobody takes is
// UNIMPLEMENTED, as with a server that does not have the service.
func passOn(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if err := next.ServeHTTP(w, r); err != nil || r.Method != http.MethodPost {
		return err
	}
	// Caddy's last handler, which does nothing, leaves word that it was reached.
	const unhandled = "unhandled"
	if nobody, ok := caddyhttp.GetVar(r.Context(), unhandled).(bool); !ok || !nobody {
		return nil
	}
	caddyhttp.SetVar(r.Context(), unhandled, false) // or the access log says NOP
	if !web.IsGRPC(r) {
		return caddyhttp.Error(http.StatusUnsupportedMediaType, errNotGRPC)
	}
	web.Prepare(w.Header(), r)
	service, _, _ := grpcwire.SplitMethod(r.URL.Path)
	sendStatus(w, r, grpcwire.Unimplemented, "unknown service "+service)
	return nil
}
