package h2

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

func plainH2() *http.Protocols {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	return &p
}

// Go's own client against the server role.
func TestGoClient(t *testing.T) {
	wiretest.CheckLeaks(t)
	addr, _ := serve(t, Config{}, acceptEcho)
	tr := &http.Transport{Protocols: plainH2()}
	t.Cleanup(tr.CloseIdleConnections)
	client := &http.Client{Transport: tr}
	for _, size := range []int{0, 1, 100000, 5 << 20} {
		body := bytes.Repeat([]byte("x"), size)
		resp, err := client.Post("http://"+addr+"/s/m", "application/grpc", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(got, body) || resp.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("%d bytes: got %d, %v, trailers %v", size, len(got), err, resp.Trailer)
		}
	}
}

// The client role against Go's own server.
func TestGoServer(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Protocols: plainH2(), ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/early":
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(http.StatusTeapot)
		case "/abort":
			panic(http.ErrAbortHandler)
		default:
			_, _ = io.Copy(w, r.Body)
			w.Header().Set(http.TrailerPrefix+"Sum", "1")
		}
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := Client(nc, Config{})
	t.Cleanup(func() { srv.Close(); <-served; closeAndWait(t, c) })
	call := func(path string, body []byte) (*Blocking, []Field, error) {
		t.Helper()
		b := NewBlocking()
		s, e := c.OpenStream(wiretest.Request("a", path), false, b)
		if e != nil {
			t.Fatal(e)
		}
		go func() { _ = s.Write(body, true); c.Flush() }()
		head, err := b.WaitHead(testContext(t))
		return b, head, err
	}
	body := bytes.Repeat([]byte("y"), 3<<20)
	b, _, err := call("/echo", body)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, body) || len(b.Trailers()) != 1 {
		t.Errorf("%d bytes, %v, %v", len(got), err, b.Trailers())
	}
	if _, head, err := call("/early", nil); err != nil || head[0].Value != "418" {
		t.Error(head, err)
	}
	if _, _, err := call("/abort", nil); err == nil || err.(*Error).Kind != KindReset || err.(*Error).Code != InternalError { //nolint:errorlint // the concrete type is the contract
		t.Error(err)
	}
	if rtt, err := c.Ping(testContext(t)); err != nil || rtt <= 0 {
		t.Error(rtt, err)
	}
	shut := make(chan error, 1)
	go func() { shut <- srv.Shutdown(context.Background()) }()
	wait(t, c.Done())
	if e := c.Err(); e.Kind != KindGoAway || e.Code != NoError {
		t.Error(e)
	}
	if err := <-shut; err != nil {
		t.Error(err)
	}
}

// grpc-go's client against the server role, over plaintext and TLS.
func TestGRPCClient(t *testing.T) {
	for name, secure := range map[string]bool{"plain": false, "tls": true} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			accept := func(s *Stream, f []Field, end bool) Receiver {
				if wiretest.Get(f, ":path") == "/s/fail" {
					_ = s.WriteHeaders([]Field{
						{Name: ":status", Value: "200"},
						{Name: "content-type", Value: "application/grpc"},
						{Name: "grpc-status", Value: "5"},
						{Name: "grpc-message", Value: "gone"},
					}, true)
					s.Reset(NoError)
					return nil
				}
				return acceptEcho(s, f, end)
			}
			creds := insecure.NewCredentials()
			var addr string
			var conns chan *Conn
			if secure {
				ca := wiretest.NewCA(t)
				addr, conns = serveTLS(t, ca.ServerConfig(), accept)
				creds = credentials.NewTLS(ca.ClientConfig())
			} else {
				addr, conns = serve(t, Config{}, accept)
			}
			cc, err := grpc.NewClient(addr, grpc.WithTransportCredentials(creds))
			if err != nil {
				t.Fatal(err)
			}
			defer cc.Close()
			ctx := testContext(t)
			for _, size := range []int{0, 10, 3 << 20} {
				in, out := &healthpb.HealthCheckRequest{Service: strings.Repeat("s", size)}, &healthpb.HealthCheckRequest{}
				if err := cc.Invoke(ctx, "/s/m", in, out); err != nil || !proto.Equal(in, out) {
					t.Errorf("%d bytes: %v", size, err)
				}
			}
			if err := cc.Invoke(ctx, "/s/fail", &healthpb.HealthCheckRequest{}, &healthpb.HealthCheckRequest{}); status.Code(err) != codes.NotFound {
				t.Error(err)
			}
			st, err := cc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/s/stream")
			if err != nil {
				t.Fatal(err)
			}
			for i := range 50 {
				in, out := &healthpb.HealthCheckRequest{Service: strings.Repeat("z", i*1000)}, &healthpb.HealthCheckRequest{}
				if err := st.SendMsg(in); err != nil {
					t.Fatal(err)
				}
				if err := st.RecvMsg(out); err != nil || !proto.Equal(in, out) {
					t.Fatal(err)
				}
			}
			_ = st.CloseSend()
			if err := st.RecvMsg(&healthpb.HealthCheckRequest{}); err != io.EOF { //nolint:errorlint // io.EOF itself is the contract
				t.Error(err)
			}
			// A server that drains loses no call.
			(<-conns).Shutdown()
			for range 20 {
				if err := cc.Invoke(ctx, "/s/m", &healthpb.HealthCheckRequest{}, &healthpb.HealthCheckRequest{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func serveTLS(t *testing.T, cfg *tls.Config, accept func(*Stream, []Field, bool) Receiver) (string, chan *Conn) {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	conns := make(chan *Conn, 10)
	ended := make(chan struct{})
	var all []*Conn
	go func() {
		defer close(ended)
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			if nc.(*tls.Conn).Handshake() != nil {
				continue
			}
			c := Server(nc, Config{}, accept)
			all = append(all, c)
			conns <- c
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
		for _, c := range all {
			closeAndWait(t, c)
		}
	})
	return l.Addr().String(), conns
}

// The client role against grpc-go's server, with its keepalive enforcement.
func TestGRPCServer(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.MaxConcurrentStreams(7), grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Hour}))
	healthpb.RegisterHealthServer(srv, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-served })
	dial := func(cfg Config) *Conn {
		nc, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c := Client(nc, cfg)
		t.Cleanup(func() { closeAndWait(t, c) })
		<-c.Ready()
		return c
	}
	call := func(c *Conn, path, service string) (string, []byte) {
		t.Helper()
		b := NewBlocking()
		s, e := c.OpenStream(wiretest.Request("a", path, "grpc-timeout", "3S"), false, b)
		if e != nil {
			t.Fatal(e)
		}
		m, err := proto.Marshal(&healthpb.HealthCheckRequest{Service: service})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Write(append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(m))), m...), true); err != nil {
			t.Fatal(err)
		}
		c.Flush()
		head, err := b.WaitHead(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(b)
		if err != nil {
			t.Fatal(err)
		}
		if st := wiretest.Get(head, "grpc-status"); st != "" {
			return st, body
		}
		return wiretest.Get(b.Trailers(), "grpc-status"), body
	}
	c := dial(Config{})
	if n := c.Available(); n != 7 {
		t.Errorf("%d streams available", n)
	}
	for range 100 {
		if st, body := call(c, "/grpc.health.v1.Health/Check", ""); st != "0" || string(body) != "\x00\x00\x00\x00\x02\x08\x01" {
			t.Fatalf("%s %q", st, body)
		}
	}
	if st, _ := call(c, "/grpc.health.v1.Health/Check", "unknown"); st != "5" {
		t.Error(st)
	}
	if st, _ := call(c, "/no.Such/Method", ""); st != "12" {
		t.Error(st)
	}
	// Too many pings: the reason arrives with the end of the connection.
	rude := dial(Config{PingInterval: time.Millisecond, PingWithoutStreams: true})
	wait(t, rude.Done())
	if e := rude.Err(); e.Code != EnhanceYourCalm || e.Debug != "too_many_pings" {
		t.Errorf("%+v", e)
	}
	stopped := make(chan struct{})
	go func() { srv.GracefulStop(); close(stopped) }()
	wait(t, c.Done())
	if e := c.Err(); e.Kind != KindGoAway || e.Code != NoError {
		t.Error(e)
	}
	wait(t, stopped)
}
