package grpcproxy_test

import (
	"crypto/tls"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// fails makes a call that no upstream gets to see, and checks what the client is told. It returns how long that took.
func (r *rig) fails(want failure, metadata ...string) time.Duration {
	r.t.Helper()
	start := time.Now()
	c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(wirePath, metadata...), true)}
	h := c.result()
	r.checkFailure(h, want)
	return h.Frames[0].Time.Sub(start)
}

// rawUpstream runs f on each connection, before any HTTP/2; without f, nobody listens at the address.
func rawUpstream(t *testing.T, f func(nc net.Conn)) string {
	t.Helper()
	if f == nil {
		return proxytest.FreeAddress(t)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var (
		mu   sync.Mutex
		open []net.Conn
		wg   sync.WaitGroup
	)
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, nc)
			mu.Unlock()
			wg.Go(func() { f(nc) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, nc := range open {
			_ = nc.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().String()
}

// gRPC over HTTP/2, "Errors": "the connection could not be made → UNAVAILABLE". It is a gRPC answer all the same, and it
// says which step of connecting failed.
func TestWireDialFailures(t *testing.T) {
	ca, other := wiretest.NewCA(t), wiretest.NewCA(t)
	trust := "tls_trust_pool file " + ca.File()
	http1 := func(nc net.Conn) {
		defer nc.Close()
		buf := make([]byte, 1024)
		_, _ = nc.Read(buf)
		_, _ = io.WriteString(nc, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
		_, _ = io.Copy(io.Discard, nc)
	}
	overTLS := func(cfg *tls.Config, f func(nc net.Conn)) func(net.Conn) {
		return func(nc net.Conn) {
			tc := tls.Server(nc, cfg)
			if err := tc.Handshake(); err != nil {
				_ = nc.Close()
				return
			}
			f(tc)
		}
	}
	discard := func(nc net.Conn) { defer nc.Close(); _, _ = io.Copy(io.Discard, nc) }
	untrusted := other.ServerConfig()
	wrongName := ca.ServerConfig("backend.internal")
	noH2 := ca.ServerConfig()
	noH2.NextProtos = []string{"http/1.1"}
	noALPN := ca.ServerConfig()
	noALPN.NextProtos = nil
	mutual12, mutual13 := ca.MutualConfig(), ca.MutualConfig()
	mutual12.MaxVersion = tls.VersionTLS12
	alert := func(nc net.Conn) { // what OpenSSL does with a client that does not begin with TLS
		_, _ = nc.Read(make([]byte, 1024))
		_, _ = nc.Write([]byte{0x15, 3, 1, 0, 2, 2, 70})
		discard(nc)
	}

	for _, tt := range []struct {
		name, scheme, block string
		serve               func(net.Conn) // nil: nobody listens
		want                failure
		within              time.Duration
	}{
		{
			name: "refused",
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_CONNECT_FAILED", says: []string{"connect failed", "connection refused"}},
		},
		{
			name: "nobody answers", block: "dial_timeout 200ms", serve: discard, within: time.Second,
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_CONNECT_FAILED", says: []string{"connect failed", "timed out"}},
		},
		{
			name: "TLS: nobody answers", block: trust + "\ndial_timeout 200ms", scheme: "https://", serve: discard, within: time.Second,
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_TLS_FAILED", says: []string{"TLS handshake failed", "timed out"}},
		},
		{
			name: "closed at once", serve: func(nc net.Conn) { _ = nc.Close() },
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_CONNECT_FAILED", says: []string{"closed the new connection before speaking HTTP/2"}},
		},
		{
			name: "certificate of an unknown authority", block: trust, scheme: "https://", serve: overTLS(untrusted, discard),
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_TLS_FAILED", says: []string{"TLS handshake failed", "unknown authority"}},
		},
		{
			name: "certificate of another name", block: trust, scheme: "https://", serve: overTLS(wrongName, discard),
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_TLS_FAILED", says: []string{"TLS handshake failed", "certificate is not valid for the name", "tls_server_name"}},
		},
		{
			name: "client's certificate is demanded, TLS 1.2", block: trust, scheme: "https://", serve: overTLS(mutual12, discard),
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_TLS_FAILED", says: []string{"TLS handshake failed", `sent the TLS alert "handshake failure"`}},
		},
		{
			// In TLS 1.3 the client's handshake is over before the server has seen that the certificate is missing.
			name: "client's certificate is demanded, TLS 1.3", block: trust, scheme: "https://", serve: overTLS(mutual13, discard),
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_TLS_FAILED", says: []string{"TLS handshake failed", `sent the TLS alert "certificate required"`}},
		},
		{
			name: "ALPN with HTTP/1.1 only", block: trust, scheme: "https://", serve: overTLS(noH2, discard),
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_TLS_FAILED", says: []string{"ALPN h2"}},
		},
		{
			name: "no ALPN", block: trust, scheme: "https://", serve: overTLS(noALPN, discard),
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_TLS_FAILED", says: []string{"ALPN h2"}},
		},
		{
			name: "HTTP/1.1 on an h2c port", serve: http1,
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_NOT_HTTP2", says: []string{`does not speak HTTP/2 (it answered "HTTP/1.1 400 Bad Request`}},
		},
		{
			name: "TLS expected, plaintext spoken: closed", serve: overTLS(ca.ServerConfig(), discard),
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_CONNECT_FAILED", says: []string{"does it expect TLS?", "https://"}},
		},
		{
			name: "TLS expected, plaintext spoken: alert", serve: alert,
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_NOT_HTTP2", says: []string{"(it sent a TLS alert, so it expects TLS)", "https://"}},
		},
		{
			name: "plaintext expected, TLS spoken", block: trust, scheme: "https://", serve: http1,
			want: failure{code: codes.Unavailable, reason: "UPSTREAM_TLS_FAILED", says: []string{"does not speak TLS", "h2c://"}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, expose := range []bool{false, true} {
				addr := rawUpstream(t, tt.serve)
				block := tt.block
				if expose {
					block += "\nexpose_upstream"
					tt.want.upstream = addr
				}
				r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "grpc_proxy " + tt.scheme + addr + " {\n" + block + "\n}"}})
				r.hidden = addr
				if took := r.fails(tt.want); tt.within > 0 && took > tt.within {
					t.Errorf("took %v", took)
				}
				eventually(t, "the log names the upstream", func() bool {
					for _, line := range r.Log("") {
						if up, _ := line["upstream"].(string); up == addr {
							return true
						}
					}
					return false
				})
			}
		})
	}
}

// An upstream whose certificate carries its name under tls_server_name is fine; the rows above fail for their reason.
func TestWireDialTLS(t *testing.T) {
	ca := wiretest.NewCA(t)
	mutual := ca.MutualConfig("backend.internal")
	certFile, keyFile := ca.PairFiles(ca.ClientCert("proxy"))
	r := newRig(t, rigOptions{
		Scheme: "https://", Up: wiretest.Options{TLS: mutual},
		Block: "tls_trust_pool file " + ca.File() + "\ntls_server_name backend.internal\ntls_client_auth " + certFile + " " + keyFile,
	})
	r.complete()
	state := r.ups[0].conn.TLS()
	if state.ServerName != "backend.internal" || state.NegotiatedProtocol != "h2" || state.PeerCertificates[0].Subject.CommonName != "proxy" {
		t.Errorf("SNI %q, ALPN %q, client %v", state.ServerName, state.NegotiatedProtocol, state.PeerCertificates[0].Subject)
	}
}

// A failed dial does not fail the call while another upstream is there: nothing was sent yet.
func TestWireDialElsewhere(t *testing.T) {
	r := newRig(t, rigOptions{Upstreams: 2, Block: "lb_policy first"})
	r.ups[0].Close()
	c := r.open()
	c.client.WriteData(c.id, wiretest.Message([]byte("request")), true)
	c.take(1)
	if h := c.up.Collect(c.sid); string(h.Data) != string(wiretest.Message([]byte("request"))) {
		t.Errorf("the second upstream got %q", h.Data)
	}
	c.head()
	c.trailers()
	c.ok()
}

// "No usable upstream: UNAVAILABLE at once": an endpoint in backoff is not dialled again for the call's sake.
func TestWireNoUsableUpstream(t *testing.T) {
	r := newRig(t, rigOptions{Upstreams: 2})
	for _, p := range r.ups {
		p.Close()
	}
	r.fails(failure{
		code: codes.Unavailable, reason: "UPSTREAM_CONNECT_FAILED", attempts: 2,
		says: []string{"all 2 attempts failed", "connection refused"},
	})
	took := r.fails(failure{
		code: codes.Unavailable, reason: "NO_UPSTREAM", attempts: -1,
		says: []string{"none of the 2 upstreams is usable", "connection refused"},
	}, "grpc-timeout", "4S")
	if took > time.Second {
		t.Errorf("took %v", took)
	}
	t.Logf("the answer came after %v", took)
}

// An upstream that comes back is used again, without a call that fails in between more than its backoff lasts.
func TestWireBackAgain(t *testing.T) {
	addr := proxytest.FreeAddress(t)
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "grpc_proxy " + addr}})
	r.fails(failure{code: codes.Unavailable, reason: "UPSTREAM_CONNECT_FAILED", says: []string{"refused"}})
	r.fails(failure{code: codes.Unavailable, reason: "NO_UPSTREAM", says: []string{"the only upstream is not usable: connect failed", "refused"}, attempts: -1})
	nl, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	// A call was turned away, so the proxy dials by itself once the backoff (100 ms ± 20 %) is over.
	r.ups = []*peer{{Listener: wiretest.ListenOn(t, nl), t: t}}
	r.ups[0].current().ExpectSettingsAck()
	// The proxy puts the connection to use a moment after it has acknowledged our SETTINGS.
	eventually(t, "the upstream is usable", func() bool {
		usable := false
		upstream.States.Range(func(key string, s *upstream.State) bool {
			usable = strings.HasPrefix(key, "tcp/"+addr+" ") && s.Usable()
			return !usable
		})
		return usable
	})
	r.complete()
}

// "While one is still connecting, the call waits": an endpoint in backoff that is being dialled again is waited for when
// there is no other.
func TestWireWaitsForRedial(t *testing.T) {
	addr := proxytest.FreeAddress(t)
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "grpc_proxy " + addr}})
	r.fails(failure{code: codes.Unavailable, reason: "UPSTREAM_CONNECT_FAILED", says: []string{"refused"}})
	r.fails(failure{code: codes.Unavailable, reason: "NO_UPSTREAM", says: []string{"refused"}, attempts: -1})
	nl, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	// It takes the connection and says nothing yet: that the upstream speaks HTTP/2 is not known.
	r.ups = []*peer{{Listener: wiretest.ListenOn(t, nl), t: t}}
	eventually(t, "the proxy dials", func() bool { return r.ups[0].Accepted() == 1 })
	c := r.open()
	c.client.WriteData(c.id, wiretest.Message([]byte("request")), true)
	c.client.Barrier()
	c.take(0)
	c.up.Collect(c.sid)
	c.head()
	c.trailers()
	c.ok()
}

// A call goes back to an upstream whose connection took a little longer than it waits for one, before it waits for all the others.
func TestWireSlowConnections(t *testing.T) {
	r := newRig(t, rigOptions{Upstreams: 16, Up: wiretest.Options{NoSettings: true}})
	c := r.open()
	first := -1
	dialled := func() (n int) {
		for i, p := range r.ups {
			if p.Accepted() > 0 {
				n++
				if first < 0 {
					first = i
				}
			}
		}
		return n
	}
	eventually(t, "a connection", func() bool { return dialled() > 0 })
	conn := r.ups[first].current()
	eventually(t, "another one", func() bool { return dialled() > 1 })
	conn.WriteSettings()
	c.take(first)
	if n := dialled(); n == len(r.ups) {
		t.Error("all upstreams were waited for")
	}
	c.head()
	c.trailers()
	c.ok()
}

// Calls that wait for one of several upstreams whose streams are all taken go to the one that has a free stream first.
func TestWireFullUntilOneIsNot(t *testing.T) {
	r := newRig(t, rigOptions{
		Upstreams: 2, Block: "max_conns 1",
		Up: wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}},
	})
	stays, ends := r.open(), r.open()
	stays.take(0)
	ends.take(1) // or the other way round
	var calls []*rpc
	for range 4 { // each upstream has some in its line, unless chance has it otherwise
		id := r.client.Open(r.client.Request(wirePath, "grpc-timeout", "1M"), true)
		calls = append(calls, &rpc{r: r, client: r.client, id: id})
	}
	ends.up.WriteHeaders(ends.sid, wiretest.Head("grpc-status", "0"), true)
	for range calls {
		f := ends.up.ExpectHeaders()
		ends.up.WriteHeaders(f.Stream, wiretest.Head("grpc-status", "0"), true)
	}
	for _, c := range calls {
		c.ok()
	}
}
