package listen

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

const timeout = wiretest.Timeout

// port is a TCP port on which the listeners of several configurations follow each other. The newest gets what is dialled.
type port struct {
	tcp net.Listener

	mu     sync.Mutex
	newest *turn
}

func newPort(t *testing.T) *port {
	t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &port{tcp: tcp}
	var wg sync.WaitGroup
	wg.Go(p.accept)
	t.Cleanup(func() { _ = tcp.Close(); wg.Wait() })
	return p
}

func (p *port) accept() {
	for {
		nc, err := p.tcp.Accept()
		if err != nil {
			return
		}
		p.hand(nc)
	}
}

// hand gives a connection to the newest listener; if that is closed, nobody takes it.
func (p *port) hand(nc net.Conn) {
	var to, before *turn
	for {
		before = to
		p.mu.Lock()
		to = p.newest
		p.mu.Unlock()
		if to == before {
			_ = nc.Close()
			return
		}
		select {
		case to.conns <- nc:
			return
		case <-to.closed:
		}
	}
}

func (p *port) addr() string { return p.tcp.Addr().String() }

// listen opens a listener on the port.
func (p *port) listen() net.Listener {
	l := &turn{port: p, conns: make(chan net.Conn), errs: make(chan error), closed: make(chan struct{})}
	p.mu.Lock()
	p.newest = l
	p.mu.Unlock()
	return l
}

// turn is a port's listener for a while.
type turn struct {
	port   *port
	conns  chan net.Conn
	errs   chan error // that Accept is to return
	once   sync.Once
	closed chan struct{}
}

func (l *turn) Accept() (net.Conn, error) {
	select {
	case nc := <-l.conns:
		return nc, nil
	case err := <-l.errs:
		return nil, err
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *turn) Addr() net.Addr { return l.port.tcp.Addr() }

func (l *turn) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// site is a server of net/http behind a wrapped listener. It answers with its name, the protocol and the request's body.
type site struct {
	l      *Listener
	inner  *turn
	server *http.Server
	hold   chan struct{} // requests for /hold wait for it
	served sync.WaitGroup
}

type options struct {
	Name  string
	TLS   *tls.Config
	Terms string
	Limits
}

// open serves the port.
func (p *port) open(t *testing.T, o options) *site {
	t.Helper()
	inner := p.listen()
	s := &site{inner: inner.(*turn), hold: make(chan struct{})}
	if o.TLS != nil {
		inner = tls.NewListener(inner, o.TLS)
	}
	s.l = Wrap(inner, Config{Plaintext: true, Terms: o.Terms, Limits: func() Limits { return o.Limits }})
	s.server = &http.Server{Protocols: new(http.Protocols), ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.URL.Path == "/hold" {
			_ = http.NewResponseController(w).Flush()
			<-s.hold
		}
		_, _ = fmt.Fprintf(w, "%s %s %s", o.Name, r.Proto, body)
	})}
	s.server.Protocols.SetHTTP1(true)
	s.server.Protocols.SetUnencryptedHTTP2(true)
	s.served.Go(func() { _ = s.server.Serve(hiding{s.l}) })
	t.Cleanup(func() { s.close(t) })
	return s
}

// close closes the site, as Caddy does.
func (s *site) close(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if err := s.server.Shutdown(ctx); err != nil {
		_ = s.server.Close()
	}
	s.served.Wait()
}

// hiding keeps from Go's server that a connection within the process has a state of TLS, as Caddy does.
type hiding struct{ *Listener }

func (h hiding) Accept() (net.Conn, error) {
	nc, err := h.Listener.Accept()
	if _, ok := nc.(*secured); ok {
		nc = struct{ net.Conn }{nc}
	}
	return nc, err
}

// waiting is how many connections have not said yet what they speak.
func (s *site) waiting() int {
	p := &s.l.hub.pending
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.list.Len()
}

// eventually polls until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(timeout); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// client is a client of Go's that speaks the protocols.
func client(t *testing.T, cfg *tls.Config, set ...func(*http.Protocols, bool)) *http.Client {
	tr := &http.Transport{TLSClientConfig: cfg, Protocols: new(http.Protocols)}
	for _, s := range set {
		s(tr.Protocols, true)
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: timeout}
}

// post returns the answer's body.
func post(c *http.Client, url, body string) (string, error) {
	r, err := c.Post(url, "text/plain", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

// Connections that speak HTTP/2 are read by us, and all requests are served.
func TestProtocols(t *testing.T) {
	ca := wiretest.NewCA(t)
	h1, h2, h2c := (*http.Protocols).SetHTTP1, (*http.Protocols).SetHTTP2, (*http.Protocols).SetUnencryptedHTTP2
	for _, tc := range []struct {
		name   string
		secure bool
		set    func(*http.Protocols, bool)
		want   string
		ours   int // connections
	}{
		{"http1", false, h1, "HTTP/1.1", 0},
		{"http1_tls", true, h1, "HTTP/1.1", 0},
		{"h2_tls", true, h2, "HTTP/2.0", 1},
		{"h2c", false, h2c, "HTTP/2.0", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			p := newPort(t)
			o, url := options{Name: "site"}, "http://"+p.addr()
			if tc.secure {
				o.TLS, url = ca.ServerConfig(), "https://"+p.addr()
				o.TLS.NextProtos = []string{"h2", "http/1.1"}
			}
			s := p.open(t, o)
			c := client(t, &tls.Config{RootCAs: ca.Pool}, tc.set)
			for _, body := range []string{"", "body", strings.Repeat("x", 1<<20)} {
				if got, err := post(c, url, body); err != nil || got != "site "+tc.want+" "+body {
					t.Fatalf("%.40q, error %v", got, err)
				}
			}
			if n := len(s.l.hub.all()); n != tc.ours {
				t.Errorf("we read %d connections, want %d", n, tc.ours)
			}
		})
	}
}

// get speaks HTTP/1.1 on a connection by hand.
func get(nc net.Conn) (string, error) {
	_ = nc.SetDeadline(time.Now().Add(timeout))
	if _, err := io.WriteString(nc, "GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"); err != nil {
		return "", err
	}
	r, err := http.ReadResponse(bufio.NewReader(nc), nil)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

// A client without ALPN speaks HTTP/1.1.
func TestWithoutALPN(t *testing.T) {
	wiretest.CheckLeaks(t)
	ca, p := wiretest.NewCA(t), newPort(t)
	p.open(t, options{Name: "site", TLS: ca.ServerConfig()})
	nc := tls.Client(wiretest.DialRaw(t, p.addr()), &tls.Config{RootCAs: ca.Pool, ServerName: "localhost"})
	if got, err := get(nc); err != nil || got != "site HTTP/1.1 " {
		t.Errorf("%q, error %v", got, err)
	}
}

// Go's server has a word for clients that speak plaintext on a TLS port.
func TestPlaintextOnTLS(t *testing.T) {
	wiretest.CheckLeaks(t)
	ca, p := wiretest.NewCA(t), newPort(t)
	p.open(t, options{TLS: ca.ServerConfig()})
	got, err := get(wiretest.DialRaw(t, p.addr()))
	if err != nil || got != "Client sent an HTTP request to an HTTPS server.\n" {
		t.Errorf("%q, error %v", got, err)
	}
}

// closed waits until the other side has closed the connection, and fails if it says anything before.
func closed(t *testing.T, nc net.Conn) {
	t.Helper()
	_ = nc.SetReadDeadline(time.Now().Add(timeout))
	n, err := nc.Read(make([]byte, 1))
	if n > 0 || err == nil || errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
		t.Errorf("%d bytes, error %v, want the end of the connection", n, err)
	}
}

func isTimeout(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// Whoever does not get to the point is closed at the limit.
func TestLimits(t *testing.T) {
	ca := wiretest.NewCA(t)
	for _, tc := range []struct {
		name   string
		secure bool
		sent   string
	}{
		{"nothing", false, ""},
		{"part_of_preface", false, "PRI * HTTP/2.0\r\n"},
		{"no_handshake", true, ""},
		{"part_of_handshake", true, "\x16\x03\x01\x02"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			p := newPort(t)
			o := options{Limits: Limits{Handshake: 50 * time.Millisecond, Preface: 50 * time.Millisecond}}
			if tc.secure {
				o.TLS = ca.ServerConfig()
			}
			p.open(t, o)
			nc := wiretest.DialRaw(t, p.addr())
			if _, err := io.WriteString(nc, tc.sent); err != nil {
				t.Fatal(err)
			}
			closed(t, nc)
		})
	}
}

// What is not HTTP/2 is the server's byte for byte, however it comes.
func TestGivenOn(t *testing.T) {
	for _, sent := range []string{
		"P", "PR", "PRI", "POST / HTTP/1.1\r\n\r\nbody", "PROPFIND / HTTP/1.1\r\n\r\n", "PRI / HTTP/1.1\r\n\r\n", "PRI * HTTP/1.1\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", "PRI * HTTP/2.0\r\n\r\nSM\r\n\rx and more", "\x00\x01", strings.Repeat("GET /", 10_000),
	} {
		for _, pieces := range []bool{false, true} {
			t.Run(fmt.Sprintf("%.12q/%t", sent, pieces), func(t *testing.T) {
				wiretest.CheckLeaks(t)
				p := newPort(t)
				l := Wrap(p.listen(), Config{Plaintext: true, Limits: func() Limits { return Limits{} }})
				defer l.Close()
				nc := wiretest.DialRaw(t, p.addr())
				send(t, nc, sent, pieces)
				if err := nc.(*net.TCPConn).CloseWrite(); err != nil {
					t.Fatal(err)
				}
				given, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				defer given.Close()
				_ = given.SetReadDeadline(time.Now().Add(timeout))
				if got, err := io.ReadAll(given); err != nil || string(got) != sent {
					t.Errorf("%.40q, error %v", got, err)
				}
			})
		}
	}
}

// send sends a text, its first bytes one by one if wanted.
func send(t *testing.T, nc net.Conn, text string, pieces bool) {
	t.Helper()
	for pieces && len(text) > 1 && len(text) < 100 {
		if _, err := io.WriteString(nc, text[:1]); err != nil {
			t.Fatal(err)
		}
		text = text[1:]
	}
	if _, err := io.WriteString(nc, text); err != nil {
		t.Fatal(err)
	}
}

// The server writes to a connection of which something was read as to any other.
func TestPrefixed(t *testing.T) {
	wiretest.CheckLeaks(t)
	p := newPort(t)
	l := Wrap(p.listen(), Config{Plaintext: true, Limits: func() Limits { return Limits{} }})
	defer l.Close()
	nc := wiretest.DialRaw(t, p.addr())
	send(t, nc, "GET", false)
	given, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer given.Close()
	if n, err := io.Copy(given, strings.NewReader("answer")); n != 6 || err != nil {
		t.Fatalf("%d bytes, error %v", n, err)
	}
	if err := given.(*prefixed).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	_ = nc.SetReadDeadline(time.Now().Add(timeout))
	if got, err := io.ReadAll(nc); err != nil || string(got) != "answer" {
		t.Errorf("%q, error %v", got, err)
	}
}

// A preface may come in pieces.
func TestPrefaceInPieces(t *testing.T) {
	wiretest.CheckLeaks(t)
	p := newPort(t)
	p.open(t, options{})
	nc := wiretest.DialRaw(t, p.addr())
	send(t, nc, http2.ClientPreface, true)
	f := http2.NewFramer(nc, nc)
	if err := f.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	_ = nc.SetReadDeadline(time.Now().Add(timeout))
	if got, err := f.ReadFrame(); err != nil || got.Header().Type != http2.FrameSettings {
		t.Errorf("%v, error %v, want SETTINGS", got, err)
	}
}

// Stalled handshakes keep nobody out.
func TestStalled(t *testing.T) {
	wiretest.CheckLeaks(t)
	const stalled = 200
	ca, p := wiretest.NewCA(t), newPort(t)
	o := options{Name: "site", TLS: ca.ServerConfig()}
	o.TLS.NextProtos = []string{"h2", "http/1.1"}
	s := p.open(t, o)
	for range stalled {
		wiretest.DialRaw(t, p.addr())
	}
	eventually(t, "all stalled ones wait", func() bool { return s.waiting() == stalled })
	for _, set := range []func(*http.Protocols, bool){(*http.Protocols).SetHTTP1, (*http.Protocols).SetHTTP2} {
		for range 5 {
			if got, err := post(client(t, &tls.Config{RootCAs: ca.Pool}, set), "https://"+p.addr(), ""); err != nil {
				t.Errorf("%q, error %v", got, err)
			}
		}
	}
	if n := s.waiting(); n != stalled {
		t.Errorf("%d wait, want %d", n, stalled)
	}
}

// Of too many connections that wait, the oldest is closed.
func TestTooManyPending(t *testing.T) {
	wiretest.CheckLeaks(t)
	const most = 3
	ca, p := wiretest.NewCA(t), newPort(t)
	s := p.open(t, options{Name: "site", TLS: ca.ServerConfig()})
	s.l.hub.pending.mu.Lock()
	s.l.hub.pending.most = most
	s.l.hub.pending.mu.Unlock()
	var conns []net.Conn
	for i := range most {
		conns = append(conns, wiretest.DialRaw(t, p.addr()))
		eventually(t, "it waits", func() bool { return s.waiting() == i+1 })
	}
	conns = append(conns, wiretest.DialRaw(t, p.addr()))
	closed(t, conns[0])
	for _, nc := range conns[1:] {
		if got, err := get(tls.Client(nc, &tls.Config{RootCAs: ca.Pool, ServerName: "localhost"})); err != nil || got != "site HTTP/1.1 " {
			t.Errorf("%q, error %v", got, err)
		}
	}
	eventually(t, "none waits", func() bool { return s.waiting() == 0 })
}

// temporary is an error that passes, as that of too many open files.
type temporary struct{ error }

func (temporary) Temporary() bool { return true }

// Errors that pass stop nobody; others are the server's to see.
func TestAcceptErrors(t *testing.T) {
	wiretest.CheckLeaks(t)
	p := newPort(t)
	s := p.open(t, options{Name: "site"})
	for range 3 {
		s.inner.errs <- temporary{errors.New("too many open files")}
	}
	c := client(t, nil, (*http.Protocols).SetHTTP1)
	if got, err := post(c, "http://"+p.addr(), ""); err != nil || got != "site HTTP/1.1 " {
		t.Fatalf("%q, error %v", got, err)
	}
	broken := errors.New("broken")
	l := Wrap(p.listen(), Config{Limits: func() Limits { return Limits{} }})
	defer l.Close()
	l.inner.(*turn).errs <- broken
	for range 2 {
		if nc, err := l.Accept(); !errors.Is(err, broken) {
			t.Errorf("%v, error %v, want %v", nc, err, broken)
		}
	}
}

// Close ends Accept, and may be called twice.
func TestClose(t *testing.T) {
	wiretest.CheckLeaks(t)
	p := newPort(t)
	l := Wrap(p.listen(), Config{Limits: func() Limits { return Limits{} }})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if nc, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("%v, error %v, want %v", nc, err, net.ErrClosed)
			}
		})
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	if hubs.byKey[l.hub.key] != nil {
		t.Error("the address is still known")
	}
}

// Connections that the server has not taken when it goes are the next one's.
func TestLeftToTheNext(t *testing.T) {
	wiretest.CheckLeaks(t)
	p := newPort(t)
	first := Wrap(p.listen(), Config{Limits: func() Limits { return Limits{} }}) // nobody takes its connections
	nc := wiretest.DialRaw(t, p.addr())
	eventually(t, "the connection is ready", func() bool {
		first.mu.Lock()
		defer first.mu.Unlock()
		return len(first.ready) == 1
	})
	p.open(t, options{Name: "second"})
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := get(nc); err != nil || got != "second HTTP/1.1 " {
		t.Errorf("%q, error %v", got, err)
	}
}

// late is a client that has connected, and said nothing.
func late(t *testing.T, p *port, s *site) net.Conn {
	t.Helper()
	before := s.waiting()
	nc := wiretest.DialRaw(t, p.addr())
	eventually(t, "it waits", func() bool { return s.waiting() == before+1 })
	return nc
}

// A connection that was in its handshake when its listener was closed is the next one's, on the same terms.
func TestLate(t *testing.T) {
	ca := wiretest.NewCA(t)
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls=%t", secure), func(t *testing.T) {
			wiretest.CheckLeaks(t)
			p := newPort(t)
			o := options{Name: "first"}
			if secure {
				o.TLS = ca.ServerConfig()
				o.TLS.NextProtos = []string{"h2", "http/1.1"}
			}
			first := p.open(t, o)
			web, two := late(t, p, first), late(t, p, first)
			if secure {
				cfg := &tls.Config{RootCAs: ca.Pool, ServerName: "localhost"}
				web = tls.Client(web, cfg)
				cfg = cfg.Clone()
				cfg.NextProtos = []string{"h2"}
				two = tls.Client(two, cfg)
			}
			o.Name = "second"
			p.open(t, o)
			_ = first.l.Close()
			if got, err := get(web); err != nil || got != "second HTTP/1.1 " {
				t.Errorf("%q, error %v", got, err)
			}
			if got, err := getH2(two); err != nil || got != "second HTTP/2.0 " {
				t.Errorf("%q, error %v", got, err)
			}
		})
	}
}

// getH2 speaks HTTP/2 on a connection.
func getH2(nc net.Conn) (string, error) {
	tr := &http.Transport{Protocols: new(http.Protocols)}
	defer tr.CloseIdleConnections()
	dial := func(context.Context, string, string) (net.Conn, error) { return nc, nil }
	tr.DialContext, tr.DialTLSContext = dial, dial
	tr.Protocols.SetUnencryptedHTTP2(true)
	scheme := "http"
	if _, ok := nc.(*tls.Conn); ok {
		tr.Protocols = new(http.Protocols)
		tr.Protocols.SetHTTP2(true)
		scheme = "https"
	}
	return post(&http.Client{Transport: tr, Timeout: timeout}, scheme+"://a.example/", "")
}

// Where nobody has come in a listener's place, or only on other terms, those in their handshake are closed.
func TestLateWithoutNext(t *testing.T) {
	ca := wiretest.NewCA(t)
	cfg := &tls.Config{RootCAs: ca.Pool, ServerName: "localhost"}
	t.Run("none", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		p := newPort(t)
		s := p.open(t, options{TLS: ca.ServerConfig()}) // without a limit
		nc := late(t, p, s)
		_ = s.l.Close()
		closed(t, nc)
	})
	t.Run("gone_since", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		p := newPort(t)
		first := p.open(t, options{})
		nc := late(t, p, first)
		second := p.open(t, options{})
		_ = first.l.Close()
		_ = second.l.Close()
		closed(t, nc)
	})
	t.Run("other_terms", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		p := newPort(t)
		first := p.open(t, options{TLS: ca.ServerConfig(), Terms: "1"})
		nc := late(t, p, first)
		p.open(t, options{TLS: ca.ServerConfig(), Terms: "2"})
		_ = first.l.Close()
		if got, err := get(tls.Client(nc, cfg)); err == nil {
			t.Errorf("it was served: %q", got)
		}
	})
	t.Run("accepted_afterwards", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		p := newPort(t)
		s := p.open(t, options{})
		s.l.hub.pending.end() // as Close does
		closed(t, wiretest.DialRaw(t, p.addr()))
	})
}

// ask opens a stream and returns the answer's body, or what the stream was reset with.
func ask(c *wiretest.Conn) (string, http2.ErrCode) {
	h := c.Collect(c.Open(wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a.example"), true))
	return string(h.Data), h.ResetCode
}

// The next stream of a connection is served by the oldest listener that is open.
func TestOldestServes(t *testing.T) {
	wiretest.CheckLeaks(t)
	p := newPort(t)
	first := p.open(t, options{Name: "first"})
	c := wiretest.Dial(t, p.addr(), nil)
	want := func(name string) {
		t.Helper()
		if got, code := ask(c); got != name+" HTTP/2.0 " {
			t.Fatalf("%q, %v, want an answer of %s", got, code, name)
		}
	}
	want("first")
	failing := p.open(t, options{Name: "failing"})
	want("first")
	_ = failing.l.Close()
	want("first")
	p.open(t, options{Name: "second"})
	want("first")
	first.close(t)
	want("second")
	if n := len(c.Untaken(0)); n > 3 { // SETTINGS, its acknowledgement, WINDOW_UPDATE
		t.Errorf("the client was told more than it had to know: %v", c.Untaken(0))
	}
}

// A connection is shut down when the last listener on its terms is closed, and served by none on others.
func TestTerms(t *testing.T) {
	wiretest.CheckLeaks(t)
	p := newPort(t)
	first := p.open(t, options{Name: "first", Terms: "1"})
	old := wiretest.Dial(t, p.addr(), nil, wiretest.Options{NoPingAck: true})
	want := func(c *wiretest.Conn, name string) {
		t.Helper()
		if got, code := ask(c); got != name+" HTTP/2.0 " {
			t.Fatalf("%q, %v, want an answer of %s", got, code, name)
		}
	}
	want(old, "first")
	running := old.Open(wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/hold", ":authority", "a.example"), true)
	old.ExpectOn(running, http2.FrameHeaders)
	p.open(t, options{Name: "second", Terms: "2"})
	fresh := wiretest.Dial(t, p.addr(), nil)
	want(fresh, "second")
	want(old, "first")
	_ = first.l.Close()
	if f := old.ExpectGoAway(); f.Code != http2.ErrCodeNo {
		t.Errorf("GOAWAY(%v)", f.Code)
	}
	if got, code := ask(old); code != http2.ErrCodeRefusedStream {
		t.Errorf("%q, %v, want REFUSED_STREAM", got, code)
	}
	old.WritePing(true, [8]byte(old.ExpectPing().Data))
	want(fresh, "second")
	close(first.hold)
	if h := old.Collect(running); string(h.Data) != "first HTTP/2.0 " {
		t.Errorf("the stream that had begun ends with %v", h)
	}
	old.ExpectClosed()
}

// A connection that comes when its listener has just been closed is shut down.
func TestNobodyLeft(t *testing.T) {
	wiretest.CheckLeaks(t)
	p := newPort(t)
	s := p.open(t, options{Name: "site"})
	c := wiretest.Dial(t, p.addr(), nil, wiretest.Options{NoPingAck: true})
	if got, code := ask(c); got != "site HTTP/2.0 " {
		t.Fatalf("%q, %v", got, code)
	}
	_ = s.l.Close()
	c.ExpectGoAway()
	ping := c.ExpectPing()
	if got, code := ask(c); code != http2.ErrCodeRefusedStream {
		t.Errorf("%q, %v, want REFUSED_STREAM", got, code)
	}
	c.WritePing(true, [8]byte(ping.Data))
	c.ExpectClosed()
}

// Drain waits for streams, and for nobody who has none.
func TestDrain(t *testing.T) {
	hold := wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/hold", ":authority", "a.example")
	t.Run("streams", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		p := newPort(t)
		s := p.open(t, options{Name: "site"})
		c := wiretest.Dial(t, p.addr(), nil)
		id := c.Open(hold, true)
		c.ExpectOn(id, http2.FrameHeaders)
		_ = s.l.Close()
		var over atomic.Bool
		var wg sync.WaitGroup
		wg.Go(func() { s.l.Drain(t.Context(), timeout, func() bool { return true }); over.Store(true) })
		c.ExpectGoAway()
		c.Barrier()
		if over.Load() {
			t.Error("it has not waited")
		}
		close(s.hold)
		if h := c.Collect(id); string(h.Data) != "site HTTP/2.0 " {
			t.Errorf("the stream ends with %v", h)
		}
		wg.Wait()
	})
	t.Run("silent_client", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		p := newPort(t)
		s := p.open(t, options{})
		c := wiretest.Dial(t, p.addr(), nil, wiretest.Options{NoPingAck: true})
		c.Barrier()
		_ = s.l.Close()
		s.l.Drain(t.Context(), 10*time.Millisecond, func() bool { return false })
		c.ExpectClosed()
	})
	t.Run("stalled_client", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		p := newPort(t)
		s := p.open(t, options{Name: "site"})
		c := wiretest.Dial(t, p.addr(), nil, wiretest.Options{
			HoldWindows: true, Settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}},
		})
		c.ExpectOn(c.Open(wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a.example"), true), http2.FrameHeaders)
		_ = s.l.Close()
		s.l.Drain(t.Context(), 10*time.Millisecond, func() bool { return false })
		c.ExpectClosed()
	})
	t.Run("out_of_time", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		p := newPort(t)
		s := p.open(t, options{})
		defer close(s.hold)
		c := wiretest.Dial(t, p.addr(), nil)
		c.ExpectOn(c.Open(hold, true), http2.FrameHeaders)
		_ = s.l.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		s.l.Drain(ctx, timeout, func() bool { return true })
		c.ExpectClosed()
	})
}

// Listeners come and go under load: every request on HTTP/2 is served. Go's server drops requests on HTTP/1.1 that it reads while it shuts
// down.
func TestTurns(t *testing.T) {
	wiretest.CheckLeaks(t)
	ca := wiretest.NewCA(t)
	cfg := ca.ServerConfig()
	cfg.NextProtos = []string{"h2", "http/1.1"}
	p := newPort(t)
	o := options{Name: "site", TLS: cfg}
	now := p.open(t, o)
	stop := make(chan struct{})
	var done atomic.Int64
	var clients sync.WaitGroup
	for _, two := range []bool{false, true} {
		for range 4 {
			c := client(t, &tls.Config{RootCAs: ca.Pool}, (*http.Protocols).SetHTTP1)
			if two {
				c = client(t, &tls.Config{RootCAs: ca.Pool}, (*http.Protocols).SetHTTP2)
			}
			clients.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					r, err := c.Get("https://" + p.addr())
					if err != nil && !two {
						continue
					}
					if err != nil {
						t.Errorf("a request failed: %v", err)
						return
					}
					_, _ = io.Copy(io.Discard, r.Body)
					r.Body.Close()
					done.Add(1)
				}
			})
		}
	}
	for range 20 {
		next := p.open(t, o)
		now.close(t)
		now = next
		target := done.Load() + 8
		eventually(t, "the clients go on", func() bool { return t.Failed() || done.Load() >= target })
	}
	close(stop)
	clients.Wait()
}
