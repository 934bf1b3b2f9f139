package grpcproxy_test

import (
	"testing"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// A connection that the upstream breaks takes all its streams along. Those have done nothing wrong: for them the
// connection is lost, which is UNAVAILABLE, whatever rule was broken.
func TestWireConnectionError(t *testing.T) {
	r := newRig(t, rigOptions{})
	c := r.unary()
	c.up.WriteFrame(http2.FramePing, 0, 0, []byte("not 8 bytes")) // RFC 9113 section 6.7: FRAME_SIZE_ERROR
	r.checkFailure(c.result(), failure{
		code: codes.Unavailable, reason: "UPSTREAM_CONNECTION_LOST", says: []string{"PING"},
	})
}

// An answer that is not gRPC is told as what it is although its body never ends.
func TestWireForeignBodyStalls(t *testing.T) {
	r := newRig(t, rigOptions{})
	c := r.unary()
	c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "503", "content-type", "text/plain"), false)
	c.up.WriteData(c.sid, []byte("down for "), false)
	r.checkFailure(c.result(), failure{
		code: codes.Unavailable, reason: "UPSTREAM_HTTP_STATUS", says: []string{"503", "down for"},
	})
	if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
		t.Errorf("the upstream's stream was reset with %v, want CANCEL", code)
	}
}
