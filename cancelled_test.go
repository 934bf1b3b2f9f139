package grpcproxy_test

import (
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

func init() {
	caddy.RegisterModule(counted{})
	httpcaddyfile.RegisterHandlerDirective("test_counted", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return counted{}, nil
	})
}

// countedMade is how many requests came through the handler, countedGone how many of them nobody refers to any more.
var countedMade, countedGone atomic.Int64

// counted is a handler in front of the proxy that sees when a request is forgotten.
type counted struct{}

func (counted) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_counted", New: func() caddy.Module { return new(counted) }}
}

func (counted) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	own := new(http.Request)
	*own = *r
	countedMade.Add(1)
	runtime.AddCleanup(own, func(struct{}) { countedGone.Add(1) }, struct{}{})
	return next.ServeHTTP(w, own)
}

// Calls that were cancelled while they waited for an upstream's window are forgotten, though the upstream never opens it and
// its connection lives on.
func TestCancelledCallsAreForgotten(t *testing.T) {
	r := newRig(t, rigOptions{
		Caddy: proxytest.Options{Site: "route {\n\ttest_counted\n\tgrpc_proxy UPSTREAMS {\n\t\tmax_conns 1\n\t}\n}"},
		Up:    wiretest.Options{HoldWindows: true, DiscardData: true},
	})
	made, gone := countedMade.Load(), countedGone.Load()
	first := r.open()
	first.take(0)
	// It takes most of the window of the connection, the calls take the rest.
	if _, err := first.client.SendData(t.Context(), first.id, make([]byte, 65535), false); err != nil {
		t.Fatal(err)
	}
	const calls = 100
	defer crumbs(first.up)()
	for range calls {
		id := r.client.Open(r.client.Request(wirePath, "x-pad", strings.Repeat("x", 1000)), false)
		r.client.WriteData(id, wiretest.Message(make([]byte, 2000)), true)
		f := first.up.ExpectHeaders()
		r.client.WriteReset(id, http2.ErrCodeCancel)
		first.up.ExpectReset(f.Stream)
	}
	if got := countedMade.Load() - made; got != calls+1 {
		t.Fatalf("%d calls came through, want %d", got, calls+1)
	}
	// A few may be kept for reuse, by goroutines that have not ended yet or by the server.
	var left int64
	for end := time.Now().Add(timeout); ; time.Sleep(10 * time.Millisecond) {
		runtime.GC()
		if left = calls + 1 - (countedGone.Load() - gone); left <= 10 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d of %d cancelled calls are kept", left, calls)
		}
	}
}

// crumbs lets a connection's window move a byte at a time until it is told to stop: one that stands still takes no calls.
func crumbs(up *wiretest.Conn) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			up.WriteWindowUpdate(0, 1)
			select {
			case <-done:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return func() { close(done); <-ended }
}
