package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// A shared upstream is a real server behind a relay that counts the connections to it.
type shared struct {
	addr   string
	made   atomic.Int32
	closed atomic.Int32 // by the server, that is, before the proxy did
}

// relay starts the relay in front of the server.
func relay(t *testing.T, server string) *shared {
	l, addr := listen(t)
	s := &shared{addr: addr}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	keep := func(nc net.Conn) {
		mu.Lock()
		defer mu.Unlock()
		open = append(open, nc)
	}
	wg.Go(func() {
		for {
			front, err := l.Accept()
			if err != nil {
				return
			}
			keep(front)
			back, err := net.Dial("tcp", server)
			if err != nil {
				front.Close()
				continue
			}
			keep(back)
			s.made.Add(1)
			var asked atomic.Bool // the proxy closed first
			wg.Go(func() {
				_, _ = io.Copy(back, front)
				asked.Store(true)
				back.Close()
			})
			wg.Go(func() {
				_, _ = io.Copy(front, back)
				if !asked.Load() {
					s.closed.Add(1)
				}
				front.Close()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, nc := range open {
			nc.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return s
}

// startNginx runs nginx with grpc_pass to the backend. More goes into its http block.
func startNginx(t *testing.T, backend, more string) (addr string) {
	t.Helper()
	path := program(t, "nginx", "nginx-light")
	addr, dir := proxytest.FreeAddress(t), t.TempDir()
	conf := writeFile(t, "nginx.conf", fmt.Sprintf(`daemon off; pid %[1]s/pid; error_log %[1]s/error.log;
events {}
http {
	access_log off; %[4]s
	client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
	server { listen %[2]s http2; location / { grpc_pass grpc://%[3]s; } }
}
`, dir, addr, backend, more))
	runPeer(t, addr, path, "-c", conf, "-e", filepath.Join(dir, "error.log"))
	return addr
}

// startHAProxy runs HAProxy with `proto h2` on both sides.
func startHAProxy(t *testing.T, backend string) (addr string) {
	t.Helper()
	path := program(t, "haproxy", "haproxy")
	addr = proxytest.FreeAddress(t)
	conf := writeFile(t, "haproxy.cfg", fmt.Sprintf(`defaults
	mode http
	timeout connect 5s
	timeout client 1m
	timeout server 1m
listen l
	bind %s proto h2
	server s %s proto h2
`, addr, backend))
	runPeer(t, addr, path, "-db", "-f", conf)
	return addr
}

// realUpstreams runs the test with each of the servers that people have behind a proxy.
func realUpstreams(t *testing.T, run func(t *testing.T, s *shared)) {
	for name, start := range map[string]func(t *testing.T, backend string) string{
		"grpc-go": func(_ *testing.T, backend string) string { return backend },
		"nginx":   func(t *testing.T, backend string) string { return startNginx(t, backend, "") },
		"HAProxy": startHAProxy,
	} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			b := backendtest.Start(t, backendtest.Options{NoRecord: true})
			run(t, relay(t, start(t, b.Addr())))
		})
	}
}

// A bystander has a stream through the proxy, on a connection of its own.
type bystander struct {
	t *testing.T
	s testgrpc.TestService_FullDuplexCallClient
}

func standBy(ctx context.Context, t *testing.T, addr string) *bystander {
	t.Helper()
	s, err := client(t, addr).FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	b := &bystander{t: t, s: s}
	b.check("before anything")
	return b
}

// check makes sure that the stream is none the worse for what happened.
func (b *bystander) check(what string) {
	b.t.Helper()
	if err := pingPong(b.s, 10); err != nil {
		b.t.Fatalf("%s: the stream of another client ended: %v", what, err)
	}
}
