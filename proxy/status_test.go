package proxy

import (
	"errors"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// What ends a client's stream is not always the client's wish.
func TestClientLost(t *testing.T) {
	for _, tt := range []struct {
		err     h2.Error
		code    grpcwire.Code
		reason  string
		endedBy call.EndedBy
	}{
		{h2.Error{Kind: h2.KindReset, Code: h2.Cancel, Remote: true}, grpcwire.Canceled, ReasonClientGone, call.EndedByClient},
		{h2.Error{Kind: h2.KindConnLost}, grpcwire.Canceled, ReasonClientGone, call.EndedByClient},
		{h2.Error{Kind: h2.KindMemory, Code: h2.EnhanceYourCalm}, grpcwire.ResourceExhausted, ReasonMemory, call.EndedByProxy},
		{h2.Error{Kind: h2.KindProtocol, Code: h2.ProtocolError, Debug: "DATA does not add up to content-length"}, grpcwire.Internal, ReasonRequestLength, call.EndedByClient},
		{h2.Error{Kind: h2.KindProtocol, Code: h2.ProtocolError, Debug: "second HEADERS without END_STREAM"}, grpcwire.Canceled, ReasonClientGone, call.EndedByClient},
	} {
		if why := ClientLost(&tt.err); why.Code != tt.code || why.Reason != tt.reason || why.EndedBy != tt.endedBy || !errors.Is(why.Err, &tt.err) {
			t.Errorf("%v: %v, %s, by %v (%v)", &tt.err, why.Code, why.Reason, why.EndedBy, why.Err)
		}
	}
}
