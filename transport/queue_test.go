package transport

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// openLater opens a stream in the background and delivers what came of it.
func openLater(e *Endpoint) <-chan *Error {
	result := make(chan *Error, 1)
	go func() {
		s, err := e.OpenWait(context.Background(), request(), true, h2.NewBlocking())
		if s != nil {
			s.Conn().Flush()
		}
		result <- err
	}()
	return result
}

func waiting(t *testing.T, e *Endpoint, n int32) {
	t.Helper()
	eventually(t, "the call waits in the queue", func() bool { return e.waiting.Load() == n })
}

func wantOpened(t *testing.T, result <-chan *Error) {
	t.Helper()
	select {
	case err := <-result:
		if err != nil {
			t.Fatalf("the waiting call failed: %v", err)
		}
	case <-time.After(timeout):
		t.Fatal("the waiting call was forgotten")
	}
}

// TestFurtherDialFails: a call waits for a further connection while those that are there are busy for long. When the dial
// fails it is tried again after the backoff, though no other call comes that would ask for it.
func TestFurtherDialFails(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t)
	e := endpoint(t, l.Addr(), Config{MaxStreamsPerConn: 1, QueueTimeout: timeout})
	opened := openLater(e)
	first := l.Accept()
	wantOpened(t, opened)
	first.ExpectHeaders()

	second := openLater(e)
	if err := l.AcceptRaw().Close(); err != nil {
		t.Fatal(err)
	}
	c := l.Accept()
	wantOpened(t, second)
	c.ExpectHeaders()
}

// TestReleasedWhileWaiting: calls that wait when the endpoint's last configuration goes are served all the same.
func TestReleasedWhileWaiting(t *testing.T) {
	t.Run("for a connection", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		l := wiretest.Listen(t, wiretest.Options{NoSettings: true})
		e := endpoint(t, l.Addr(), Config{})
		result := openLater(e)
		c := l.Accept()
		waiting(t, e, 1)
		if err := e.Destruct(); err != nil {
			t.Fatal(err)
		}
		c.WriteSettings()
		wantOpened(t, result)
		answer(c, c.ExpectHeaders().Stream)
		_ = c.ExpectClosed()
	})
	t.Run("for a stream", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		l, accepted := listen(t)
		e := endpoint(t, l.Addr(), Config{MaxConns: 1, MaxStreamsPerConn: 1})
		open(t, e)
		first := <-accepted
		first.ExpectHeaders()
		result := openLater(e)
		waiting(t, e, 1)
		if err := e.Destruct(); err != nil {
			t.Fatal(err)
		}
		wantOpened(t, result)
		second := <-accepted
		answer(second, second.ExpectHeaders().Stream)
	})
	t.Run("and gives up", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		l := wiretest.Listen(t, wiretest.Options{NoSettings: true})
		e := endpoint(t, l.Addr(), Config{})
		if err := e.Destruct(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan *Error, 1)
		go func() {
			_, err := e.OpenWait(ctx, request(), true, h2.NewBlocking())
			result <- err
		}()
		l.Accept()
		cancel()
		wantKind(t, <-result, KindCanceled)
	})
}

// TestGoAwayAtOnce: an upstream that sends every new connection away is not dialled without a pause.
func TestGoAwayAtOnce(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t, wiretest.Options{NoSettings: true})
	l.Serve(func(c *wiretest.Conn) {
		c.Batch(func() {
			c.WriteSettings()
			c.WriteGoAway(0, 0, "full")
		})
		<-t.Context().Done()
	})
	e := endpoint(t, l.Addr(), Config{QueueTimeout: 300 * time.Millisecond})
	if err := <-openLater(e); err == nil {
		t.Fatal("a stream was opened")
	} else {
		t.Log(err)
	}
	if n := l.Accepted(); n > 3 {
		t.Fatalf("%d connections were made for one call", n)
	}
}

// TestClientsAreForgotten: the parts of clients go, also those that never had a connection.
func TestClientsAreForgotten(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t)
	l.Close()
	e := endpoint(t, l.Addr(), Config{ProxyProtocol: 1})
	p := e.For(netip.MustParseAddr("192.0.2.1"))
	wantKind(t, <-openLater(p), KindDial)
	if e.LastError() == nil {
		t.Error("the endpoint does not know why it is in backoff")
	}
	eventually(t, "the client is forgotten", func() bool {
		e.clients.mu.Lock()
		defer e.clients.mu.Unlock()
		return len(e.clients.parts) == 0
	})
	if !usable(e) {
		t.Error("the endpoint stays in backoff")
	}
}

// TestClientsOfReleased: connections that are made for a client when the endpoint's last configuration is gone close with
// their streams.
func TestClientsOfReleased(t *testing.T) {
	wiretest.CheckLeaks(t)
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	names := make(chan string, 10)
	l := wiretest.ListenOn(t, &namingListener{inner, names})
	e := NewEndpoint(upstream.Address{Network: "tcp", Dial: l.Addr()}, Config{ProxyProtocol: 2, IdleTimeout: -1})
	if err := e.Destruct(); err != nil {
		t.Fatal(err)
	}
	result := openLater(e.For(netip.MustParseAddr("192.0.2.1")))
	c := l.Accept()
	wantOpened(t, result)
	if got := <-names; got != "192.0.2.1:0" {
		t.Errorf("the connection names %s", got)
	}
	answer(c, c.ExpectHeaders().Stream)
	if err := c.ExpectClosed(); err == nil {
		t.Error("no error")
	}
}

// TestCauseNamesNoAddress: what clients are told of a failed look-up or dial has no address in it.
func TestCauseNamesNoAddress(t *testing.T) {
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	resolver := func(addr string) *net.Resolver {
		return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, addr)
		}}
	}
	for name, cfg := range map[string]Config{
		"no DNS server":          {Resolver: resolver("127.0.0.1:1")},
		"silent DNS server":      {Resolver: resolver(silent.LocalAddr().String()), DialTimeout: 100 * time.Millisecond},
		"another family's local": {LocalAddr: &net.TCPAddr{IP: net.IPv6loopback}},
	} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			addr := "upstream.internal.test:50051"
			if cfg.Resolver == nil {
				addr = "127.0.0.1:50051"
			}
			err := <-openLater(endpoint(t, addr, cfg))
			wantKind(t, err, KindDial)
			t.Log(err)
			for _, part := range []string{"127.0.0.1", "::1", "internal.test", "50051"} {
				if strings.Contains(err.Text(), part) {
					t.Errorf("%q names %s", err.Text(), part)
				}
			}
		})
	}
}
