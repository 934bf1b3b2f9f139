package healthcheck

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// target is a probe's target outside any checks.
func target(t testing.TB, addr string, cfg transport.Config, ownPort bool) *Target {
	t.Helper()
	addrs, _, err := upstream.Parse(addr)
	if err != nil {
		t.Fatal(err)
	}
	conns := &connections{addr: addrs[0], cfg: cfg}
	if !ownPort {
		conns.calls = transport.NewEndpoint(addrs[0], cfg)
		t.Cleanup(func() { _ = conns.calls.Destruct() })
	}
	t.Cleanup(conns.close)
	return &Target{
		Endpoint: &upstream.Endpoint{Network: addrs[0].Network, Address: addrs[0].Dial}, Address: addrs[0],
		Transport: cfg, Timeout: 10 * time.Second, conns: conns,
	}
}

// probe provisions a check and asks once.
func probe(t testing.TB, p Prober, to *Target) Verdict {
	t.Helper()
	if m, ok := p.(caddy.Provisioner); ok {
		if err := m.Provision(caddy.Context{}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), to.Timeout)
	defer cancel()
	return p.Probe(ctx, to)
}

func TestTCP(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := target(t, l.Addr().String(), transport.Config{}, false)
	if v := probe(t, new(TCP), to); v.Answer != Serving {
		t.Errorf("verdict %+v", v)
	}
	l.Close()
	if v := probe(t, new(TCP), to); v.Answer != NoAnswer || v.Text != "connect failed: connection refused" {
		t.Errorf("verdict %+v on a closed port", v)
	}
	unix := t.TempDir() + "/s"
	ul, err := net.Listen("unix", unix)
	if err != nil {
		t.Fatal(err)
	}
	defer ul.Close()
	if v := probe(t, new(TCP), target(t, "unix/"+unix, transport.Config{}, false)); v.Answer != Serving {
		t.Errorf("verdict %+v on a socket", v)
	}
}

// An endpoint at a socket is asked there; its address is the socket's path alone.
func TestAttendUnixSocket(t *testing.T) {
	wiretest.CheckLeaks(t)
	path := t.TempDir() + "/s"
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	end := attend(t, active(t, &Active{}, new(TCP)), "unix/"+path)
	eventually(t, "there is a verdict", func() bool { return !end.State.Has(upstream.Connecting) })
	if st := end.State.Status(); st.Condition != upstream.ConditionHealthy {
		t.Errorf("%+v", st)
	}
}

// httpServer answers as HTTP/1.1 and as HTTP/2.
func httpServer(t testing.TB, withTLS bool) *httptest.Server {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/ok", func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(r.Method + " " + r.Proto + " host=" + r.Host + " agent=" + r.UserAgent() + " x=" + r.Header.Get("X-Test")))
	})
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.PathValue("code"))
		w.WriteHeader(n)
	})
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/ok", http.StatusFound) })
	mux.HandleFunc("/hang", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	srv := httptest.NewUnstartedServer(mux)
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetHTTP1(true)
	srv.Config.Protocols.SetHTTP2(true)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.EnableHTTP2 = true
	if withTLS {
		srv.StartTLS()
	} else {
		srv.Start()
	}
	t.Cleanup(srv.Close)
	return srv
}

func TestHTTP(t *testing.T) {
	wiretest.CheckLeaks(t)
	for _, withTLS := range []bool{false, true} {
		srv := httpServer(t, withTLS)
		cfg := transport.Config{}
		if withTLS {
			cfg.TLS = &tls.Config{RootCAs: srv.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs, ServerName: "example.com"}
		}
		addr := srv.Listener.Addr().String()
		own, calls := target(t, addr, cfg, true), target(t, addr, cfg, false)
		for _, tc := range []struct {
			name   string
			h      *HTTP
			to     *Target
			answer Answer
			text   string
		}{
			{"port of calls", &HTTP{URI: "/ok", ExpectBody: "^GET HTTP/2.0 host=" + addr + " agent=" + DefaultUserAgent + " x=$"}, calls, Serving, ""},
			{"port of its own", &HTTP{URI: "/ok", ExpectBody: "^GET HTTP/1.1 "}, own, Serving, ""},
			{"version", &HTTP{URI: "/ok", Version: "2", ExpectBody: " HTTP/2.0 "}, own, Serving, ""},
			{"method, body, fields", &HTTP{URI: "/ok?q", Body: "hello", Headers: http.Header{"Host": {"h.example"}, "X-Test": {"1"}, "User-Agent": {"me"}}, ExpectBody: "^POST .* host=h.example agent=me x=1$"}, own, Serving, ""},
			{"class", &HTTP{URI: "/status/204"}, own, Serving, ""},
			{"bad status", &HTTP{URI: "/status/503"}, own, NotServing, "HTTP status 503"},
			{"another status", &HTTP{URI: "/status/200", ExpectStatus: 204}, own, NotServing, "HTTP status 200"},
			{"that status", &HTTP{URI: "/status/404", ExpectStatus: 404}, own, Serving, ""},
			{"body", &HTTP{URI: "/ok", ExpectBody: "nope"}, own, NotServing, `does not match "nope"`},
			{"redirect", &HTTP{URI: "/moved"}, own, NotServing, "HTTP status 302"},
			{"redirect followed", &HTTP{URI: "/moved", FollowRedirects: true, ExpectBody: "GET"}, own, Serving, ""},
		} {
			if v := probe(t, tc.h, tc.to); v.Answer != tc.answer || !strings.Contains(v.Text, tc.text) {
				t.Errorf("TLS %v, %s: verdict %+v, want %v %q", withTLS, tc.name, v, tc.answer, tc.text)
			}
		}
		own.Timeout = 200 * time.Millisecond
		if v := probe(t, &HTTP{URI: "/hang"}, own); v.Answer != NoAnswer || v.Text != "no answer to the health check within 200ms" {
			t.Errorf("TLS %v: a server that hangs: %+v", withTLS, v)
		}
		own.Timeout = 10 * time.Second
		srv.Close()
		if v := probe(t, &HTTP{}, own); v.Answer != NoAnswer || v.Text != "connect failed: connection refused" {
			t.Errorf("TLS %v: a server that is gone: %+v", withTLS, v)
		}
	}
}

// A server that does not speak gRPC where it should.
func TestGRPCOnOtherServers(t *testing.T) {
	srv := httpServer(t, false)
	v := probe(t, new(GRPC), target(t, srv.Listener.Addr().String(), transport.Config{}, false))
	if v.Answer != NoAnswer || !strings.Contains(v.Text, "HTTP status 404 (UNIMPLEMENTED)") {
		t.Errorf("an HTTP server: %+v", v)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	if v := probe(t, new(GRPC), target(t, addr, transport.Config{}, false)); v.Answer != NoAnswer || !strings.Contains(v.Text, "connection refused") {
		t.Errorf("nobody: %+v", v)
	}
}

func TestChecksRefuse(t *testing.T) {
	for _, tc := range []struct {
		p    any
		text string
	}{
		{&GRPC{Mode: "push"}, `mode "push" is none of auto, watch, check`},
		{&GRPC{Unimplemented: "x"}, `unimplemented "x"`},
		{&GRPC{Services: []string{"/pkg.S/M"}}, `"/pkg.S/M" is no name of a service`},
		{&GRPC{Services: []string{"a", "a"}}, "named twice"},
		{&GRPC{Headers: http.Header{"Grpc-Timeout": {"1S"}}}, `"grpc-timeout"`},
		{&GRPC{Headers: http.Header{"Te": {"x"}}}, `"te"`},
		{&GRPC{Headers: http.Header{"X Y": {"x"}}}, `"x y"`},
		{&GRPC{Headers: http.Header{"X": {"a\nb"}}}, "line break"},
		{&HTTP{URI: "http://x/"}, "is not a path"},
		{&HTTP{URI: "healthz"}, "is not a path"},
		{&HTTP{Method: "G T"}, `method "G T"`},
		{&HTTP{ExpectStatus: 42}, "expect_status is 42"},
		{&HTTP{Version: "3"}, `version "3"`},
		{&HTTP{ExpectBody: "("}, "expect_body"},
	} {
		var err error
		if m, ok := tc.p.(caddy.Provisioner); ok {
			err = m.Provision(caddy.Context{})
		}
		if m, ok := tc.p.(caddy.Validator); ok && err == nil {
			err = m.Validate()
		}
		if err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%+v: error %v, want %q in it", tc.p, err, tc.text)
		}
	}
}
