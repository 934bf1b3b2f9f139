package transport

import (
	"bufio"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestProxyProtocol: each client has connections of its own, which name it; a client's part of the endpoint goes with
// its last connection.
func TestProxyProtocol(t *testing.T) {
	for _, version := range []byte{1, 2} {
		wiretest.CheckLeaks(t)
		inner, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		names := make(chan string, 10)
		l := wiretest.ListenOn(t, &namingListener{inner, names})
		l.Serve(func(c *wiretest.Conn) {
			for range 2 {
				answer(c, c.ExpectHeaders().Stream)
			}
			<-t.Context().Done()
		})
		e := endpoint(t, inner.Addr().String(), Config{ProxyProtocol: version, IdleTimeout: 100 * time.Millisecond})
		for client, want := range map[string]string{"192.0.2.1": "192.0.2.1:0", "2001:db8::7": "[2001:db8::7]:0", "::ffff:192.0.2.9": "192.0.2.9:0"} {
			for range 2 { // the second call shares the first's connection
				b := h2.NewBlocking()
				s, err := e.For(netip.MustParseAddr(client)).OpenWait(t.Context(), request(), true, b)
				if err != nil {
					t.Fatal(err)
				}
				s.Conn().Flush()
				wantEnd(t, b)
			}
			if got := <-names; got != want {
				t.Errorf("version %d: the connection names %s, want %s", version, got, want)
			}
		}
		if n := l.Accepted(); n != 3 {
			t.Errorf("%d connections for 3 clients", n)
		}
		eventually(t, "idle clients are forgotten", func() bool {
			e.clients.mu.Lock()
			defer e.clients.mu.Unlock()
			return len(e.clients.parts) == 0
		})
	}
}

// TestOwnConnectionRefused: an upstream that takes no further connection, for a client that is to have its own, still serves
// those that all others share.
func TestOwnConnectionRefused(t *testing.T) {
	wiretest.CheckLeaks(t)
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	wiretest.ListenOn(t, inner).Serve(func(c *wiretest.Conn) {
		for range 2 {
			answer(c, c.ExpectHeaders().Stream)
		}
		<-t.Context().Done()
	})
	e := endpoint(t, inner.Addr().String(), Config{})
	call := func() {
		t.Helper()
		b := h2.NewBlocking()
		s, err := e.OpenWait(t.Context(), request(), true, b)
		if err != nil {
			t.Fatal(err)
		}
		s.Conn().Flush()
		wantEnd(t, b)
	}
	call()
	inner.Close()
	if _, err := e.Own(netip.MustParseAddr("192.0.2.1")).OpenWait(t.Context(), request(), true, h2.NewBlocking()); err == nil || err.Kind != KindDial {
		t.Fatalf("%v, want a refused connection", err)
	}
	if !usable(e) {
		t.Error("not usable for the others any more")
	}
	call()
}

// namingListener reads the PROXY protocol's header of each connection and tells whom it names.
type namingListener struct {
	net.Listener
	names chan string
}

func (l *namingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	r := bufio.NewReader(c)
	h, err := proxyproto.Read(r)
	if err != nil {
		return nil, err
	}
	l.names <- h.SourceAddr.String()
	return &bufferedConn{c, r}, nil
}

type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// TestPreconnect: connections are there before the first call, and are replaced when they end as long as anybody wants that.
func TestPreconnect(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{MinConns: 2})
	stop := e.Preconnect(2)
	first, second := <-accepted, <-accepted
	eventually(t, "two connections", func() bool { return e.Conns() == 2 })
	other := e.Preconnect(2)
	stop()
	stop()
	first.Abort()
	third := <-accepted
	eventually(t, "two connections again", func() bool { return e.Conns() == 2 })
	other()
	second.Abort()
	third.Abort()
	eventually(t, "none any more", func() bool { return e.Conns() == 0 })
	e.Preconnect(2)
	<-accepted
	<-accepted
	eventually(t, "two new ones", func() bool { return e.Conns() == 2 })
	if n := l.Accepted(); n != 5 {
		t.Errorf("%d connections were made, want 5", n)
	}
}

// Where each client has connections of its own, there is hope as long as one of these is being made or its endpoint is to be dialled.
func TestHopeOfOwnConnections(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	e := endpoint(t, addr, Config{ProxyProtocol: 2})
	if e.Hopeful() {
		t.Error("hope of connections that nobody makes")
	}
	part := e.For(netip.MustParseAddr("192.0.2.1"))
	part.Ask()
	if !e.Hopeful() && part.LastError() == nil {
		t.Error("no hope while it is dialled")
	}
	eventually(t, "hope after all dials have failed", func() bool { return part.LastError() != nil && !e.Hopeful() })
}
