package grpcproxy

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
)

func init() {
	caddy.RegisterModule(new(Respond))
	httpcaddyfile.RegisterHandlerDirective("grpc_respond", parseRespond)
	httpcaddyfile.RegisterDirectiveOrder("grpc_respond", httpcaddyfile.Before, "respond")
}

// Respond answers gRPC calls with a status, so that routes in front of grpc_proxy can speak gRPC: maintenance, denial,
// an unknown service. Requests that are not gRPC go to the next handler.
type Respond struct {
	// The gRPC status code, as a number or a name (`UNAVAILABLE`, `Unavailable`). Placeholders are resolved per call.
	Code grpcwire.CodeText `json:"code,omitempty"`

	// The status message. Placeholders are resolved per call.
	Message string `json:"message,omitempty"`

	// Metadata to send with the status. Placeholders in the values are resolved per call.
	Metadata map[string][]string `json:"metadata,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*Respond) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.grpc_respond",
		New: func() caddy.Module { return new(Respond) },
	}
}

func parseRespond(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	g := new(Respond)
	if err := g.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	return g, nil
}

// UnmarshalCaddyfile sets up the handler. Syntax:
//
//	grpc_respond [<matcher>] <code> [<message>] {
//	    metadata <key> <values...>
//	}
func (g *Respond) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	args := d.RemainingArgs()
	switch len(args) {
	case 2:
		g.Message = args[1]
		fallthrough
	case 1:
		g.Code = grpcwire.CodeText(args[0])
	default:
		return d.ArgErr()
	}
	if err := g.Validate(); err != nil {
		return d.WrapErr(err)
	}
	for d.NextBlock(0) {
		if d.Val() != "metadata" {
			return d.Errf("unrecognized subdirective %q; expected metadata", d.Val())
		}
		kv := d.RemainingArgs()
		if len(kv) < 2 {
			return d.ArgErr()
		}
		if g.Metadata == nil {
			g.Metadata = make(map[string][]string)
		}
		g.Metadata[kv[0]] = append(g.Metadata[kv[0]], kv[1:]...)
		if err := g.Validate(); err != nil {
			return d.WrapErr(err)
		}
	}
	return nil
}

// Validate refuses codes that are none, and metadata that would not reach the client.
func (g *Respond) Validate() error {
	if g.Code == "" {
		return fmt.Errorf("grpc_respond needs a status code, such as UNAVAILABLE")
	}
	for _, key := range slices.Sorted(maps.Keys(g.Metadata)) {
		if err := checkOwnMetadata(key); err != nil {
			return fmt.Errorf("metadata: %w", err)
		}
	}
	if hasPlaceholder(string(g.Code)) {
		return nil
	}
	_, err := grpcwire.ParseCode(string(g.Code))
	return err
}

// ServeHTTP answers a gRPC call.
func (g *Respond) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if !web.IsGRPC(r) {
		return passOn(w, r, next)
	}
	web.NameCall(r)
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	message := repl.ReplaceKnown(g.Message, "")
	code, err := grpcwire.ParseCode(repl.ReplaceKnown(string(g.Code), ""))
	if err != nil {
		code, message = grpcwire.Internal, "grpc_respond: "+err.Error()
	}
	header := w.Header()
	web.Prepare(header, r)
	for key, values := range g.Metadata {
		for _, v := range values {
			header.Add(key, repl.ReplaceKnown(v, ""))
		}
	}
	sendStatus(w, r, code, message)
	return nil
}

// sendStatus answers with a status and what the header has already (Trailers-Only).
func sendStatus(w http.ResponseWriter, r *http.Request, code grpcwire.Code, message string) {
	header := w.Header()
	header["Content-Type"] = web.AnswerType(r)
	header["Grpc-Status"] = []string{strconv.FormatUint(uint64(code), 10)}
	if message != "" {
		header["Grpc-Message"] = []string{grpcwire.EncodeMessage(message)}
	}
	w.WriteHeader(http.StatusOK)
	web.Tidy(w, r, false)
}

// Interface guards
var (
	_ caddyhttp.MiddlewareHandler = (*Respond)(nil)
	_ caddyfile.Unmarshaler       = (*Respond)(nil)
	_ caddy.Validator             = (*Respond)(nil)
)
