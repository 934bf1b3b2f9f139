package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const timeout = 5 * time.Second

// call is the Opener of a test.
type call struct {
	recv h2.Receiver
	told chan opened
}

func (c *call) Head() ([]h2.Field, bool, h2.Receiver) { return request(), true, c.recv }
func (c *call) Opened(s *h2.Stream)                   { c.told <- opened{stream: s} }
func (c *call) Refused(err *Error)                    { c.told <- opened{err: err} }

// try asks for a stream with the ticket. The channel tells what comes of it.
func try(e *Endpoint, t *Ticket, recv h2.Receiver) <-chan opened {
	c := &call{recv, make(chan opened, 1)}
	t.Opener = c
	if s, err := e.Open(t); s != nil || err != nil {
		c.told <- opened{s, err}
	}
	return c.told
}

func request() []h2.Field {
	return []h2.Field{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: "/s/m"},
		{Name: ":authority", Value: "test"},
		{Name: "te", Value: "trailers"},
		{Name: "content-type", Value: "application/grpc"},
	}
}

func endpoint(t *testing.T, addr string, cfg Config) *Endpoint {
	t.Helper()
	e := NewEndpoint(upstream.Address{Network: "tcp", Dial: addr}, cfg)
	t.Cleanup(func() {
		if err := e.Destruct(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// usable tells whether the connections are no reason to keep calls away.
func usable(e *Endpoint) bool { return !e.link.Has(upstream.Backoff | upstream.NoRoom) }

func open(t *testing.T, e *Endpoint) (*h2.Stream, *h2.Blocking) {
	t.Helper()
	b := h2.NewBlocking()
	s, err := e.OpenWait(t.Context(), request(), true, b)
	if err != nil {
		t.Fatalf("opening a stream: %v", err)
	}
	s.Conn().Flush()
	return s, b
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(timeout); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// listen opens a server whose connections the test takes from the channel.
func listen(t *testing.T, opts ...wiretest.Options) (*wiretest.Listener, <-chan *wiretest.Conn) {
	t.Helper()
	l := wiretest.Listen(t, opts...)
	conns := make(chan *wiretest.Conn, 16)
	l.Serve(func(c *wiretest.Conn) {
		conns <- c
		<-t.Context().Done()
	})
	return l, conns
}

func answer(c *wiretest.Conn, stream uint32) {
	c.WriteHeaders(stream, wiretest.Head("grpc-status", "0"), true)
}

// wantEnd waits for the end of a stream that was answered.
func wantEnd(t *testing.T, b *h2.Blocking) {
	t.Helper()
	if _, err := b.WaitHead(t.Context()); err != nil {
		t.Fatalf("waiting for the answer: %v", err)
	}
}

func TestOneConnectionForMany(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{})
	if e.Conns() != 0 || l.Accepted() != 0 {
		t.Fatal("dialled before anybody called")
	}
	var answers []*h2.Blocking
	for range 50 {
		_, b := open(t, e)
		answers = append(answers, b)
	}
	c := <-accepted
	for range answers {
		answer(c, c.ExpectHeaders().Stream)
	}
	for _, b := range answers {
		wantEnd(t, b)
	}
	if n := l.Accepted(); n != 1 {
		t.Fatalf("%d connections, want 1", n)
	}
}

// TestGrowsWithStreams: gRFC A105: another connection when the peer's MAX_CONCURRENT_STREAMS is used up, up to the
// bound; then calls wait, first come, first served.
func TestGrowsWithStreams(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t, wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 2}}})
	e := endpoint(t, l.Addr(), Config{MaxConns: 2})
	for range 4 {
		open(t, e)
	}
	first := <-accepted
	second := <-accepted
	if n := e.Conns(); n != 2 {
		t.Fatalf("%d connections, want 2", n)
	}
	order := make(chan int, 2)
	for i := range 2 {
		go func() {
			if _, err := e.OpenWait(t.Context(), request(), true, h2.NewBlocking()); err != nil {
				t.Errorf("waiting call %d: %v", i, err)
			}
			order <- i
		}()
		eventually(t, "the call waits", func() bool { return e.waiting.Load() == int32(i+1) })
	}
	answer(second, second.ExpectHeaders().Stream)
	if i := <-order; i != 0 {
		t.Fatal("the call that came second was served first")
	}
	answer(first, first.ExpectHeaders().Stream)
	<-order
	if n := l.Accepted(); n != 2 {
		t.Fatalf("%d connections, want 2", n)
	}
}

// TestGrowsInTime: the next connection is there before the last stream of the first is taken.
func TestGrowsInTime(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t, wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 16}}})
	e := endpoint(t, l.Addr(), Config{})
	for range 13 {
		open(t, e)
	}
	<-accepted
	if n := e.Conns(); n != 1 || l.Accepted() != 1 {
		t.Fatalf("%d connections for 13 streams of 16", n)
	}
	open(t, e)
	<-accepted
	eventually(t, "a second connection", func() bool { return e.Conns() == 2 })
}

func TestQueueBounds(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t, wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}})
	e := endpoint(t, l.Addr(), Config{MaxConns: 1, QueueSize: 1})
	open(t, e)
	c := <-accepted

	// A full queue.
	leaving, leave := context.WithCancel(t.Context())
	left := make(chan *Error)
	go func() {
		_, err := e.OpenWait(leaving, request(), true, h2.NewBlocking())
		left <- err
	}()
	eventually(t, "the call waits", func() bool { return e.waiting.Load() == 1 })
	_, err := e.OpenWait(t.Context(), request(), true, h2.NewBlocking())
	wantKind(t, err, KindQueueFull)

	// The caller leaves.
	leave()
	wantKind(t, <-left, KindCanceled)

	// The deadline passes.
	late, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = e.OpenWait(late, request(), true, h2.NewBlocking())
	wantKind(t, err, KindQueueTimeout)
	o := <-try(e, &Ticket{Deadline: time.Now().Add(20 * time.Millisecond), Queue: true}, h2.NewBlocking())
	wantKind(t, o.err, KindQueueTimeout)

	// The place is free again, and nobody's turn was lost.
	answer(c, c.ExpectHeaders().Stream)
	open(t, e)
}

func wantKind(t *testing.T, err *Error, kind Kind) {
	t.Helper()
	if err == nil || err.Kind != kind || !err.Unprocessed {
		t.Fatalf("error %#v (%v), want kind %d, unprocessed", err, err, kind)
	}
}

func TestBackoff(t *testing.T) {
	wiretest.CheckLeaks(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()

	e := endpoint(t, addr, Config{})
	_, terr := e.OpenWait(t.Context(), request(), true, h2.NewBlocking())
	wantKind(t, terr, KindDial)
	if terr.Text() != "connect failed: connection refused" {
		t.Fatalf("text %q", terr.Text())
	}
	if !strings.Contains(terr.Error(), addr) {
		t.Fatalf("%q does not name the endpoint for the log", terr)
	}
	if usable(e) {
		t.Fatal("usable though it cannot be dialled")
	}
	_, terr = e.OpenWait(t.Context(), request(), true, h2.NewBlocking())
	wantKind(t, terr, KindBackoff)

	// It comes back: the call that was turned away made the endpoint look for itself.
	again, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("the port was taken by somebody else: %v", err)
	}
	wiretest.ListenOn(t, again).Serve(func(c *wiretest.Conn) { <-t.Context().Done() })
	eventually(t, "usable again", func() bool { return usable(e) })
	if e.Conns() != 1 {
		t.Fatal("usable without a connection")
	}
	if e.LastError() != nil {
		t.Fatal("the old error stayed")
	}
}

func TestBackoffDelay(t *testing.T) {
	for n, want := range map[int]time.Duration{
		1: 100 * time.Millisecond, 2: 200 * time.Millisecond, 7: 6400 * time.Millisecond, 8: 10 * time.Second, 100: 10 * time.Second,
	} {
		if got := backoffDelay(n); got != want {
			t.Errorf("after %d failures %v, want %v", n, got, want)
		}
	}
	for range 1000 {
		if d := jitter(time.Second, 0.2); d < 800*time.Millisecond || d > 1200*time.Millisecond {
			t.Fatalf("jitter gave %v", d)
		}
	}
}

func TestDialErrors(t *testing.T) {
	ca, stranger := wiretest.NewCA(t), wiretest.NewCA(t)
	noH2 := ca.ServerConfig()
	noH2.NextProtos = []string{"http/1.1"}
	noALPN := ca.ServerConfig()
	noALPN.NextProtos = nil

	raw := func(f func(net.Conn)) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); f(c) }()
			}
		}()
		return l.Addr().String()
	}
	tlsServer := func(cfg *tls.Config) string {
		return raw(func(c net.Conn) {
			tc := tls.Server(c, cfg)
			_ = tc.Handshake()
			_, _ = io.Copy(io.Discard, tc)
		})
	}
	for _, tc := range []struct {
		name string
		addr string
		tls  *tls.Config
		kind Kind
		text string
	}{
		{"silent", raw(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }), nil, KindDial, "timed out"},
		{"hangs up", raw(func(c net.Conn) { _, _ = io.CopyN(io.Discard, c, 1) }), nil, KindDial, "does it expect TLS?"},
		{"HTTP/1", raw(func(c net.Conn) {
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n")
			_, _ = io.Copy(io.Discard, c)
		}), nil, KindNotHTTP2, "HTTP/1.1 400 Bad Request"},
		{"stranger's certificate", tlsServer(stranger.ServerConfig()), ca.ClientConfig(), KindTLS, "certificate signed by unknown authority"},
		{"other name", tlsServer(ca.ServerConfig("elsewhere.test")), ca.ClientConfig(), KindTLS, "tls_server_name"},
		{"no h2", tlsServer(noH2), ca.ClientConfig(), KindALPN, "ALPN h2"},
		{"no ALPN", tlsServer(noALPN), ca.ClientConfig(), KindALPN, "ALPN h2"},
		{"plaintext for TLS", raw(func(c net.Conn) { _, _ = io.WriteString(c, "hello, I am no TLS server"); _, _ = io.Copy(io.Discard, c) }), ca.ClientConfig(), KindTLS, "does not speak TLS"},
		{"unknown name", "name.invalid:1", nil, KindDial, "name"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := endpoint(t, tc.addr, Config{TLS: tc.tls, DialTimeout: 300 * time.Millisecond})
			_, err := e.OpenWait(t.Context(), request(), true, h2.NewBlocking())
			wantKind(t, err, tc.kind)
			if !strings.Contains(err.Text(), tc.text) {
				t.Fatalf("text %q does not contain %q", err.Text(), tc.text)
			}
			if strings.Contains(err.Text(), "127.0.0.1") {
				t.Fatalf("text %q names the address", err.Text())
			}
		})
	}
}

// TestGoAway: RFC 9113 section 6.8: streams up to the last identifier finish, new ones go to a new connection.
func TestGoAway(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{})
	_, old := open(t, e)
	c := <-accepted
	id := c.ExpectHeaders().Stream
	c.WriteGoAway(id, http2.ErrCodeNo, "")
	next := <-accepted // dialled in time, without a call
	_, b := open(t, e)
	answer(next, next.ExpectHeaders().Stream)
	wantEnd(t, b)
	answer(c, id)
	wantEnd(t, old)
	_ = c.ExpectClosed()
}

// TestTooManyPings: gRFC A8: "too_many_pings" doubles the interval.
func TestTooManyPings(t *testing.T) {
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{PingInterval: time.Hour})
	open(t, e)
	c := <-accepted
	c.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, "too_many_pings")
	eventually(t, "the interval doubles", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.ping == 2*time.Hour
	})
}

func TestIdleAndAge(t *testing.T) {
	wiretest.CheckLeaks(t)
	t.Run("idle", func(t *testing.T) {
		l, accepted := listen(t)
		e := endpoint(t, l.Addr(), Config{IdleTimeout: 50 * time.Millisecond})
		_, b := open(t, e)
		c := <-accepted
		answer(c, c.ExpectHeaders().Stream)
		wantEnd(t, b)
		_ = c.ExpectClosed()
		eventually(t, "out of the pool", func() bool { return e.Conns() == 0 })
		if l.Accepted() != 1 {
			t.Fatal("an idle connection was replaced")
		}
		open(t, e)
	})
	t.Run("age", func(t *testing.T) {
		l, accepted := listen(t)
		e := endpoint(t, l.Addr(), Config{MaxAge: 50 * time.Millisecond})
		_, b := open(t, e)
		c := <-accepted
		id := c.ExpectHeaders().Stream
		<-accepted // its successor
		answer(c, id)
		wantEnd(t, b)
		_ = c.ExpectClosed()
	})
}

// TestReleased: streams of a configuration that is gone finish, and its late calls still find a connection.
func TestReleased(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := NewEndpoint(upstream.Address{Network: "tcp", Dial: l.Addr()}, Config{})
	_, b := open(t, e)
	c := <-accepted
	id := c.ExpectHeaders().Stream
	if err := e.Destruct(); err != nil {
		t.Fatal(err)
	}
	_, late := open(t, e)
	c2 := <-accepted
	answer(c2, c2.ExpectHeaders().Stream)
	wantEnd(t, late)
	_ = c2.ExpectClosed()
	answer(c, id)
	wantEnd(t, b)
	_ = c.ExpectClosed()
}

func TestReleasedDial(t *testing.T) {
	e := NewEndpoint(upstream.Address{Network: "tcp", Dial: "127.0.0.1:1"}, Config{})
	if err := e.Destruct(); err != nil {
		t.Fatal(err)
	}
	_, err := e.OpenWait(t.Context(), request(), true, h2.NewBlocking())
	wantKind(t, err, KindDial)
	if !errors.As(err, new(*net.OpError)) {
		t.Fatalf("%v hides its cause", err)
	}
}

// TestCrowd: many more calls than streams; every one is served, and the peer's limit is never exceeded.
func TestCrowd(t *testing.T) {
	wiretest.CheckLeaks(t)
	const limit, conns, calls = 3, 2, 600
	l := wiretest.Listen(t, wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: limit}}})
	var most atomic.Int32
	l.Serve(func(c *wiretest.Conn) {
		var openNow atomic.Int32
		for {
			id := c.ExpectHeaders().Stream
			if n := openNow.Add(1); n > most.Load() {
				most.Store(n)
			}
			go func() {
				openNow.Add(-1)
				answer(c, id)
			}()
		}
	})
	e := endpoint(t, l.Addr(), Config{MaxConns: conns, QueueSize: calls})
	var wg sync.WaitGroup
	for range calls {
		wg.Go(func() {
			b := h2.NewBlocking()
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			s, err := e.OpenWait(ctx, request(), true, b)
			if err != nil {
				t.Errorf("a call was not served: %v", err)
				return
			}
			s.Conn().Flush()
			if _, err := b.WaitHead(t.Context()); err != nil {
				t.Errorf("a call was not answered: %v", err)
			}
		})
	}
	wg.Wait()
	if n := most.Load(); n > limit {
		t.Fatalf("%d streams at once on a connection that allows %d", n, limit)
	}
	if n := l.Accepted(); n > conns {
		t.Fatalf("%d connections, at most %d are allowed", n, conns)
	}
	if n := e.waiting.Load(); n != 0 {
		t.Fatalf("%d calls left in the queue", n)
	}
}
