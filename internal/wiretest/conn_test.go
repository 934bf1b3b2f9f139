package wiretest

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// serveXNet runs x/net's HTTP/2 server on a socket of its own, over TLS if the configuration is not nil.
func serveXNet(t *testing.T, cfg *tls.Config, s *http2.Server, h http.HandlerFunc) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if cfg != nil {
		l = tls.NewListener(l, cfg)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, nc)
			mu.Unlock()
			wg.Go(func() {
				if tc, ok := nc.(*tls.Conn); ok && tc.Handshake() != nil {
					return
				}
				s.ServeConn(nc, &http2.ServeConnOpts{Handler: h})
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, nc := range open {
			_ = nc.Close()
		}
		wg.Wait()
	})
	return l.Addr().String()
}

func trailersOnly(w http.ResponseWriter, _ *http.Request) {
	w.Header()["Date"] = nil
	w.Header()["Content-Length"] = nil
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Grpc-Status", "5")
}

func echo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/grpc")
	w.WriteHeader(http.StatusEarlyHints)
	w.Header().Set("X-Got", r.Header.Get("X-Sent"))
	_ = http.NewResponseController(w).Flush()
	n, _ := io.Copy(w, r.Body)
	w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
	w.Header().Set(http.TrailerPrefix+"X-Length", fmt.Sprint(n))
}

func TestClientTrailersOnly(t *testing.T) {
	CheckLeaks(t)
	c := Dial(t, serveXNet(t, nil, new(http2.Server), trailersOnly), nil)
	id := c.Open(Request("h", "/s/m"), true)
	r := c.CollectAll(id)
	if got := r.Sequence(); id != 1 || got != "HEADERS+END_STREAM" {
		t.Errorf("stream %d: %s", id, got)
	}
	if !r.TrailersOnly() || r.Get("grpc-status") != "5" || r.Trailers != nil || Get(r.Head, ":status") != "200" || len(r.Head) != 3 {
		t.Errorf("got %+v", r)
	}
}

func TestClientExchange(t *testing.T) {
	CheckLeaks(t)
	c := Dial(t, serveXNet(t, nil, new(http2.Server), echo), nil)
	id := c.Open(Request("h", "/s/m", "x-sent", "v"), false)
	c.WriteData(id, Message([]byte("one")), false)
	c.WriteDataPadded(id, Message([]byte("two")), false, 10)
	c.WriteHeaders(id, Fields("x-request-trailer", "1"), true)
	r := c.CollectAll(id)
	if !strings.HasPrefix(r.Sequence(), "HEADERS HEADERS DATA ") || !strings.HasSuffix(r.Sequence(), " HEADERS+END_STREAM") {
		t.Errorf("sequence %s", r.Sequence())
	}
	if len(r.Informational) != 1 || Get(r.Informational[0], ":status") != "103" {
		t.Errorf("informational %v", r.Informational)
	}
	if want := append(Message([]byte("one")), Message([]byte("two"))...); !bytes.Equal(r.Data, want) || r.DataLen != 16 {
		t.Errorf("data %q, %d bytes", r.Data, r.DataLen)
	}
	if r.TrailersOnly() || r.Get("grpc-status") != "0" || Get(r.Trailers, "x-length") != "16" || Get(r.Head, "x-got") != "v" {
		t.Errorf("got head %v, trailers %v", r.Head, r.Trailers)
	}
	c.ExpectSettings()
	c.ExpectSettingsAck()
}

// Header blocks larger than a frame, both ways.
func TestContinuation(t *testing.T) {
	big := strings.Repeat("Z", 40_000) // 8 bits each in HPACK.
	c := Dial(t, serveXNet(t, nil, new(http2.Server), echo), nil)
	id := c.Open(Request("h", "/s/m", "x-sent", big), true)
	r := c.CollectAll(id)
	if want := "HEADERS HEADERS CONTINUATION CONTINUATION HEADERS+END_STREAM"; r.Sequence() != want {
		t.Errorf("sequence %s, want %s", r.Sequence(), want)
	}
	if Get(r.Head, "x-got") != big {
		t.Error("the field has changed")
	}

	id = c.nextID
	c.nextID += 2
	block := c.Encode(Request("h", "/s/m", "x-sent", "in pieces"))
	c.WriteHeaderBlock(id, block[:1], true, false)
	c.WriteContinuation(id, nil, false)
	c.WriteContinuation(id, block[1:], true)
	if r := c.Collect(id); Get(r.Head, "x-got") != "in pieces" {
		t.Errorf("got %v", r.Head)
	}
	id = c.nextID
	c.nextID += 2
	c.WriteHeadersSplit(id, Request("h", "/s/m", "x-sent", "in bytes"), true, 1)
	if r := c.Collect(id); Get(r.Head, "x-got") != "in bytes" {
		t.Errorf("got %v", r.Head)
	}
}

func TestHoldWindows(t *testing.T) {
	const total = 200_000
	h := func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, total)) }
	c := Dial(t, serveXNet(t, nil, new(http2.Server), h), nil, Options{HoldWindows: true, DiscardData: true})
	id := c.Open(Request("h", "/s/m"), true)
	c.ExpectOn(id, http2.FrameHeaders)
	got := 0
	for got < defaultWindow {
		got += c.ExpectOn(id, http2.FrameData).Length
	}
	c.Barrier()
	if f := c.Untaken(id); got != defaultWindow || len(f) != 0 {
		t.Errorf("%d bytes came in a window of %d, then %v", got, defaultWindow, f)
	}
	c.HoldWindows(false)
	c.Batch(func() {
		c.WriteWindowUpdate(0, defaultWindow)
		c.WriteWindowUpdate(id, defaultWindow)
	})
	if r := c.Collect(id); !r.Ended || r.DataLen != int64(total-got) || r.Data != nil {
		t.Errorf("then %d bytes of %d; %s", r.DataLen, total-got, r.Sequence())
	}
}

func TestSendData(t *testing.T) {
	const window = 1 << 17
	release := make(chan struct{})
	h := func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/read":
			n, _ := io.Copy(io.Discard, r.Body)
			w.Header().Set("X-Length", fmt.Sprint(n))
		case "/ignore":
			<-release
		}
	}
	defer close(release)
	s := &http2.Server{MaxUploadBufferPerStream: window, MaxReadFrameSize: 1 << 16}
	c := Dial(t, serveXNet(t, nil, s, h), nil)
	c.ExpectSettings()

	p := make([]byte, 3<<20)
	id := c.Open(Request("h", "/read"), false)
	if n, err := c.SendData(t.Context(), id, p, true); n != len(p) || err != nil {
		t.Fatalf("sent %d of %d: %v", n, len(p), err)
	}
	if r := c.Collect(id); Get(r.Head, "x-length") != fmt.Sprint(len(p)) {
		t.Errorf("got %v", r.Head)
	}
	if n, err := c.SendData(t.Context(), id, nil, false); n != 0 || err != nil {
		t.Errorf("nothing: sent %d, %v", n, err)
	}

	// Never read: the window is filled and not a byte more.
	id = c.Open(Request("h", "/ignore"), false)
	ctx, cancel := context.WithCancel(t.Context())
	filled := make(chan struct{})
	go func() {
		defer close(filled)
		c.wait(nil, func() bool { return c.initial+c.windows[id] == 0 })
		cancel()
	}()
	if n, err := c.SendData(ctx, id, p, true); n != window || !errors.Is(err, context.Canceled) {
		t.Errorf("sent %d into a window of %d: %v", n, window, err)
	}
	<-filled

	// A stream that the peer has reset.
	id = c.Open(Request("h", "/read", "X-Upper-Case", "malformed"), false)
	if code := c.ExpectReset(id); code != http2.ErrCodeProtocol {
		t.Errorf("reset with %v", code)
	}
	if n, err := c.SendData(t.Context(), id, p, true); n != 0 || !errors.As(err, new(http2.StreamError)) {
		t.Errorf("sent %d, %v", n, err)
	}
}

func TestConnectionFrames(t *testing.T) {
	c := Dial(t, serveXNet(t, nil, new(http2.Server), trailersOnly), nil, Options{NoSettings: true})
	if f := c.ExpectSettings(); len(f.Settings) == 0 || f.Stream != 0 {
		t.Errorf("got %v", f)
	}
	c.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	c.ExpectSettingsAck()
	c.WritePing(false, [8]byte{1, 2, 3})
	if f := c.ExpectOn(0, http2.FramePing); !f.Ack() || !bytes.Equal(f.Data, []byte{1, 2, 3, 0, 0, 0, 0, 0}) || f.String() != "PING+ACK" {
		t.Errorf("got %v %x", f, f.Data)
	}
	// What Framer would not write: DATA on stream 0.
	c.WriteFrame(http2.FrameData, 0, 0, []byte("x"))
	if f := c.ExpectGoAway(); f.Code != http2.ErrCodeProtocol || f.String() != "GOAWAY(PROTOCOL_ERROR)" {
		t.Errorf("got %v", f)
	}
	if err := c.ExpectClosed(); err == nil || !c.Closed() {
		t.Errorf("closed: %v, %v", err, c.Closed())
	}
	if r := c.CollectAll(1); r.Err == nil || r.Ended || r.Reset {
		t.Errorf("a stream of a dead connection: %+v", r)
	}
}

// The server's side against x/net's Transport.
func TestServer(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls=%v", secure), func(t *testing.T) {
			CheckLeaks(t)
			ca := NewCA(t)
			tr := &http2.Transport{AllowHTTP: true}
			defer tr.CloseIdleConnections()
			var opts Options
			scheme := "http"
			if secure {
				opts.TLS = ca.ServerConfig()
				tr.TLSClientConfig = ca.ClientConfig()
				scheme = "https"
			} else {
				tr.DialTLSContext = func(ctx context.Context, network, addr string, _ *tls.Config) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, network, addr)
				}
			}
			l := Listen(t, opts)
			type result struct {
				resp *http.Response
				body []byte
				err  error
			}
			results := make(chan result, 1)
			send := func(body string) {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, scheme+"://"+l.Addr()+"/s/m", strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					var r result
					if r.resp, r.err = tr.RoundTrip(req); r.err == nil {
						r.body, r.err = io.ReadAll(r.resp.Body)
						_ = r.resp.Body.Close()
					}
					results <- r
				}()
			}

			send("hello")
			c := l.Accept()
			if secure && c.TLS().NegotiatedProtocol != "h2" {
				t.Errorf("protocol %q", c.TLS().NegotiatedProtocol)
			}
			f := c.ExpectHeaders()
			if f.Get(":path") != "/s/m" || f.Get(":method") != "POST" || f.Stream != 1 {
				t.Errorf("got %v", f.Fields)
			}
			if req := c.Collect(f.Stream); string(req.Data) != "hello" || !req.Ended {
				t.Errorf("got %q; %s", req.Data, req.Sequence())
			}
			c.Batch(func() {
				c.WriteHeaders(f.Stream, Head("x-head", "1"), false)
				c.WriteData(f.Stream, Message([]byte("hi")), false)
				c.WriteHeaders(f.Stream, Fields("grpc-status", "7"), true)
			})
			r := <-results
			if r.err != nil || !bytes.Equal(r.body, Message([]byte("hi"))) || r.resp.Trailer.Get("Grpc-Status") != "7" || r.resp.Header.Get("X-Head") != "1" {
				t.Errorf("got %+v", r)
			}

			// The transport reports the code of a reset.
			send("x")
			f = c.ExpectHeaders()
			c.WriteReset(f.Stream, http2.ErrCodeEnhanceYourCalm)
			var se http2.StreamError
			if r := <-results; !errors.As(r.err, &se) || se.Code != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("got %v", r.err)
			}

			// GOAWAY that leaves the stream out: retried on a new connection.
			send("")
			f = c.ExpectHeaders()
			c.WriteGoAway(f.Stream-2, http2.ErrCodeNo, "bye")
			c2 := l.Accept()
			f = c2.ExpectHeaders()
			c2.WriteHeaders(f.Stream, Head("grpc-status", "0"), true)
			if r := <-results; r.err != nil || r.resp.Header.Get("Grpc-Status") != "0" {
				t.Errorf("got %+v", r)
			}

			// A connection that is torn down.
			send("")
			c2.ExpectHeaders()
			c2.Abort()
			if r := <-results; r.err == nil || !errors.Is(r.err, syscall.ECONNRESET) {
				t.Errorf("got %v", r.err)
			}
			if l.Accepted() != 2 {
				t.Errorf("%d connections", l.Accepted())
			}
		})
	}
}

func TestCloseWrite(t *testing.T) {
	l := Listen(t)
	c := Dial(t, l.Addr(), nil)
	s := l.Accept()
	c.CloseWrite()
	if err := s.ExpectClosed(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v", err)
	}
	s.WriteGoAway(0, http2.ErrCodeNo, "")
	c.ExpectGoAway()
}

func TestPause(t *testing.T) {
	l := Listen(t, Options{DiscardData: true})
	c := Dial(t, l.Addr(), nil)
	s := l.Accept()
	s.Barrier() // Both readers are at work.
	s.Pause()
	const count = 24
	frame := make([]byte, 9+1<<20)
	copy(frame, []byte{0x10, 0, 0, 0xee, 0, 0, 0, 0, 0}) // Length 2^20, a type that nobody knows.
	p := bytes.Repeat(frame, count)
	_ = c.NetConn().SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	n, err := c.NetConn().Write(p)
	if n == len(p) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("wrote %d bytes, %v, to a peer that does not read", n, err)
	}
	read := 0
	for _, f := range s.Untaken(0) {
		if f.Type == 0xee {
			read++
		}
	}
	if read > 1 { // One whose reading had begun.
		t.Errorf("%d frames were read", read)
	}
	s.Resume()
	c.WriteRaw(p[n:])
	for range count {
		s.ExpectOn(0, 0xee)
	}
	if err := c.WriteErr(); err != nil {
		t.Error(err)
	}
}

func TestListenerServe(t *testing.T) {
	CheckLeaks(t)
	l := Listen(t)
	l.Serve(func(c *Conn) {
		for { // Ends with the test, in a wait that fails.
			f := c.ExpectHeaders()
			c.WriteHeaders(f.Stream, Head("grpc-status", f.Get("x-want")), true)
		}
	}, Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 7}}})
	for range 3 {
		c := Dial(t, l.Addr(), nil)
		if f := c.ExpectSettings(); len(f.Settings) != 1 || f.Settings[0].Val != 7 {
			t.Errorf("got %v", f.Settings)
		}
		for _, want := range []string{"1", "2"} {
			if got := c.Collect(c.Open(Request("h", "/s/m", "x-want", want), true)).Get("grpc-status"); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		}
	}
	// Not HTTP/2: left out.
	nc := DialRaw(t, l.Addr())
	_, _ = io.WriteString(nc, "GET / HTTP/1.1\r\nHost: example.com\r\n\r\n")
	if b, err := io.ReadAll(nc); len(b) != 0 {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestAcceptRaw(t *testing.T) {
	l := Listen(t)
	c := Dial(t, l.Addr(), nil)
	nc := l.AcceptRaw()
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(nc, preface); err != nil || string(preface) != http2.ClientPreface {
		t.Fatalf("got %q, %v", preface, err)
	}
	_, _ = io.WriteString(nc, "HTTP/1.1 400 Bad Request\r\n\r\n")
	_ = nc.Close()
	if err := c.ExpectClosed(); err == nil {
		t.Error("no error")
	}
}
