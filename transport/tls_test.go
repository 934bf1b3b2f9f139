package transport

import (
	"crypto/tls"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// TestTLSResumption: a second connection to the same endpoint resumes the first's TLS session.
func TestTLSResumption(t *testing.T) {
	wiretest.CheckLeaks(t)
	ca := wiretest.NewCA(t)
	l, accepted := listen(t, wiretest.Options{TLS: ca.ServerConfig()})
	e := endpoint(t, l.Addr(), Config{TLS: ca.ClientConfig()})
	_, b := open(t, e)
	first := <-accepted
	if first.TLS().DidResume {
		t.Fatal("the first connection resumed something")
	}
	id := first.ExpectHeaders().Stream
	answer(first, id)
	wantEnd(t, b) // so that the session ticket, which came before, was read
	first.WriteGoAway(id, h2.NoError, "")
	second := <-accepted
	if !second.TLS().DidResume {
		t.Fatal("the second connection made a full handshake")
	}
	if p := second.TLS().NegotiatedProtocol; p != "h2" {
		t.Fatalf("protocol %q", p)
	}
}

// TestTLSNoResumptionAcrossChange: when what a connection rests on has changed, a session of before is not resumed: a resumed
// one would not be verified again.
func TestTLSNoResumptionAcrossChange(t *testing.T) {
	wiretest.CheckLeaks(t)
	ca, other := wiretest.NewCA(t), wiretest.NewCA(t)
	l, accepted := listen(t, wiretest.Options{TLS: ca.ServerConfig()})
	var now atomic.Pointer[tls.Config]
	now.Store(ca.ClientConfig())
	e := endpoint(t, l.Addr(), Config{TLS: now.Load(), CurrentTLS: func(*zap.Logger) *tls.Config { return now.Load() }})
	_, b := open(t, e)
	c := <-accepted
	id := c.ExpectHeaders().Stream
	answer(c, id)
	wantEnd(t, b) // so that the session ticket, which came before, was read
	c.WriteGoAway(id, h2.NoError, "")
	// leave ends a used connection; the next one is made at once.
	leave := func(resumed bool) {
		t.Helper()
		c = <-accepted
		if got := c.TLS().DidResume; got != resumed {
			t.Errorf("resumed: %v, want %v", got, resumed)
		}
		_, b := open(t, e)
		id := c.ExpectHeaders().Stream
		answer(c, id)
		wantEnd(t, b)
	}
	leave(true)
	now.Store(ca.ClientConfig())
	c.WriteGoAway(3, h2.NoError, "")
	leave(false)
	c.WriteGoAway(3, h2.NoError, "")
	leave(true)
	now.Store(other.ClientConfig())
	c.WriteGoAway(3, h2.NoError, "")
	c.ExpectClosed()
	_, terr := e.OpenWait(t.Context(), request(), true, h2.NewBlocking())
	if terr == nil || terr.Kind != KindTLS && terr.Kind != KindBackoff || !strings.Contains(terr.Text(), "unknown authority") {
		t.Errorf("error %v, want one of an unknown authority", terr)
	}
}

// TestExpiredCertificate: the reason has no time of day in it, so that it is the same at each attempt and tells clients nothing
// of the proxy.
func TestExpiredCertificate(t *testing.T) {
	wiretest.CheckLeaks(t)
	ca := wiretest.NewCA(t)
	l, err := tls.Listen("tcp", "127.0.0.1:0", ca.ServerConfig())
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		if c, err := l.Accept(); err == nil {
			_ = c.(*tls.Conn).Handshake() // fails
			_ = c.Close()
		}
	}()
	defer func() { _ = l.Close(); <-served }()
	cfg := ca.ClientConfig()
	cfg.Time = func() time.Time { return time.Now().AddDate(100, 0, 0) }
	_, terr := endpoint(t, l.Addr().String(), Config{TLS: cfg}).OpenWait(t.Context(), request(), true, h2.NewBlocking())
	wantKind(t, terr, KindTLS)
	if want := "TLS handshake failed: the upstream's certificate is not valid at this time (it has expired, or the clock is wrong)"; terr.Text() != want {
		t.Errorf("%q, want %q", terr.Text(), want)
	}
}

// TestBothFamilies: a name with addresses of both families is reached though only one of them answers (RFC 8305).
func TestBothFamilies(t *testing.T) {
	l, accepted := listen(t)
	_, port, err := net.SplitHostPort(l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	e := NewEndpoint(upstream.Address{Network: "tcp", Dial: net.JoinHostPort("localhost", port)}, Config{})
	t.Cleanup(func() { _ = e.Destruct() })
	_, b := open(t, e)
	c := <-accepted
	answer(c, c.ExpectHeaders().Stream)
	wantEnd(t, b)
}
