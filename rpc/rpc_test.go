package rpc

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// begin begins a call on a connection of its own.
func begin(t *testing.T, addr string, r *Request) *Call {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	conn := h2.Client(nc, h2.Config{})
	t.Cleanup(func() {
		conn.Close(h2.NoError, "")
		<-conn.Done()
	})
	r.Scheme, r.Authority, r.UserAgent = "http", "test", "tester"
	if r.MaxAnswer == 0 {
		r.MaxAnswer = 100
	}
	c, err := Begin(t.Context(), func(fields []h2.Field, recv h2.Receiver) (*h2.Stream, error) {
		s, err := conn.OpenStream(fields, false, recv)
		if err != nil {
			return nil, err
		}
		return s, nil
	}, r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// A grpc-go server understands the request, and we its answers: one, a stream of them, and none.
func TestGRPCServer(t *testing.T) {
	wiretest.CheckLeaks(t)
	ctx, cancel := context.WithTimeout(t.Context(), wiretest.Timeout)
	defer cancel()
	b := backendtest.Start(t, backendtest.Options{})
	status := func(c *Call) healthpb.HealthCheckResponse_ServingStatus {
		t.Helper()
		msg, err := c.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		m := new(healthpb.HealthCheckResponse)
		if err := proto.Unmarshal(msg, m); err != nil {
			t.Fatal(err)
		}
		return m.Status
	}
	ended := func(c *Call, want grpcwire.Code) {
		t.Helper()
		for range 2 {
			if msg, err := c.Next(ctx); !errors.Is(err, io.EOF) {
				t.Fatalf("got %q, %v, want the end", msg, err)
			}
		}
		if s, err := c.Status(); err != nil || s.Code != want {
			t.Errorf("ended with %v, %v, want %v", s, err, want)
		}
	}
	unknown, err := proto.Marshal(&healthpb.HealthCheckRequest{Service: "no.Such"})
	if err != nil {
		t.Fatal(err)
	}

	one := begin(t, b.Addr(), &Request{Path: "/grpc.health.v1.Health/Check", Timeout: time.Minute})
	if s := status(one); s != healthpb.HealthCheckResponse_SERVING {
		t.Error(s)
	}
	ended(one, grpcwire.OK)
	ended(begin(t, b.Addr(), &Request{Path: "/grpc.health.v1.Health/Check", Message: unknown}), grpcwire.NotFound)
	ended(begin(t, b.Addr(), &Request{Path: "/no.Such/Method"}), grpcwire.Unimplemented)

	many := begin(t, b.Addr(), &Request{Path: "/grpc.health.v1.Health/Watch", Message: unknown})
	if s := status(many); s != healthpb.HealthCheckResponse_SERVICE_UNKNOWN {
		t.Error(s)
	}
	short, stop := context.WithTimeoutCause(ctx, time.Millisecond, errors.New("long enough"))
	defer stop()
	if _, err := many.Next(short); err == nil || err.Error() != "long enough" {
		t.Errorf("the wait ended with %v", err)
	}
}

// What goes out, and what is made of answers, byte by byte.
func TestWire(t *testing.T) {
	type peer struct {
		*wiretest.Conn
		id uint32
	}
	ok := func(p peer, data string) {
		p.WriteHeaders(p.id, wiretest.Head(), false)
		p.WriteData(p.id, []byte(data), false)
		p.WriteHeaders(p.id, wiretest.Fields("grpc-status", "0"), true)
	}
	for name, tt := range map[string]struct {
		answer   func(p peer)
		messages string // joined
		err      string // of the Next after them; "EOF" for the end in order
		status   string
	}{
		"one message":   {func(p peer) { ok(p, "\x00\x00\x00\x00\x02ab") }, "ab", "EOF", "OK"},
		"empty message": {func(p peer) { ok(p, "\x00\x00\x00\x00\x00") }, "-", "EOF", "OK"},
		"three messages in pieces": {func(p peer) {
			p.WriteHeaders(p.id, wiretest.Head(), false)
			for _, b := range "\x00\x00\x00\x00\x01a\x00\x00\x00\x00\x02bc\x00\x00\x00\x00\x01d" {
				p.WriteData(p.id, []byte{byte(b)}, false)
			}
			p.WriteHeaders(p.id, wiretest.Fields("grpc-status", "8", "grpc-message", "too%20much"), true)
		}, "a bc d", "EOF", "RESOURCE_EXHAUSTED: too much"},
		"the largest":   {func(p peer) { ok(p, "\x00\x00\x00\x00\x64"+strings.Repeat("x", 100)) }, strings.Repeat("x", 100), "EOF", "OK"},
		"a larger one":  {func(p peer) { ok(p, "\x00\x00\x00\x00\x65"+strings.Repeat("x", 101)) }, "", "the answer is 101 bytes long, which is more than the 100 expected at most", ""},
		"a huge one":    {func(p peer) { ok(p, "\x00\xff\xff\xff\xff") }, "", "the answer is 4294967295 bytes long", ""},
		"compressed":    {func(p peer) { ok(p, "\x01\x00\x00\x00\x01a") }, "", "the answer is compressed", ""},
		"cut short":     {func(p peer) { ok(p, "\x00\x00\x00\x00\x02a") }, "", "the answer ends inside a message", ""},
		"Trailers-Only": {func(p peer) { p.WriteHeaders(p.id, wiretest.Head("grpc-status", "12"), true) }, "", "EOF", "UNIMPLEMENTED"},
		"no status": {func(p peer) {
			p.WriteHeaders(p.id, wiretest.Head(), false)
			p.WriteData(p.id, nil, true)
		}, "", "EOF", "the answer has no status"},
		"HTTP 404": {func(p peer) { p.WriteHeaders(p.id, wiretest.Fields(":status", "404"), true) }, "", "the answer is not gRPC: HTTP status 404 (UNIMPLEMENTED)", ""},
		"a web page": {func(p peer) {
			p.WriteHeaders(p.id, wiretest.Fields(":status", "200", "content-type", "text/html"), true)
		}, "", `the answer is not gRPC (content-type "text/html")`, ""},
		"reset": {func(p peer) { p.WriteReset(p.id, http2.ErrCodeRefusedStream) }, "", "REFUSED_STREAM", ""},
		"lost":  {func(p peer) { p.Abort() }, "", "connection lost", ""},
	} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			ctx, cancel := context.WithTimeout(t.Context(), wiretest.Timeout)
			defer cancel()
			l := wiretest.Listen(t)
			c := begin(t, l.Addr(), &Request{
				Path: "/s/m", Timeout: 2 * time.Second, Message: []byte("hi"), Metadata: []h2.Field{{Name: "x-token", Value: "t"}},
			})
			p := l.Accept()
			f := p.ExpectHeaders()
			for field, want := range map[string]string{
				":method": "POST", ":scheme": "http", ":path": "/s/m", ":authority": "test", "te": "trailers",
				"content-type": "application/grpc", "user-agent": "tester", "x-token": "t",
			} {
				if got := f.Get(field); got != want {
					t.Errorf("%s is %q, want %q", field, got, want)
				}
			}
			if d, err := grpcwire.ParseTimeout(f.Get("grpc-timeout")); err != nil || d != 2*time.Second {
				t.Errorf("grpc-timeout %q", f.Get("grpc-timeout"))
			}
			if d := p.ExpectOn(f.Stream, http2.FrameData); string(d.Data) != "\x00\x00\x00\x00\x02hi" || !d.EndStream() {
				t.Errorf("request %v %q", d, d.Data)
			}
			tt.answer(peer{p, f.Stream})
			var got []string
			for {
				msg, err := c.Next(ctx)
				if err == nil {
					if len(msg) == 0 {
						msg = []byte("-")
					}
					got = append(got, string(msg))
					continue
				}
				if !strings.Contains(err.Error(), tt.err) {
					t.Errorf("ended with %v, want %s", err, tt.err)
				}
				break
			}
			if g := strings.Join(got, " "); g != tt.messages {
				t.Errorf("messages %q, want %q", g, tt.messages)
			}
			if tt.status == "" {
				return
			}
			s, err := c.Status()
			if text := s.String(); text != tt.status && (err == nil || err.Error() != tt.status) {
				t.Errorf("status %v, %v, want %s", s, err, tt.status)
			}
		})
	}
}

// A server whose windows are used up takes no request. Begin does not wait for it longer than it may.
func TestBeginWaits(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t, wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}}})
	nc, err := net.Dial("tcp", l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	conn := h2.Client(nc, h2.Config{})
	defer func() {
		conn.Close(h2.NoError, "")
		<-conn.Done()
	}()
	p := l.Accept()
	<-conn.Ready()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, errors.New("long enough"))
	defer cancel()
	_, err = Begin(ctx, func(fields []h2.Field, recv h2.Receiver) (*h2.Stream, error) {
		s, err := conn.OpenStream(fields, false, recv)
		if err != nil {
			return nil, err
		}
		return s, nil
	}, &Request{Scheme: "http", Authority: "test", Path: "/s/m", Message: []byte("hi")})
	if err == nil || err.Error() != "long enough" {
		t.Errorf("ended with %v", err)
	}
	if code := p.ExpectReset(p.ExpectHeaders().Stream); code != http2.ErrCodeCancel {
		t.Error(code)
	}
}

// Close resets a call that is still open, so that the server knows.
func TestClose(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t)
	c := begin(t, l.Addr(), &Request{Path: "/s/m", Metadata: []h2.Field{{Name: "user-agent", Value: "mine"}}})
	p := l.Accept()
	f := p.ExpectHeaders()
	if got := wiretest.Values(f.Fields, "user-agent"); len(got) != 1 || got[0] != "mine" {
		t.Errorf("user-agent %q", got)
	}
	if f.Get("grpc-timeout") != "" {
		t.Error("there is a grpc-timeout")
	}
	c.Close()
	if code := p.ExpectReset(f.Stream); code != http2.ErrCodeCancel {
		t.Error(code)
	}
	c.Close() // does no harm
}

// What a call has not read of its answer is given back when it is closed, also when the stream has ended in order by then:
// all calls share the connection's window.
func TestCloseGivesBackCredit(t *testing.T) {
	wiretest.CheckLeaks(t)
	const calls, size = 50, 10 << 10
	l := wiretest.Listen(t)
	l.Serve(func(p *wiretest.Conn) {
		for range calls {
			f := p.ExpectHeaders()
			p.Collect(f.Stream)
			p.WriteHeaders(f.Stream, wiretest.Fields(":status", "404", "content-type", "text/html"), false)
			if _, err := p.SendData(t.Context(), f.Stream, make([]byte, size), true); err != nil {
				return
			}
		}
	})
	call := begin(t, l.Addr(), &Request{Path: "/grpc.health.v1.Health/Check"})
	conn := call.Conn()
	for i := range calls {
		if i > 0 {
			var err error
			call, err = Begin(t.Context(), func(fields []h2.Field, recv h2.Receiver) (*h2.Stream, error) {
				s, err := conn.OpenStream(fields, false, recv)
				if err != nil {
					return nil, err
				}
				return s, nil
			}, &Request{Scheme: "http", Authority: "test", Path: "/grpc.health.v1.Health/Check", MaxAnswer: 100})
			if err != nil {
				t.Fatal(err)
			}
		}
		if _, err := call.Next(t.Context()); err == nil {
			t.Fatal("no error")
		}
		for end := time.Now().Add(wiretest.Timeout); conn.Streams() > 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("call %d does not end: %+v", i, conn.Stats())
			}
		}
		if held := conn.Stats().Held; held != size {
			t.Fatalf("%d bytes are held, so the test proves nothing", held)
		}
		call.Close()
		if held := conn.Stats().Held; held != 0 {
			t.Fatalf("no stream is open, but %d bytes are held for readers", held)
		}
	}
}
