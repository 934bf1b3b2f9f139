package hop

import (
	"context"
	"crypto/sha1"
	"encoding/hex"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

var (
	localAddr  = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 443}
	remoteAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 50000}
)

// far is the listener of a server in the process: it returns the far ends of pipes.
type far struct {
	ends   chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (f *far) Accept() (net.Conn, error) {
	select {
	case nc := <-f.ends:
		return nc, nil
	case <-f.closed:
		return nil, net.ErrClosed
	}
}

func (f *far) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}

func (f *far) Addr() net.Addr { return localAddr }

// web is net/http's, in the process.
type web struct {
	http.Server
	far    far
	served chan struct{} // it accepts no more
	dials  atomic.Int32
}

func newWeb(t testing.TB, handler http.HandlerFunc) *web {
	t.Helper()
	s := &web{far: far{ends: make(chan net.Conn, 64), closed: make(chan struct{})}, served: make(chan struct{})}
	s.Handler = handler
	s.ErrorLog = log.New(io.Discard, "", 0)
	s.Protocols = new(http.Protocols)
	s.Protocols.SetUnencryptedHTTP2(true)
	go func() {
		defer close(s.served)
		_ = s.Serve(&s.far)
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-s.served
	})
	return s
}

// rig is a server of clients on TCP, whose streams hop to a server in the process.
type rig struct {
	t        testing.TB
	addr     string
	cur      atomic.Pointer[web] // nil: there is none
	over     chan struct{}
	accepted chan inbound
	inbound  // of the raw client that came last
}

// inbound is a client's connection.
type inbound struct {
	hop  *Hop
	conn *h2.Conn
}

// serverConfig is of the clients' connections, hopConfig of those in the process.
var (
	serverConfig = h2.Config{MaxStreams: 400, InitialWindow: 256 << 10, InitialConnWindow: 16 << 20, MaxConnWindow: 16 << 20}
	hopConfig    = h2.Config{InitialWindow: 256 << 10, MaxHeaderListSize: 64 << 20}
)

// newRig starts a rig. It is over, and what it has started, when the test is.
func newRig(t testing.TB, handler http.HandlerFunc) *rig {
	t.Helper()
	return newRigWith(t, serverConfig, handler)
}

func newRigWith(t testing.TB, cfg h2.Config, handler http.HandlerFunc) *rig {
	t.Helper()
	wiretest.CheckLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, addr: l.Addr().String(), over: make(chan struct{}), accepted: make(chan inbound, 64)}
	r.cur.Store(newWeb(t, handler))
	var wg sync.WaitGroup
	wg.Go(func() { r.accept(l, cfg, &wg) })
	t.Cleanup(func() {
		_ = l.Close()
		close(r.over)
		wg.Wait()
	})
	return r
}

func (r *rig) accept(l net.Listener, cfg h2.Config, wg *sync.WaitGroup) {
	for {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		hop := &Hop{Dial: r.dial, Config: hopConfig}
		cfg := cfg
		cfg.OnClose = func(*h2.Conn, *h2.Error) { hop.Close() }
		c := h2.Server(nc, cfg, hop.Accept)
		r.accepted <- inbound{hop, c}
		wg.Go(func() {
			select {
			case <-c.Done():
			case <-r.over: // net/http's client keeps a connection while it resets the last stream
				c.Close(h2.NoError, "the test is over")
				<-c.Done()
			}
		})
	}
}

func (r *rig) dial() (net.Conn, error) {
	s := r.cur.Load()
	if s == nil {
		return nil, net.ErrClosed
	}
	near, end := Pipe(localAddr, remoteAddr)
	s.dials.Add(1)
	s.far.ends <- end
	return near, nil
}

func (r *rig) dials() int { return int(r.cur.Load().dials.Load()) }

// raw connects a raw client.
func (r *rig) raw(opts ...wiretest.Options) *wiretest.Conn {
	r.t.Helper()
	c := wiretest.Dial(r.t, r.addr, nil, opts...)
	r.inbound = <-r.accepted
	return c
}

// idle waits until no stream to the server is open.
func (r *rig) idle() {
	r.t.Helper()
	until(r.t, "end of the server's streams", func() bool {
		r.hop.mu.Lock()
		defer r.hop.mu.Unlock()
		for _, c := range r.hop.conns {
			if c.Streams() > 0 {
				return false
			}
		}
		return true
	})
}

// inner is the oldest connection to the server.
func (r *rig) inner() *h2.Conn {
	r.hop.mu.Lock()
	defer r.hop.mu.Unlock()
	return r.hop.conns[0]
}

// client is net/http's, with one connection.
func (r *rig) client() *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true}
	tr.Protocols.SetUnencryptedHTTP2(true)
	tr.DialContext = new(net.Dialer).DialContext
	r.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

// head is a request's head with more fields, names and values in turn.
func head(method, path string, more ...string) []hpack.HeaderField {
	return append(wiretest.Fields(":method", method, ":scheme", "http", ":path", path, ":authority", "a.example"), wiretest.Fields(more...)...)
}

// get makes a raw request without a body.
func get(c *wiretest.Conn, path string) *wiretest.Half {
	return c.CollectAll(c.Open(head("GET", path), true))
}

// post makes a raw request with a small body.
func post(c *wiretest.Conn, path, body string) *wiretest.Half {
	id := c.Open(head("POST", path), false)
	c.WriteData(id, []byte(body), true)
	return c.Collect(id)
}

// untilReset collects a stream with the reset that follows its end.
func untilReset(c *wiretest.Conn, id uint32) *wiretest.Half {
	h := c.Collect(id)
	if h.Ended && !h.Reset {
		h.Frames = append(h.Frames, c.ExpectOn(id, http2.FrameRSTStream))
	}
	return h
}

// firstWindow is what a raw client grants a stream.
const firstWindow = 65535

// send sends a body as windows allow.
func send(t testing.TB, c *wiretest.Conn, id uint32, p []byte, end bool) {
	t.Helper()
	if n, err := c.SendData(context.Background(), id, p, end); err != nil {
		t.Fatalf("sent %d of %d: %v", n, len(p), err)
	}
}

// ordered fails the test if the answer is not in order.
func ordered(t testing.TB, h *wiretest.Half, status, sequence string) {
	t.Helper()
	if wiretest.Get(h.Head, ":status") != status || h.Sequence() != sequence || h.Err != nil {
		t.Errorf("%v, %q, %v; want %s, %q", h.Head, h.Sequence(), h.Err, status, sequence)
	}
}

// pattern is a body that is unlike itself anywhere else, and unlike that of another seed.
func pattern(n int, seed uint32) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)}).Read(p)
	return p
}

func sum(p []byte) string {
	h := sha1.Sum(p)
	return hex.EncodeToString(h[:])
}

// serveBodies answers a GET with as many bytes as it is asked for, and anything else with what comes. The trailer says what was read.
func serveBodies(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Trailer", "X-Sum, X-Len")
	if n, err := strconv.Atoi(r.URL.Query().Get("n")); err == nil {
		_, _ = w.Write(pattern(n, uint32(n)))
		return
	}
	_ = http.NewResponseController(w).EnableFullDuplex()
	sha := sha1.New()
	n, err := io.Copy(flushing{w}, io.TeeReader(r.Body, sha))
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("X-Sum", hex.EncodeToString(sha.Sum(nil)))
	w.Header().Set("X-Len", strconv.FormatInt(n, 10))
	for name, values := range r.Trailer {
		w.Header()[http.TrailerPrefix+"Echo-"+name] = values
	}
}

// flushing sends all that is written at once.
type flushing struct{ http.ResponseWriter }

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.ResponseWriter.Write(p)
	if err == nil {
		err = http.NewResponseController(f.ResponseWriter).Flush()
	}
	return n, err
}

// gate is a handler that tells of its requests, and holds them until the test opens it, or they are over.
type gate struct {
	began chan *http.Request
	open  chan struct{}
	over  atomic.Int32 // requests whose context has ended
}

func newGate() *gate { return &gate{began: make(chan *http.Request, 1000), open: make(chan struct{})} }

func (g *gate) wait(r *http.Request) {
	g.began <- r
	select {
	case <-g.open:
	case <-r.Context().Done():
		g.over.Add(1)
	}
}

// next waits for the next request.
func (g *gate) next(t testing.TB) *http.Request {
	t.Helper()
	select {
	case r := <-g.began:
		return r
	case <-time.After(wiretest.Timeout):
		t.Fatalf("no request within %v", wiretest.Timeout)
		return nil
	}
}

// result is what a Read or a Write has returned.
type result struct {
	n   int
	err error
}

// start runs f on a goroutine of its own.
func start(f func() (int, error)) <-chan result {
	c := make(chan result, 1)
	go func() {
		n, err := f()
		c <- result{n, err}
	}()
	return c
}

// must waits for a result.
func must(t *testing.T, c <-chan result) result {
	t.Helper()
	select {
	case r := <-c:
		return r
	case <-time.After(wiretest.Timeout):
		t.Fatalf("it still waits after %v", wiretest.Timeout)
		return result{}
	}
}

// until polls until ok.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(wiretest.Timeout); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within %v", what, wiretest.Timeout)
		}
	}
}
