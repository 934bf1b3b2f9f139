package h2

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// recorder is a receiver that tells what it gets as lines of text.
type recorder struct {
	t    testing.TB
	hold bool // give no credit
	ev   chan string

	mu  sync.Mutex
	s   *Stream
	err *Error
}

func newRecorder(t testing.TB) *recorder { return newRecorderOf(t, 10000) }

func newRecorderOf(t testing.TB, lines int) *recorder {
	return &recorder{t: t, ev: make(chan string, lines)}
}

func text(fields []Field) string {
	var b strings.Builder
	for _, f := range fields {
		fmt.Fprintf(&b, " %s=%s", f.Name, f.Value)
	}
	return b.String()
}

func (r *recorder) tell(s *Stream, format string, args ...any) {
	r.mu.Lock()
	r.s = s
	r.mu.Unlock()
	r.ev <- fmt.Sprintf(format, args...)
}

func (r *recorder) RecvHead(s *Stream, f []Field, end bool) { r.tell(s, "head%s %t", text(f), end) }
func (r *recorder) RecvTrailers(s *Stream, f []Field)       { r.tell(s, "trailers%s", text(f)) }
func (r *recorder) RecvWriteReady(s *Stream)                { r.tell(s, "ready") }
func (r *recorder) RecvData(s *Stream, p []byte, end bool) {
	if !r.hold {
		s.Consumed(len(p))
	}
	r.tell(s, "data %d %t", len(p), end)
}

func (r *recorder) RecvReset(s *Stream, err *Error) {
	r.mu.Lock()
	if r.err != nil {
		r.t.Errorf("RecvReset twice: %v, then %v", r.err, err)
	}
	r.err = err
	r.mu.Unlock()
	s.Done()
	r.tell(s, "reset %s %s remote=%t unprocessed=%t", err.Kind, err.Code, err.Remote, err.Unprocessed)
}

func (r *recorder) stream() *Stream {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.s
}

// want takes the next line.
func (r *recorder) want(line string) {
	r.t.Helper()
	select {
	case got := <-r.ev:
		if got != line {
			r.t.Fatalf("got %q, want %q", got, line)
		}
	case <-time.After(patienceOfTests):
		r.t.Fatalf("nothing came, want %q", line)
	}
}

// none makes sure that nothing more has come; what could bring something must have happened.
func (r *recorder) none() {
	r.t.Helper()
	select {
	case got := <-r.ev:
		r.t.Fatalf("got %q, want nothing", got)
	default:
	}
}

// clientAgainst joins an engine in the client role with a raw server, SETTINGS exchanged.
func clientAgainst(t *testing.T, cfg Config, opts ...wiretest.Options) (*Conn, *wiretest.Conn) {
	t.Helper()
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t, opts...)
	nc, err := net.Dial("tcp", l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	c := Client(nc, cfg)
	t.Cleanup(func() { closeAndWait(t, c) })
	return c, l.Accept(opts...)
}

func closeAndWait(t testing.TB, c *Conn) {
	c.Close(NoError, "")
	wait(t, c.Done())
}

// calls collects the streams an engine in the server role accepts.
type calls struct {
	t      testing.TB
	heads  chan string
	rec    chan *recorder
	stream chan *Stream
	hold   bool
}

func newCalls(t testing.TB) *calls {
	return &calls{t: t, heads: make(chan string, 1000), rec: make(chan *recorder, 1000), stream: make(chan *Stream, 1000)}
}

func (a *calls) accept(s *Stream, fields []Field, end bool) Receiver {
	r := newRecorder(a.t)
	r.s, r.hold = s, a.hold
	a.heads <- fmt.Sprintf("%s %t", strings.TrimSpace(text(fields)), end)
	a.rec <- r
	a.stream <- s
	return r
}

func (a *calls) next() (*recorder, *Stream, string) {
	a.t.Helper()
	select {
	case h := <-a.heads:
		return <-a.rec, <-a.stream, h
	case <-time.After(patienceOfTests):
		a.t.Fatal("no call came")
		return nil, nil, ""
	}
}

// serverAgainst joins an engine in the server role with a raw client.
func serverAgainst(t *testing.T, cfg Config, accept func(*Stream, []Field, bool) Receiver, opts ...wiretest.Options) (*Conn, *wiretest.Conn) {
	t.Helper()
	wiretest.CheckLeaks(t)
	addr, conns := serve(t, cfg, accept)
	p := wiretest.Dial(t, addr, nil, opts...)
	return <-conns, p
}

// serve listens with engines in the server role.
func serve(t testing.TB, cfg Config, accept func(*Stream, []Field, bool) Receiver) (addr string, conns chan *Conn) {
	t.Helper()
	return serveOn(t, listen(t), cfg, accept)
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func serveOn(t testing.TB, l net.Listener, cfg Config, accept func(*Stream, []Field, bool) Receiver) (addr string, conns chan *Conn) {
	t.Helper()
	conns = make(chan *Conn, 100)
	var all []*Conn
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			c := Server(nc, cfg, accept)
			all = append(all, c)
			conns <- c
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
		for _, c := range all {
			closeAndWait(t, c)
		}
	})
	return l.Addr().String(), conns
}

func mustOpen(t testing.TB, c *Conn, end bool, r Receiver) *Stream {
	t.Helper()
	s, err := c.OpenStream(requestHead, end, r)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// until waits for something that will become true.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patienceOfTests); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timed out waiting: %s", what)
		}
	}
}

func expectGoAway(t testing.TB, p *wiretest.Conn, code http2.ErrCode) wiretest.Frame {
	t.Helper()
	f := p.ExpectGoAway()
	if f.Code != code {
		t.Fatalf("GOAWAY %s %q, want %s", f.Code, f.Data, code)
	}
	return f
}

// useUp uses up the connection's window.
func useUp(t testing.TB, c *Conn) {
	t.Helper()
	for c.Stats().SendWindow > 0 {
		if _, err := mustOpen(t, c, false, newRecorder(t)).TryWrite(make([]byte, 4<<10), false); err != nil {
			t.Fatal(err)
		}
		c.Flush()
		until(t, "it is sent", func() bool { return c.Stats().Pending == 0 })
	}
}

// settled waits until the connection's SETTINGS are through and nobody is going to flush, so that what is appended waits.
func settled(t *testing.T, c *Conn) {
	t.Helper()
	until(t, "SETTINGS are through", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.settingsAcked && c.peerReady && c.pendingLocked() == 0 && !c.inBatch && !c.flushing
	})
}

// silence makes sure that the peer has got nothing on a stream, given that what it could have got has come.
func silence(t *testing.T, p *wiretest.Conn, id uint32) {
	t.Helper()
	for _, f := range p.Untaken(id) {
		if f.Stream == id {
			t.Errorf("the peer got %v", f)
		}
	}
}

func withFields(namesAndValues ...string) []Field {
	return append(slices.Clip(requestHead), wiretest.Fields(namesAndValues...)...)
}

// holdWrite opens a stream and lets somebody flush it who then stands inside the system call, though the bytes have left, until
// release is called.
func holdWrite(t *testing.T, c *Conn) (s *Stream, release func()) {
	t.Helper()
	if !c.sock.canTry {
		t.Skip("sockets cannot be tried here")
	}
	returns := make(chan struct{})
	release = sync.OnceFunc(func() { close(returns) })
	t.Cleanup(release)
	s = mustOpen(t, c, false, newRecorder(t))
	inside := make(chan struct{})
	c.mu.Lock()
	write := c.sock.writeFn
	c.sock.writeFn = func(fd uintptr) bool {
		done := write(fd)
		if inside != nil {
			close(inside)
			inside = nil
			<-returns
		}
		return done
	}
	c.mu.Unlock()
	held := inside
	go c.Flush()
	wait(t, held)
	return s, release
}
