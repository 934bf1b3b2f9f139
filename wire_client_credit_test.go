package grpcproxy_test

import (
	"crypto/tls"
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// RFC 9113 section 5.2.2: a receiver's windows for streams and for the connection are its own to choose. All uploads of a
// client together may fill the connection's; so it is many times a stream's, from the first connection on, and after a reload.
func TestWireClientWindows(t *testing.T) {
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	r := newRig(t, rigOptions{Caddy: proxytest.Options{
		CertFile: cert, KeyFile: key,
		// Several handlers of one server.
		Site: "@a grpc test.A\ngrpc_proxy @a UPSTREAMS\ngrpc_proxy UPSTREAMS",
	}})
	check := func(c *wiretest.Conn) {
		t.Helper()
		settings := c.ExpectSettings()
		stream := uint32(0)
		for _, s := range settings.Settings {
			if s.ID == http2.SettingInitialWindowSize {
				stream = s.Val
			}
		}
		conn := 65_535 + c.ExpectOn(0, http2.FrameWindowUpdate).Increment
		if stream != 512<<10 || conn != 16<<20 {
			t.Errorf("the windows are %d and %d, want 512 KiB and 16 MiB", stream, conn)
		}
	}
	for range 2 {
		check(wiretest.Dial(t, r.H2C, nil))
		for _, cfg := range []*tls.Config{ca.ClientConfig(), ca.ClientConfig()} {
			check(wiretest.Dial(t, r.TLS, cfg))
		}
		if err := r.Reload(); err != nil {
			t.Fatal(err)
		}
	}
}
