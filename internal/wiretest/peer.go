package wiretest

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// Listener is a server's socket on 127.0.0.1.
type Listener struct {
	t    testing.TB
	l    net.Listener
	opts Options

	conns chan net.Conn
	over  atomic.Bool // The test has ended.
	wg    sync.WaitGroup
	mu    sync.Mutex
	open  []net.Conn // All that were accepted, for Cleanup.
}

// Listen opens a server's socket on a free port of 127.0.0.1.
func Listen(t testing.TB, opts ...Options) *Listener {
	t.Helper()
	nl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ListenOn(t, nl, opts...)
}

// ListenOn is Listen with a socket that exists, which it closes in the end.
func ListenOn(t testing.TB, nl net.Listener, opts ...Options) *Listener {
	l := &Listener{t: t, l: nl, opts: pick(opts), conns: make(chan net.Conn, 1024)}
	if cfg := l.opts.TLS; cfg != nil && cfg.NextProtos == nil {
		l.opts.TLS = cfg.Clone()
		l.opts.TLS.NextProtos = []string{"h2"}
	}
	l.wg.Go(l.accept)
	t.Cleanup(func() {
		l.over.Store(true)
		l.Close()
		l.mu.Lock()
		open := l.open
		l.mu.Unlock()
		for _, nc := range open {
			_ = nc.Close()
		}
		l.wg.Wait()
	})
	return l
}

func (l *Listener) accept() {
	for {
		nc, err := l.l.Accept()
		if err != nil {
			return
		}
		l.mu.Lock()
		l.open = append(l.open, nc)
		l.mu.Unlock()
		if l.over.Load() {
			_ = nc.Close() // Cleanup may have looked at the list already.
			continue
		}
		select {
		case l.conns <- nc:
		default:
			_ = nc.Close() // More than any test takes.
		}
	}
}

// Addr is the address, host:port.
func (l *Listener) Addr() string { return l.l.Addr().String() }

// Close closes the socket: later connections are refused. Accepted ones stay.
func (l *Listener) Close() { _ = l.l.Close() }

// AcceptRaw returns the next connection as it is, without TLS and HTTP/2. It is closed at the end of the test.
func (l *Listener) AcceptRaw() net.Conn {
	l.t.Helper()
	select {
	case nc := <-l.conns:
		return nc
	case <-time.After(Timeout):
		l.t.Fatalf("nobody connected to %v within %v", l.Addr(), Timeout)
		return nil
	}
}

// Accepted is the number of connections that have been made to the socket so far.
func (l *Listener) Accepted() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.open)
}

// Accept returns the next connection, after the TLS handshake, if any, and the client's preface. Options replace those
// of the listener, but for TLS.
func (l *Listener) Accept(opts ...Options) *Conn {
	l.t.Helper()
	nc := l.AcceptRaw()
	c, err := l.serve(nc, opts)
	if err != nil {
		l.t.Fatal(err)
	}
	return c
}

// Serve calls f with each connection from now on, each in a goroutine of its own, until the test ends. Connections
// that fail in the TLS handshake or the preface are closed and left out. It must not be used together with Accept.
// A wait of f that fails because the test has ended just ends f.
func (l *Listener) Serve(f func(c *Conn), opts ...Options) {
	done := make(chan struct{})
	l.t.Cleanup(func() { // Before the one of ListenOn, which waits.
		l.over.Store(true)
		close(done)
	})
	l.wg.Go(func() {
		for {
			select {
			case nc := <-l.conns:
				l.wg.Go(func() {
					if c, err := l.serve(nc, opts); err == nil {
						f(c)
					} else {
						_ = nc.Close()
					}
				})
			case <-done:
				return
			}
		}
	})
}

func (l *Listener) serve(nc net.Conn, opts []Options) (*Conn, error) {
	o := l.opts
	if len(opts) > 0 {
		o = opts[0]
		o.TLS = l.opts.TLS
	}
	_ = nc.SetDeadline(time.Now().Add(Timeout))
	if o.TLS != nil {
		tc := tls.Server(nc, o.TLS)
		if err := tc.Handshake(); err != nil {
			return nil, errors.Join(errors.New("TLS handshake with the client"), err)
		}
		nc = tc
	}
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(nc, preface); err != nil {
		return nil, errors.Join(errors.New("reading the client's preface"), err)
	}
	if string(preface) != http2.ClientPreface {
		return nil, errors.New("the client began with " + string(preface) + ", not with the HTTP/2 preface")
	}
	_ = nc.SetDeadline(time.Time{})
	c := newConn(l.t, nc, o, 2, &l.over)
	c.start()
	return c, nil
}

// Dial connects to the address (host:port, or unix/ and the path of a socket), over TLS if the configuration is not
// nil, and sends the preface. Without NextProtos it offers h2; without a server's name it asks for the host.
func Dial(t testing.TB, addr string, cfg *tls.Config, opts ...Options) *Conn {
	t.Helper()
	nc := DialRaw(t, addr)
	if cfg != nil {
		tc := tls.Client(nc, clientConfig(cfg, addr))
		_ = nc.SetDeadline(time.Now().Add(Timeout))
		if err := tc.Handshake(); err != nil {
			t.Fatalf("TLS handshake with %s: %v", addr, err)
		}
		_ = nc.SetDeadline(time.Time{})
		nc = tc
	}
	c := newConn(t, nc, pick(opts), 1, new(atomic.Bool))
	c.Batch(func() {
		c.WriteRaw([]byte(http2.ClientPreface))
		c.start()
	})
	return c
}

// DialRaw connects to the address, as Dial does, and leaves the rest to the test. The connection is closed at the end
// of the test.
func DialRaw(t testing.TB, addr string) net.Conn {
	t.Helper()
	network := "tcp"
	if len(addr) > 5 && addr[:5] == "unix/" {
		network, addr = "unix", addr[5:]
	}
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	defer cancel()
	nc, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	return nc
}

func clientConfig(cfg *tls.Config, addr string) *tls.Config {
	cfg = cfg.Clone()
	if cfg.NextProtos == nil {
		cfg.NextProtos = []string{"h2"}
	}
	if cfg.ServerName == "" {
		if host, _, err := net.SplitHostPort(addr); err == nil {
			cfg.ServerName = host
		}
	}
	return cfg
}
