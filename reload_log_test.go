package grpcproxy_test

import (
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
)

// Upstream connections outlive the configuration that made them; what happens to them is logged as the running one says.
func TestConnectionsLogAsConfiguredNow(t *testing.T) {
	r := newRig(t, rigOptions{Block: "max_streams_per_conn 3"})
	site := "grpc_proxy " + r.ups[0].Addr() // without the block, so an endpoint of its own
	// On a port of its own: what the kernel had put into the queue of the old configuration's listener would be reset.
	r.H2C = proxytest.FreeAddress(t)
	r.Proxy.H2C = r.H2C
	raw, err := proxytest.Adapt(strings.Replace(r.Caddyfile(site), "level DEBUG", "level ERROR", 1))
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Load(raw, true); err != nil {
		t.Fatal(err)
	}
	before := len(r.Log("http.handlers.grpc_proxy"))
	r.run("before the reload", func(_ *testing.T, r *rig) { r.complete() })
	if n := len(r.Log("http.handlers.grpc_proxy")); n != before {
		t.Fatalf("%d lines in a log of errors", n-before)
	}
	if err := r.Load(site); err != nil {
		t.Fatal(err)
	}
	r.ups[0].current().Abort()
	eventually(t, "the end of the connection is logged", func() bool {
		for _, line := range r.Log("http.handlers.grpc_proxy") {
			if line["msg"] == "connection to upstream ended" {
				return true
			}
		}
		return false
	})
}
