package wiretest

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
)

// recorder stands in for a test that may fail.
type recorder struct {
	testing.TB
	mu       sync.Mutex
	logs     []string
	failures []string
	cleanups []func()
}

func (r *recorder) Helper() {}

func (r *recorder) Logf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.logs = append(r.logs, fmt.Sprintf(format, args...))
}

func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }

// run runs f as a test and returns how it failed.
func (r *recorder) run(f func()) []string {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	<-done
	for _, f := range slices.Backward(r.cleanups) {
		f()
	}
	return r.failures
}

// pipe makes a Conn whose peer says what it says; time is the bubble's.
func pipe(r *recorder, said string) *Conn {
	a, b := net.Pipe()
	r.Cleanup(func() { _ = b.Close() })
	go func() { _, _ = io.Copy(io.Discard, b) }()
	c := newConn(r, a, Options{}, 1, new(atomic.Bool))
	c.start()
	if said != "" {
		_, _ = io.WriteString(b, said)
		_ = b.Close()
	}
	return c
}

func TestFailures(t *testing.T) {
	ping := "\x00\x00\x08\x06\x01\x00\x00\x00\x00" + "12345678"
	tests := []struct {
		name, said string
		f          func(c *Conn)
		want       string
	}{
		{"silence", "", func(c *Conn) { c.ExpectHeaders() }, "no HEADERS within 5s"},
		{"end", ping, func(c *Conn) { c.ExpectHeaders() }, "no HEADERS: the connection ended: EOF"},
		{"reset", "", func(c *Conn) { c.ExpectReset(3) }, "no RST_STREAM on stream 3 within 5s"},
		{"next", "", func(c *Conn) { c.Next(5) }, "no frame on stream 5 within 5s"},
		{"goaway", "", func(c *Conn) { c.ExpectGoAway() }, "no GOAWAY on stream 0 within 5s"},
		{"settings", "", func(c *Conn) { c.ExpectSettings() }, "no SETTINGS within 5s"},
		{"settings ack", "", func(c *Conn) { c.ExpectSettingsAck() }, "no SETTINGS+ACK within 5s"},
		{"ping", ping + ping, func(c *Conn) { c.ExpectPing() }, "no PING: the connection ended: EOF"},
		{"still open", "", func(c *Conn) { c.ExpectClosed() }, "the connection is still open after 5s"},
		{"barrier", "", func(c *Conn) { c.Barrier() }, "no acknowledgement of a PING: none within 5s"},
		{"collect", "", func(c *Conn) { c.Collect(1) }, "stream 1 did not end, nothing came for 5s; so far: "},
		{"plaintext", "", func(c *Conn) { c.TLS() }, "connection is *net.pipe, not TLS"},
		{"linger", "", func(c *Conn) { c.Abort() }, "resetting the connection: not a TCP connection"},
		{"half", "", func(c *Conn) { c.CloseWrite() }, "*net.pipe cannot be closed half-way"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &recorder{TB: t}
				var c *Conn
				got := r.run(func() {
					c = pipe(r, tt.said)
					tt.f(c)
				})
				if len(got) != 1 || got[0] != tt.want {
					t.Errorf("got %q, want %q", got, tt.want)
				}
				if len(r.logs) != 1 || strings.Count(r.logs[0], "PING+ACK stream 0, 8 bytes") != strings.Count(tt.said, ping) {
					t.Errorf("log: %q", r.logs)
				}
				<-c.done
			})
		})
	}
}

func TestSendDataWithoutWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{TB: t}
		r.run(func() {
			c := pipe(r, "")
			if n, err := c.SendData(t.Context(), 1, make([]byte, 100_000), true); n != defaultWindow || err == nil ||
				err.Error() != "no window on stream 1 for 5s: context deadline exceeded" {
				t.Errorf("sent %d, %v", n, err)
			}
		})
	})
}

func TestCheckLeaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		r := &recorder{TB: t}
		got := r.run(func() {
			CheckLeaks(r)
			go func() { <-release }()
		})
		if len(got) != 1 || !strings.HasPrefix(got[0], "1 goroutines leaked:") || !strings.Contains(got[0], "TestCheckLeaks") {
			t.Errorf("got %q", got)
		}
		// Known before: not reported. Ended by a later Cleanup: not reported.
		r = &recorder{TB: t}
		if got := r.run(func() {
			CheckLeaks(r)
			stop := make(chan struct{})
			r.Cleanup(func() { close(stop) })
			go func() { <-stop }()
		}); len(got) != 0 {
			t.Errorf("got %q", got)
		}
		close(release)
	})
}

func TestModulePath(t *testing.T) {
	if !strings.HasSuffix(module, "/caddy-grpc-proxy") {
		t.Errorf("module %q", module)
	}
}

func TestMutualTLS(t *testing.T) {
	ca := NewCA(t)
	h := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Client", r.TLS.PeerCertificates[0].Subject.CommonName)
	}
	addr := serveXNet(t, ca.MutualConfig("localhost"), new(http2.Server), h)
	cfg := ca.ClientConfig(ca.ClientCert("alice", "alice.example"))
	cfg.ServerName = "localhost" // Not the address, which the certificate lacks.
	c := Dial(t, addr, cfg)
	if r := c.Collect(c.Open(c.Request("/s/m"), true)); r.Get("x-client") != "alice" {
		t.Errorf("got %v", r.Head)
	}

	// Somebody else's authority, and a wrong name.
	for name, cfg := range map[string]*tls.Config{
		"authority": NewCA(t).ClientConfig(),
		"name":      ca.ClientConfig(),
	} {
		nc := tls.Client(DialRaw(t, addr), clientConfig(cfg, addr))
		err := nc.HandshakeContext(t.Context())
		if !errors.As(err, new(x509.UnknownAuthorityError)) && !errors.As(err, new(x509.HostnameError)) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestFiles(t *testing.T) {
	ca := NewCA(t)
	certFile, keyFile := ca.PairFiles(ca.ServerCert("a.example", "10.0.0.1"))
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(ca.File())
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		t.Fatalf("no certificate in %q", b)
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a.example", "10.0.0.1"} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: name}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUnixSocket(t *testing.T) {
	path := t.TempDir() + "/s"
	nl, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l := ListenOn(t, nl)
	c := Dial(t, "unix/"+path, nil)
	s := l.Accept()
	c.Barrier()
	s.Barrier()
}

func TestFields(t *testing.T) {
	f := Fields("a", "1", "b", "2", "a", "3")
	if Get(f, "a") != "1" || Get(f, "c") != "" || !slices.Equal(Values(f, "a"), []string{"1", "3"}) || Values(f, "c") != nil {
		t.Errorf("got %v", f)
	}
	if got := Message([]byte("abc")); string(got) != "\x00\x00\x00\x00\x03abc" {
		t.Errorf("got %q", got)
	}
}
