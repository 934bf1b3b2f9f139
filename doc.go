// Package grpcproxy is a gRPC load balancer for Caddy: the HTTP handler grpc_proxy (http.handlers.grpc_proxy), the
// handlers grpc_health, which tells of the upstreams' health, and grpc_respond, which answers a gRPC status, the matcher
// grpc, and the command `caddy grpc-proxy`.
//
// # One RPC, from start to end
//
//  1. Handler.ServeHTTP passes what is not gRPC to the next handler. Everything else becomes a call.Call in
//     newExchange: behind that line nothing looks at the request for decisions.
//  2. exchange.classify splits the path, reads grpc-timeout and settles the deadline; one timer watches it
//     (timers.go). Caddy's idle limits, made for web pages, are lifted. The call enters the drain registry (drain.go).
//  3. exchange.begin (attempt.go) asks the picker of the current snapshot for an endpoint; both hang on one atomic
//     pointer. One that has a connection with room is preferred (choose.go). The endpoint counts the call from here to
//     its very end.
//  4. exchange.try builds the header block (metadata, X-Forwarded-*, the remaining time as grpc-timeout) and opens a
//     stream: transport finds a connection with room, or waits for one within the deadline.
//  5. exchange.pump (pump.go) reads the request and sends it on, keeping it for a replay until the call is committed.
//     A call whose request has ended goes on in the same goroutine; only if something comes back earlier, another one
//     takes the answer.
//  6. Until the response head was sent on, an attempt that failed without the upstream having seen the call is
//     repeated elsewhere (exchange.retry). Errors of transport say so; nothing else decides it.
//  7. respond.go relays: head (the commit), messages, trailers, or Trailers-Only, which stays one frame. answer.go
//     writes them, and puts right a status that clients could not read.
//  8. A call that fails becomes a failure (failure.go): a gRPC code and a message. It is sent as Trailers-Only before
//     the commit, as trailers after it if a message has just ended, and as a reset inside a message.
//  9. exchange.finish (observe.go) computes the Result, once, and gives it to logs and placeholders.
package grpcproxy
