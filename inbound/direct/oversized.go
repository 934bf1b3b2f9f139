package direct

import (
	"strconv"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// Oversized answers a gRPC call whose head is larger than the connection takes (see h2.Config.OnOversized): clients would make INTERNAL or
// UNKNOWN of HTTP's 431. fields are those that fitted. What is not known to be gRPC is left unanswered.
func Oversized(s *h2.Stream, fields []h2.Field) {
	for i := range fields {
		f := &fields[i]
		if f.Name != "content-type" {
			continue
		}
		if grpcwire.ContentKind(f.Value) == grpcwire.GRPC {
			_ = s.WriteHeaders([]h2.Field{
				{Name: ":status", Value: "200"},
				{Name: "content-type", Value: f.Value},
				{Name: "grpc-status", Value: strconv.Itoa(int(grpcwire.ResourceExhausted))},
				{Name: "grpc-message", Value: "the metadata is larger than the proxy takes (max_header_size)"},
			}, true)
		}
		return
	}
}
