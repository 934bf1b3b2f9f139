package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// fieldCaddy are faults of the rest of Caddy around the handler.
var fieldCaddy = []fieldCase{
	{
		"server's_write_timeout",
		"`servers { timeouts { write } }` cut a stream, and the log blamed the client; docs/status.md names each end's reason",
		fieldWriteTimeout,
	},
	{
		"server's_own_fields",
		"the access log gained empty Date and Content-Length lists, and `header Server` was dropped; gRPC: what is in the head is metadata",
		fieldOwnFields,
	},
	{
		"try_files_in_front",
		"`try_files` of a web site rewrites every call to /index.html, and the answer said no more than that the path is bad; docs/grpc_proxy.md has a site that works",
		fieldTryFiles,
	},
	{
		"names_before_the_handler",
		"`{http.grpc_proxy.service}` was unknown to `vars`, to spans and to `grpc_respond`, and the matcher to CEL; README.md, placeholders",
		fieldNames,
	},
	{
		"snippet_and_override",
		"an option in a snippet and again in the block was refused, which reverse_proxy's users write; the last one wins",
		fieldSnippet,
	},
	{
		"rotated_files",
		"client certificate and CA files replaced on disk were used after `caddy reload --force` only, and a resumed session hid a CA that was not trusted any more; docs/grpc_proxy.md, tls_client_auth",
		fieldRotatedFiles,
	},
	{
		"nobody_takes_it",
		"a POST that is no gRPC got Caddy's empty 200; PROTOCOL-HTTP2.md wants 415, and UNIMPLEMENTED is what a server without the service says",
		fieldNobodyTakesIt,
	},
	{
		"stalled_uploads_of_one_client",
		"an upload whose upstream did not read used up the window that Caddy's server grants to a connection, and all other calls of the client stopped; RFC 9113 section 5.2.2",
		fieldStalledUploads,
	},
}

func fieldWriteTimeout(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr(), Servers: "timeouts {\n\twrite 700ms\n}", AccessLog: true})
	s, err := client(t, p.H2C).FullDuplexCall(within(t, timeout))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Internal {
		t.Errorf("the call ended with %v, want INTERNAL", err)
	}
	if entry := logged(t, p); entry["grpc_reason"] != "SERVER_WRITE_TIMEOUT" || entry["grpc_ended_by"] != "proxy" {
		t.Errorf("the log says %v, ended by %v", entry["grpc_reason"], entry["grpc_ended_by"])
	}
	eventually(t, "the upstream's call has ended", func() bool { return b.Active() == 0 })
}

func fieldOwnFields(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	p := proxytest.Start(t, proxytest.Options{
		Site: "header Server mine\ngrpc_proxy " + b.Addr(), CertFile: cert, KeyFile: key, AccessLog: true,
	})
	fronts := []opener{openGRPC(dial(t, p.TLS, tlsTo("localhost", ca))), dialH3(t, p.TLS, ca.ClientConfig(), nil).Open}
	lines := 0
	for i, open := range fronts {
		for _, md := range []metadata.MD{nil, metadata.Pairs(backendtest.KeyStatus, "NOT_FOUND"), metadata.Pairs("grpc-timeout", "x")} {
			if i == 0 && md.Get("grpc-timeout") != nil {
				continue // grpc-go writes its own
			}
			ctx := metadata.NewOutgoingContext(within(t, timeout), md)
			k := kinds[0]
			s, err := open(ctx, k)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(s.Send(&testgrpc.SimpleRequest{ResponseSize: 10}), s.CloseSend()); err != nil && !errors.Is(err, io.ErrClosedPipe) {
				t.Fatal(err)
			}
			for err == nil {
				err = s.Recv(new(testgrpc.SimpleResponse))
			}
			head, _ := s.Header()
			if len(head) == 0 {
				head = s.Trailer() // Trailers-Only
			}
			for name, want := range map[string]int{"server": 1, "date": 0, "content-length": 0, "alt-svc": 0} {
				if got := head.Get(name); len(got) != want {
					t.Errorf("front %d, %v: the client got %s %q", i, md, name, got)
				}
			}
			lines++
			var entries []map[string]any
			eventually(t, "the call is in the access log", func() bool {
				entries = p.Log("http.log.access")
				return len(entries) >= lines
			})
			header, _ := entries[lines-1]["resp_headers"].(map[string]any)
			for _, name := range []string{"Date", "Content-Length", "Alt-Svc"} {
				if v, ok := header[name]; ok {
					t.Errorf("front %d, %v: the access log has %s %v", i, md, name, v)
				}
			}
		}
	}
}

func fieldTryFiles(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "index.html"), []byte("page"), 0o600); err != nil {
		t.Fatal(err)
	}
	files := "root " + root + "\ntry_files {path} /index.html\n"
	p := proxytest.Start(t, proxytest.Options{Site: files + "grpc_proxy " + b.Addr() + "\nfile_server"})
	_, err := client(t, p.H2C).EmptyCall(within(t, timeout), new(testgrpc.Empty))
	for _, part := range []string{"try_files", `"/index.html"`, `"/grpc.testing.TestService/EmptyCall"`} {
		if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), part) {
			t.Errorf("the call ended with %v, which does not say %s", err, part)
		}
	}
	if err := p.Load("@grpc grpc\nhandle @grpc {\n\tgrpc_proxy " + b.Addr() + "\n}\nhandle {\n" + files + "file_server\n}"); err != nil {
		t.Fatal(err)
	}
	if _, err := client(t, p.H2C).EmptyCall(within(t, timeout), new(testgrpc.Empty)); err != nil {
		t.Error(err)
	}
	resp, err := http.Get("http://" + p.H2C + "/any/page")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if page, err := io.ReadAll(resp.Body); err != nil || string(page) != "page" {
		t.Errorf("the web page is %q, %v", page, err)
	}
	http.DefaultClient.CloseIdleConnections()
}

func fieldRotatedFiles(t *testing.T) {
	servers, clients := wiretest.NewCA(t), wiretest.NewCA(t)
	now := new(atomic.Pointer[tls.Config])
	now.Store(clients.MutualConfig())
	now.Load().Certificates = servers.ServerConfig().Certificates
	b := backendtest.Start(t, backendtest.Options{TLS: &tls.Config{
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return now.Load(), nil },
	}})
	dir := t.TempDir()
	put := func(name string, text []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	show := func(ca *wiretest.CA, name string) (cert, key string) {
		t.Helper()
		from, fromKey := ca.PairFiles(ca.ClientCert(name))
		var paths []string
		for file, from := range map[string]string{"cert.pem": from, "key.pem": fromKey} {
			text, err := os.ReadFile(from)
			if err != nil {
				t.Fatal(err)
			}
			paths = append(paths, put(file, text))
		}
		slices.Sort(paths)
		return paths[0], paths[1]
	}
	cert, key := show(clients, "one")
	ca := put("ca.pem", servers.PEM())
	p := proxytest.Start(t, proxytest.Options{
		Site: "grpc_proxy https://" + b.Addr() + " {\n\ttls_trust_pool file " + ca + "\n\ttls_client_auth " + cert + " " + key + "\n}",
	})
	c := client(t, p.H2C)
	call := func() error {
		_, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty))
		return err
	}
	if err := call(); err != nil {
		t.Fatal(err)
	}
	// The certificates of tests live a day.
	eventually(t, "the log warns of the client certificate's end", func() bool {
		for _, l := range p.Log("http.handlers.grpc_proxy") {
			if l["file"] == cert && l["level"] == "warn" {
				return true
			}
		}
		return false
	})

	// All is replaced: the upstream's certificate, its CA, whom it trusts, and what is shown to it.
	servers2, clients2 := wiretest.NewCA(t), wiretest.NewCA(t)
	show(clients2, "two")
	put("ca.pem", servers2.PEM())
	cfg := clients2.MutualConfig()
	cfg.Certificates = servers2.ServerConfig().Certificates
	now.Store(cfg)
	b.CloseConns()
	eventually(t, "calls go on without a reload", func() bool { return call() == nil })

	// The upstream's CA is not trusted any more. A session must not hide that.
	put("ca.pem", wiretest.NewCA(t).PEM())
	b.CloseConns()
	untrusted := func() bool {
		err := call()
		return status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "unknown authority")
	}
	eventually(t, "the connections are gone", untrusted)
	for range 8 {
		if !untrusted() {
			t.Fatal("a call was not refused for the unknown authority")
		}
	}
	put("ca.pem", servers2.PEM())
	eventually(t, "calls go on", func() bool { return call() == nil })
}

func fieldNobodyTakesIt(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{
		Site: "route {\n\t@interop grpc grpc.testing.*\n\tgrpc_proxy @interop " + b.Addr() + "\n\tgrpc_respond UNIMPLEMENTED \"no {http.grpc_proxy.service} here\"\n}",
	})
	cc := dial(t, p.H2C, nil)
	if _, err := testgrpc.NewTestServiceClient(cc).EmptyCall(within(t, timeout), new(testgrpc.Empty)); err != nil {
		t.Error(err)
	}
	err := cc.Invoke(within(t, timeout), "/grpc.reflection.v1.ServerReflection/Any", new(testgrpc.Empty), new(testgrpc.Empty))
	if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "no grpc.reflection.v1.ServerReflection here") {
		t.Errorf("a service without a route: %v", err)
	}
	web := new(http.Client)
	defer web.CloseIdleConnections()
	for contentType, want := range map[string]int{"application/json": 415, "application/grpc-web+proto": 415, "": 415} {
		resp, err := web.Post("http://"+p.H2C+kinds[0].path(), contentType, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("content-type %q: HTTP status %d, want %d", contentType, resp.StatusCode, want)
		}
	}
	resp, err := web.Get("http://" + p.H2C)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("GET: HTTP status %d", resp.StatusCode)
	}
}

// fieldStalledUploads: two dozen uploads that nobody reads, and small calls beside them on the same connection.
func fieldStalledUploads(t *testing.T) {
	const (
		uploads = 24
		size    = 64 << 10
		enough  = 7 // messages, with which the stream's window is as good as used up
	)
	// Windows of a fixed size: grpc-go lets others grow, whether anything is read or not.
	deaf := backendtest.Start(t, backendtest.Options{ServerOptions: []grpc.ServerOption{
		grpc.StaticStreamWindowSize(64 << 10), grpc.StaticConnWindowSize(16 << 20),
	}})
	other := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "@other grpc {\n\tmetadata x-other\n}\ngrpc_proxy @other " + other.Addr() + "\ngrpc_proxy " + deaf.Addr()})
	c := client(t, p.H2C)
	ctx, cancel := context.WithCancel(within(t, 4*timeout))
	message := &testgrpc.StreamingInputCallRequest{Payload: &testgrpc.Payload{Body: make([]byte, size)}}
	full := make(chan struct{}, uploads)
	var wg sync.WaitGroup
	for range uploads {
		wg.Go(func() {
			s, err := c.StreamingInputCall(metadata.AppendToOutgoingContext(ctx, backendtest.KeyBlock, "1"))
			for sent := 0; err == nil; sent++ {
				if sent == enough {
					full <- struct{}{}
				}
				err = s.Send(message)
			}
			if ctx.Err() == nil {
				t.Errorf("an upload has ended: %v", s.RecvMsg(new(testgrpc.Empty)))
			}
		})
	}
	for range uploads {
		select {
		case <-full:
		case <-ctx.Done():
			t.Error("not all uploads can use up their windows")
		}
	}
	for range 5 {
		ctx := metadata.AppendToOutgoingContext(within(t, 2*timeout), "x-other", "1")
		if _, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{Payload: body(fromClient, 0, 10_000)}); err != nil {
			t.Error(err)
			break
		}
	}
	cancel()
	wg.Wait()
}

func fieldNames(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: `route {
		@unary expression grpc('grpc.testing.TestService/Unary*')
		grpc_respond @unary PERMISSION_DENIED "{http.grpc_proxy.method} of {http.grpc_proxy.service} is closed"
		vars called {http.grpc_proxy.method}
		grpc_proxy ` + b.Addr() + ` {
			header_up x-called {vars.called}
		}
	}`})
	c := client(t, p.H2C)
	if _, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty)); err != nil {
		t.Fatal(err)
	}
	if got := b.Last().Metadata.Get("x-called"); len(got) != 1 || got[0] != "EmptyCall" {
		t.Errorf("the upstream was told of %q", got)
	}
	_, err := c.UnaryCall(within(t, timeout), new(testgrpc.SimpleRequest))
	if s := status.Convert(err); s.Code() != codes.PermissionDenied || s.Message() != "UnaryCall of grpc.testing.TestService is closed" {
		t.Errorf("the call ended with %v", err)
	}
}

func fieldSnippet(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{
		Global: "}\n(limits) {\n\tmax_timeout 1m\n\texpose_upstream",
		Site:   "grpc_proxy " + b.Addr() + " {\n\timport limits\n\tmax_timeout 300ms\n\texpose_upstream\n}",
	})
	ctx := metadata.AppendToOutgoingContext(within(t, timeout), backendtest.KeyBlock, "1")
	if _, err := client(t, p.H2C).EmptyCall(ctx, new(testgrpc.Empty)); status.Code(err) != codes.DeadlineExceeded || ctx.Err() != nil {
		t.Errorf("the call ended with %v, want DEADLINE_EXCEEDED after 300 ms", err)
	}
}
