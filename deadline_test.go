package grpcproxy_test

import (
	"testing"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
)

// A deadline that a handler in front puts on the request is the call's: the upstream is told and the client gets a status.
func TestRequestContextDeadline(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "route {\n\ttest_faulty timeout\n\tgrpc_proxy UPSTREAMS\n}"}})
	c := r.unary()
	if c.req.Get("grpc-timeout") == "" {
		t.Error("the upstream was not told of the deadline")
	}
	r.checkFailure(c.result(), failure{code: codes.DeadlineExceeded, reason: "DEADLINE_AT_PROXY"})
	if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
		t.Errorf("RST_STREAM(%v)", code)
	}
}

// A call that has no time left is answered without troubling an upstream.
func TestNoTimeNoAttempt(t *testing.T) {
	r := newRig(t, rigOptions{})
	for range 20 {
		c := r.open("grpc-timeout", "0n")
		r.checkFailure(c.result(), failure{code: codes.DeadlineExceeded, reason: "DEADLINE_AT_PROXY", attempts: -1})
	}
	if n := r.ups[0].Accepted(); n != 0 {
		t.Errorf("%d connections were made", n)
	}
}
