// Package grpcproxy is a gRPC load balancer for Caddy: the HTTP handler grpc_proxy (http.handlers.grpc_proxy), the
// handlers grpc_health, which tells of the upstreams' health, and grpc_respond, which answers a gRPC status, the matcher
// grpc, and the command `caddy grpc-proxy`.
//
// It translates configuration and takes part in the life of Caddy: what a handler is configured for becomes a cluster (upstreams.go)
// and a proxy.Proxy; Handler.ServeHTTP gives each call to inbound/web, which turns request and answer into events. Package proxy
// carries the call: its documentation walks one RPC through it.
package grpcproxy
