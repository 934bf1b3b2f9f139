package e2e

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// program finds a program of Debian's. Where the gate runs it must be there; elsewhere the test is skipped.
func program(t *testing.T, name, pkg string) string {
	t.Helper()
	for _, path := range []string{name, "/usr/sbin/" + name} {
		if p, err := exec.LookPath(path); err == nil {
			return p
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is not installed (Debian package %s)", name, pkg)
	}
	t.Skipf("%s is not installed (Debian package %s)", name, pkg)
	return ""
}

// runPeer runs a server and waits until it listens.
func runPeer(t *testing.T, addr, path string, args ...string) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		done := make(chan struct{})
		go func() { _ = cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(timeout):
			_ = cmd.Process.Kill()
			<-done
		}
		if t.Failed() {
			t.Log(out.String())
		}
	})
	eventually(t, filepath.Base(path)+" listens", func() bool {
		nc, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			return false
		}
		nc.Close()
		return true
	})
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// exercise sends all kinds of RPC through whatever stands between the proxy and the backend, and many at a time.
func exercise(t *testing.T, addr string) {
	t.Helper()
	c := client(t, addr)
	ctx := within(t, 30*time.Second)
	body := bytes.Repeat([]byte("0123456789abcdef"), 40_000) // larger than every initial window
	r, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{ResponseSize: int32(len(body)), Payload: &testgrpc.Payload{Body: body}})
	if err != nil || len(r.GetPayload().GetBody()) != len(body) {
		t.Fatalf("a large unary call: %v, %d bytes", err, len(r.GetPayload().GetBody()))
	}
	if _, err := c.UnimplementedCall(ctx, new(testgrpc.Empty)); status.Code(err) != codes.Unimplemented {
		t.Fatalf("status %v, want UNIMPLEMENTED", err)
	}
	s, err := c.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if err := pingPong(s, 1000); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	errs := make(chan error)
	const callers, each = 50, 20
	for range callers {
		go func() {
			for range each {
				if _, err := c.EmptyCall(ctx, new(testgrpc.Empty)); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range callers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// TestPeerNginx: nginx as an upstream, which balances on to a real gRPC server. Its limit of concurrent streams makes
// the proxy open several connections.
func TestPeerNginx(t *testing.T) {
	path := program(t, "nginx", "nginx-light")
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	addr, dir := proxytest.FreeAddress(t), t.TempDir()
	conf := writeFile(t, "nginx.conf", fmt.Sprintf(`daemon off; pid %[1]s/pid; error_log %[1]s/error.log;
events {}
http {
	access_log off; http2_max_concurrent_streams 8; client_max_body_size 0;
	client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
	server { listen %[2]s http2; location / { grpc_pass grpc://%[3]s; } }
}
`, dir, addr, b.Addr()))
	runPeer(t, addr, path, "-c", conf, "-e", filepath.Join(dir, "error.log"))
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addr})
	exercise(t, p.H2C)
}

// TestPeerHAProxy: HAProxy as an upstream.
func TestPeerHAProxy(t *testing.T) {
	path := program(t, "haproxy", "haproxy")
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	addr := proxytest.FreeAddress(t)
	conf := writeFile(t, "haproxy.cfg", fmt.Sprintf(`global
	tune.h2.max-concurrent-streams 8
defaults
	mode http
	timeout connect 5s
	timeout client 1m
	timeout server 1m
listen l
	bind %s proto h2
	server s %s proto h2
`, addr, b.Addr()))
	runPeer(t, addr, path, "-db", "-f", conf)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addr})
	exercise(t, p.H2C)
}

// TestPeerNghttpd: nghttpd knows no gRPC, and its answers are told as what they are.
func TestPeerNghttpd(t *testing.T) {
	path := program(t, "nghttpd", "nghttp2-server")
	wiretest.CheckLeaks(t)
	addr, dir := proxytest.FreeAddress(t), t.TempDir()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	runPeer(t, addr, path, "--no-tls", "--address="+host, "--htdocs="+dir, "--max-concurrent-streams=4", port)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addr})
	c := client(t, p.H2C)
	ctx := within(t, 20*time.Second)
	errs := make(chan error)
	for range 40 {
		go func() {
			_, err := c.EmptyCall(ctx, new(testgrpc.Empty))
			errs <- err
		}()
	}
	for range 40 {
		// http-grpc-status-mapping.md: 404 is UNIMPLEMENTED.
		if err := <-errs; status.Code(err) != codes.Unimplemented {
			t.Fatalf("%v, want UNIMPLEMENTED for nghttpd's 404", err)
		}
	}
}
