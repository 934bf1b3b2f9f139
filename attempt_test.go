package grpcproxy

import (
	"fmt"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// waiting is a call at a handler whose upstreams are n ports that nobody dials.
func waiting(t *testing.T, port, n int) *exchange {
	t.Helper()
	h := &Handler{
		Upstreams: []*Upstream{{Dial: fmt.Sprintf("127.0.0.1:%d-%d", port, port+n-1)}},
		Transport: &Transport{DialTimeout: caddy.Duration(time.Minute)},
	}
	if err := provision(t, h); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Cleanup() })
	return newExchange(h, httptest.NewRecorder(), httptest.NewRequest("POST", "/a/b", nil))
}

// Verdicts that come while the call begins to wait for them let it go on, however many there are.
func TestVerdictsComeAtOnce(t *testing.T) {
	x := waiting(t, 7100, 32)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 500 {
			for _, e := range x.cur.Live() {
				e.State.Set(upstream.Connecting)
			}
			go func() {
				for _, e := range x.cur.Live() {
					e.State.Clear(upstream.Connecting)
				}
			}()
			for x.awaitVerdict() {
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("the call waits for a verdict that it was told of")
	}
}
