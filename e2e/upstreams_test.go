package e2e

import (
	"net"
	"path/filepath"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestUpstreams: all kinds of RPC over each way to reach an upstream.
func TestUpstreams(t *testing.T) {
	ca, clients := wiretest.NewCA(t), wiretest.NewCA(t)
	cert, key := clients.PairFiles(clients.ClientCert("the proxy"))
	for _, tc := range []struct {
		name    string
		options backendtest.Options
		scheme  string
		block   string
	}{
		{"h2c", backendtest.Options{}, "h2c://", ""},
		{"tls", backendtest.Options{TLS: ca.ServerConfig()}, "https://", "tls_trust_pool file " + ca.File()},
		{
			"tls_server_name",
			backendtest.Options{TLS: ca.ServerConfig("backend.test")},
			"https://",
			"tls_trust_pool file " + ca.File() + "\ntls_server_name backend.test",
		},
		{
			"mtls",
			backendtest.Options{TLS: ca.ServerConfig(), ClientCAs: clients.Pool},
			"https://",
			"tls_trust_pool file " + ca.File() + "\ntls_client_auth " + cert + " " + key,
		},
		{"unix", backendtest.Options{Unix: filepath.Join(t.TempDir(), "b.sock")}, "", ""},
		{"ipv6", backendtest.Options{Addr: "[::1]:0"}, "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			if tc.name == "ipv6" {
				l, err := net.Listen("tcp", "[::1]:0")
				if err != nil {
					t.Skipf("no IPv6 on this machine: %v", err)
				}
				l.Close()
			}
			w := new(witness)
			tc.options.Name, tc.options.ServerOptions = "b", w.options()
			b := backendtest.Start(t, tc.options)
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + tc.scheme + b.Addr() + " {\n" + tc.block + "\n}"})
			r := &rig{t: t, p: p, backend: b, witness: w, open: openGRPC(dial(t, p.H2C, nil)), front: "h2c"}
			for _, k := range kinds {
				w.reset()
				r.ok(k)
			}
			if b.Accepted() != 1 {
				t.Errorf("%d connections to the upstream, want 1", b.Accepted())
			}
			last := b.Last()
			if last.Authority != p.H2C {
				t.Errorf("the upstream saw :authority %q, want the client's, %q", last.Authority, p.H2C)
			}
			if secure := tc.options.TLS != nil; (last.TLS != nil) != secure {
				t.Fatalf("TLS: %v, want %v", last.TLS != nil, secure)
			}
			if tc.name == "mtls" && last.TLS.PeerCertificates[0].Subject.CommonName != "the proxy" {
				t.Errorf("the upstream saw the certificate of %v", last.TLS.PeerCertificates[0].Subject)
			}
			// Where TLS goes by the upstream's name, an IP address has none (RFC 6066 section 3).
			if want := map[string]string{"tls_server_name": "backend.test"}[tc.name]; last.TLS != nil && last.TLS.ServerName != want {
				t.Errorf("the upstream saw the server name %q, want %q", last.TLS.ServerName, want)
			}
		})
	}
}
