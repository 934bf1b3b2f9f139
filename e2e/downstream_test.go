package e2e

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestClientCertificates: Caddy demands client certificates, and that the server name of TLS is the call's authority.
func TestClientCertificates(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	ca, clients, strangers := wiretest.NewCA(t), wiretest.NewCA(t), wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	p := proxytest.Start(t, proxytest.Options{
		Site:     "grpc_proxy " + b.Addr() + " {\n\theader_up X-Client {http.request.tls.client.subject}\n}",
		CertFile: cert, KeyFile: key,
		TLS: "client_auth {\n\tmode require_and_verify\n\ttrust_pool file " + clients.File() + "\n}",
	})
	for _, tc := range []struct {
		name      string
		authority string
		creds     credentials.TransportCredentials
		code      codes.Code
	}{
		{"ours", "localhost", tlsTo("localhost", ca, clients.ClientCert("alice")), codes.OK},
		{"none", "localhost", tlsTo("localhost", ca), codes.Unavailable},
		{"strange", "localhost", tlsTo("localhost", ca, strangers.ClientCert("mallory")), codes.Unavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := b.Calls().Total()
			cc := dial(t, p.TLS, tc.creds, grpc.WithAuthority(tc.authority))
			_, err := testgrpc.NewTestServiceClient(cc).EmptyCall(within(t, timeout), &testgrpc.Empty{})
			t.Log(err)
			if status.Code(err) != tc.code {
				t.Fatalf("error %v, want %v", err, tc.code)
			}
			if tc.code != codes.OK {
				if b.Calls().Total() != before {
					t.Error("the upstream was called")
				}
				return
			}
			if got := b.Last().Metadata.Get("x-client"); len(got) != 1 || got[0] != "CN=alice" {
				t.Errorf("the upstream saw the client %q", got)
			}
		})
	}
	t.Run("misdirected", func(t *testing.T) {
		// grpc-go does not let the two differ.
		cfg := ca.ClientConfig(clients.ClientCert("alice"))
		cfg.ServerName = "localhost"
		c := dialH3(t, p.TLS, cfg, nil) // whose authority is the address
		s, err := c.Open(within(t, timeout), kinds[0])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Header(); err != nil {
			t.Fatal(err)
		}
		if got := s.(*h3Stream).resp.StatusCode; got != http.StatusMisdirectedRequest {
			t.Errorf("HTTP status %d, want %d", got, http.StatusMisdirectedRequest)
		}
	})
}

func tlsTo(name string, ca *wiretest.CA, certs ...tls.Certificate) credentials.TransportCredentials {
	cfg := ca.ClientConfig(certs...)
	cfg.ServerName = name
	return credentials.NewTLS(cfg)
}

// TestRequestMetadataSize: request metadata above Caddy's max_header_size never reaches the handler; Go's server names
// the limit, and answers who exceeds it with HTTP status 431.
func TestRequestMetadataSize(t *testing.T) {
	for _, tc := range []struct {
		name, servers string
		limit, size   int
		ok            bool
	}{
		{"default_fits", "", 16_704, 15 << 10, true},
		{"default_over", "", 16_704, 24 << 10, false},
		{"raised", "max_header_size 128KB", 128_320, 120 << 10, true},
		{"raised_over", "max_header_size 128KB", 128_320, 140 << 10, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			b := backendtest.Start(t, backendtest.Options{})
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr(), Servers: tc.servers})
			ctx := metadata.AppendToOutgoingContext(within(t, timeout), "x-large", strings.Repeat("x", tc.size))
			_, err := client(t, p.H2C).EmptyCall(ctx, &testgrpc.Empty{})
			if tc.ok {
				if err != nil {
					t.Fatal(err)
				}
				if got := b.Last().Metadata.Get("x-large"); len(got) != 1 || len(got[0]) != tc.size {
					t.Error("the upstream saw other metadata")
				}
				return
			}
			// grpc-go heeds the limit that the server's SETTINGS name.
			want := fmt.Sprintf("header list size to send violates the maximum size (%d bytes) set by server", tc.limit)
			if status.Code(err) != codes.Internal || status.Convert(err).Message() != want {
				t.Errorf("error %v, want %q", err, want)
			}
			c := wiretest.Dial(t, p.H2C, nil)
			fields := c.Request(kinds[0].path())
			for n := 0; n <= tc.limit; n += 2 << 10 { // much more, and the server would close the connection
				fields = append(fields, hpack.HeaderField{Name: "x-large", Value: strings.Repeat("x", 2<<10)})
			}
			if answer := c.Collect(c.Open(fields, true)); answer.Get(":status") != "431" {
				t.Errorf("a client that does not heed it gets %v, want 431", answer)
			}
			if n := b.Calls().Total(); n != 0 {
				t.Errorf("the upstream has %d calls", n)
			}
		})
	}
}

// TestResponseMetadataSize: trailers of 64 KiB pass, and of 1 MiB where the client takes them.
func TestResponseMetadataSize(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr()})
	for _, tc := range []struct {
		size string
		want int
	}{{"65536", 65536}, {"1000000", 1_000_000}} {
		var trailer metadata.MD
		ctx := metadata.AppendToOutgoingContext(within(t, timeout), backendtest.KeyTrailerSize, tc.size)
		_, err := client(t, p.H2C, grpc.WithMaxHeaderListSize(16<<20)).EmptyCall(ctx, &testgrpc.Empty{}, grpc.Trailer(&trailer))
		if v := trailer.Get(backendtest.KeyFiller); err != nil || len(v) != 1 || len(v[0]) != tc.want {
			t.Errorf("trailers of %s bytes: error %v", tc.size, err)
		}
	}
}
