package grpcproxy

import (
	"context"
	"net/http"
	"net/url"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
)

// rules are header_up and header_down: operations of Caddy's on metadata.
type rules struct{ ops *headers.Handler }

// newRules returns nil where nothing is to be changed.
func newRules(ops *headers.Handler) proxy.Rules {
	if ops == nil || ops.Request == nil && ops.Response == nil {
		return nil
	}
	return rules{ops}
}

// Request implements proxy.Rules. The operations know requests only, so there is one for them, with the metadata, the authority and
// the call's placeholders.
func (r rules) Request(c *call.Call, fields []h2.Field, authority string) ([]h2.Field, string) {
	if r.ops.Request == nil {
		return fields, authority
	}
	req := (&http.Request{
		Method: http.MethodPost, Header: web.Header(fields), Host: authority, URL: &url.URL{Path: c.Path}, RequestURI: c.URI,
		ProtoMajor: 2, TLS: c.TLS,
	}).WithContext(context.WithValue(context.Background(), caddy.ReplacerCtxKey, replacerOf(c)))
	r.ops.Request.ApplyToRequest(req)
	return web.Fields(req.Header), req.Host
}

// Response implements proxy.Rules.
func (r rules) Response(c *call.Call, fields []h2.Field) []h2.Field {
	ops := r.ops.Response
	if ops == nil {
		return fields
	}
	header := web.Header(fields[1:]) // without :status
	if ops.Require != nil && !ops.Require.Match(http.StatusOK, header) {
		return fields
	}
	ops.ApplyTo(header, replacerOf(c))
	return append(fields[:1], web.Fields(header)...)
}

func replacerOf(c *call.Call) *caddy.Replacer {
	if repl, ok := c.Placeholders.(*caddy.Replacer); ok {
		return repl
	}
	return caddy.NewReplacer()
}
