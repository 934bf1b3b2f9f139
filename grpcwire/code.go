// Package grpcwire holds the facts of gRPC over HTTP/2: content types, status codes and their maps, timeouts, the
// coding of messages and metadata, message framing and status details. It depends on the standard library and on
// protowire only.
package grpcwire

// Code is a gRPC status code (grpc/grpc doc/statuscodes.md).
type Code uint32
