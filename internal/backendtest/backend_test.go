package backendtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

const timeout = 5 * time.Second

func dial(t *testing.T, b *Backend, creds credentials.TransportCredentials, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	if creds == nil {
		creds = insecure.NewCredentials()
	}
	cc, err := grpc.NewClient(b.Target(), append(opts, grpc.WithTransportCredentials(creds))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

// call is a context with request metadata that ends with the test.
func call(t *testing.T, pairs ...string) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, pairs...)
}

func body(s string) *testpb.Payload { return &testpb.Payload{Body: []byte(s)} }

func TestUnary(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := Start(t, Options{Name: "one"})
	client := testpb.NewTestServiceClient(dial(t, b, nil, grpc.WithAuthority("a.example")))
	var header, trailer metadata.MD
	out, err := client.UnaryCall(call(t, "x-key", "v1", "x-key", "v2"), &testpb.SimpleRequest{Payload: body("hello")},
		grpc.Header(&header), grpc.Trailer(&trailer))
	if err != nil || string(out.GetPayload().GetBody()) != "hello" || out.GetHostname() != "one" {
		t.Fatalf("got %v, %v", out, err)
	}
	if got := header.Get(KeyBackend); len(got) != 1 || got[0] != "one" {
		t.Errorf("header %v", header)
	}
	if got := trailer.Get(KeyBackend); len(got) != 1 || got[0] != "one" {
		t.Errorf("trailer %v", trailer)
	}
	c := b.Last()
	if c.Method != "/grpc.testing.TestService/UnaryCall" || c.Authority != "a.example" || c.TLS != nil || c.Peer == nil {
		t.Errorf("recorded %+v", c)
	}
	if got := c.Metadata.Get("x-key"); len(got) != 2 || got[1] != "v2" {
		t.Errorf("metadata %v", c.Metadata)
	}
	if !c.HasDeadline || c.Timeout <= 0 || c.Timeout > timeout {
		t.Errorf("deadline in %v, %v", c.Timeout, c.HasDeadline)
	}
	out, err = client.UnaryCall(call(t), &testpb.SimpleRequest{ResponseSize: 3 << 20, FillServerId: true})
	if err != nil || len(out.GetPayload().GetBody()) != 3<<20 || out.GetServerId() != "one" {
		t.Errorf("got %d bytes, %v", len(out.GetPayload().GetBody()), err)
	}
	if _, err := client.EmptyCall(call(t), new(testpb.Empty)); err != nil {
		t.Error(err)
	}
	if _, err := client.UnimplementedCall(call(t), new(testpb.Empty)); status.Code(err) != codes.Unimplemented {
		t.Error(err)
	}
	for _, in := range []*testpb.SimpleRequest{{ResponseSize: -1}, {ResponseSize: 1, ResponseType: 7}} {
		if _, err := client.UnaryCall(call(t), in); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", in, err)
		}
	}
	counts := b.Calls()
	if counts.Of("UnaryCall") != 4 || counts.Of("EmptyCall") != 1 || counts.Total() != 6 || counts.Of("Check") != 0 {
		t.Errorf("counts %v", counts)
	}
	if b.Active() != 0 || b.Accepted() != 1 || b.Open() != 1 {
		t.Errorf("%d active, %d of %d connections", b.Active(), b.Open(), b.Accepted())
	}
}

func TestStreams(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := Start(t, Options{Unix: t.TempDir() + "/s"})
	if !strings.HasPrefix(b.Addr(), "unix//") || b.Name() != b.Addr() {
		t.Errorf("address %q, name %q", b.Addr(), b.Name())
	}
	client := testpb.NewTestServiceClient(dial(t, b, nil))
	params := []*testpb.ResponseParameters{{Size: 3}, {Size: 0, IntervalUs: 10}, {Size: 5}}

	down, err := client.StreamingOutputCall(call(t), &testpb.StreamingOutputCallRequest{ResponseParameters: params})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range params {
		if m, err := down.Recv(); err != nil || len(m.GetPayload().GetBody()) != int(p.Size) {
			t.Errorf("got %v, %v", m, err)
		}
	}
	if _, err := down.Recv(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}

	up, err := client.StreamingInputCall(call(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"ab", "", "cde"} {
		if err := up.Send(&testpb.StreamingInputCallRequest{Payload: body(s)}); err != nil {
			t.Fatal(err)
		}
	}
	if m, err := up.CloseAndRecv(); err != nil || m.GetAggregatedPayloadSize() != 5 {
		t.Errorf("got %v, %v", m, err)
	}

	full, err := client.FullDuplexCall(call(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"a", "bb"} { // In turn, so that it hangs if anything waits for the end.
		if err := full.Send(&testpb.StreamingOutputCallRequest{Payload: body(s)}); err != nil {
			t.Fatal(err)
		}
		if m, err := full.Recv(); err != nil || string(m.GetPayload().GetBody()) != s {
			t.Fatalf("got %v, %v", m, err)
		}
	}
	if err := full.Send(&testpb.StreamingOutputCallRequest{ResponseStatus: &testpb.EchoStatus{Code: 9, Message: "m"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := full.Recv(); status.Code(err) != codes.FailedPrecondition {
		t.Error(err)
	}

	half, err := client.HalfDuplexCall(call(t))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := half.Send(&testpb.StreamingOutputCallRequest{ResponseParameters: params}); err != nil {
			t.Fatal(err)
		}
	}
	if err := half.CloseSend(); err != nil {
		t.Fatal(err)
	}
	n := 0
	for {
		_, err := half.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n != 6 || b.Calls().Total() != 4 {
		t.Errorf("%d messages; %v", n, b.Calls())
	}
}

func TestScript(t *testing.T) {
	b := Start(t, Options{})
	client := testpb.NewTestServiceClient(dial(t, b, nil, grpc.WithMaxHeaderListSize(4<<20)))
	tests := []struct {
		name    string
		pairs   []string
		code    codes.Code
		message string
		check   func(t *testing.T, header, trailer metadata.MD)
	}{
		{"status", []string{KeyStatus, "5", KeyMessage, "not here"}, codes.NotFound, "not here", nil},
		{"name", []string{KeyStatus, "DataLoss"}, codes.DataLoss, "", nil},
		{"ok, method skipped", []string{KeyStatus, "0"}, codes.OK, "", nil},
		{"message in UTF-8", []string{KeyStatus, "13", KeyMessageBin, "Größe\n"}, codes.Internal, "Größe\n", nil},
		{"late", []string{KeyStatus, "10", KeyLate, "1"}, codes.Aborted, "", func(t *testing.T, header, _ metadata.MD) {
			if len(header.Get(KeyBackend)) != 1 {
				t.Errorf("header %v", header)
			}
		}},
		{"metadata", []string{
			KeyHeader, "a=1", KeyHeader, "a=2=3", KeyHeaderBin, "a-bin=\x00\xff", KeyTrailer, "b=4", KeyTrailerBin, "b-bin=\x01",
		}, codes.OK, "", func(t *testing.T, header, trailer metadata.MD) {
			if got := header.Get("a"); len(got) != 2 || got[1] != "2=3" || header.Get("a-bin")[0] != "\x00\xff" {
				t.Errorf("header %v", header)
			}
			if trailer.Get("b")[0] != "4" || trailer.Get("b-bin")[0] != "\x01" {
				t.Errorf("trailer %v", trailer)
			}
		}},
		{"trailer size", []string{KeyTrailerSize, "1048576"}, codes.OK, "", func(t *testing.T, _, trailer metadata.MD) {
			if got := trailer.Get(KeyFiller); len(got) != 1 || len(got[0]) != 1<<20 {
				t.Errorf("%d fillers", len(got))
			}
		}},
		{
			"interop",
			[]string{interopEchoInitial, "i", interopEchoTrailing, "\xab"},
			codes.OK, "",
			func(t *testing.T, header, trailer metadata.MD) {
				if header.Get(interopEchoInitial)[0] != "i" || trailer.Get(interopEchoTrailing)[0] != "\xab" {
					t.Errorf("header %v, trailer %v", header, trailer)
				}
			},
		},
		{"no status", []string{KeyStatus, "nope"}, codes.InvalidArgument, "", nil},
		{"no size", []string{KeyTrailerSize, "-1"}, codes.InvalidArgument, KeyTrailerSize + `: "-1" is no size`, nil},
		{"no delay", []string{KeyDelay, "1"}, codes.InvalidArgument, "", nil},
		{"no pair", []string{KeyHeader, "x"}, codes.InvalidArgument, `"x" is not name=value`, nil},
		{"no trailer pair", []string{KeyTrailer, "x"}, codes.InvalidArgument, "", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var header, trailer metadata.MD
			_, err := client.UnaryCall(call(t, tt.pairs...), new(testpb.SimpleRequest), grpc.Header(&header), grpc.Trailer(&trailer))
			st := status.Convert(err)
			if st.Code() != tt.code || tt.message != "" && st.Message() != tt.message {
				t.Errorf("got %v", err)
			}
			if tt.check != nil {
				tt.check(t, header, trailer)
			}
		})
	}
	t.Run("details", func(t *testing.T) {
		_, err := client.UnaryCall(call(t, KeyStatus, "8", KeyDetails, "QUOTA"), new(testpb.SimpleRequest))
		d := status.Convert(err).Details()
		if len(d) != 1 {
			t.Fatalf("details %v of %v", d, err)
		}
		if info, ok := d[0].(*errdetails.ErrorInfo); !ok || info.Reason != "QUOTA" || info.Domain != "backendtest" {
			t.Errorf("got %v", d)
		}
	})
	t.Run("delay", func(t *testing.T) {
		start := time.Now()
		if _, err := client.EmptyCall(call(t, KeyDelay, "20ms"), new(testpb.Empty)); err != nil || time.Since(start) < 20*time.Millisecond {
			t.Errorf("got %v after %v", err, time.Since(start))
		}
	})
}

// On the wire: an immediate status is one HEADERS frame, unless the header is asked for.
func TestTrailersOnlyOnTheWire(t *testing.T) {
	b := Start(t, Options{})
	c := wiretest.Dial(t, b.Addr(), nil)
	for method, message := range map[string][]byte{"EmptyCall": wiretest.Message(nil), "FullDuplexCall": nil} {
		path := "/grpc.testing.TestService/" + method
		for _, tt := range []struct {
			pairs []string
			want  string
		}{
			{[]string{KeyStatus, "5"}, "HEADERS+END_STREAM"},
			{[]string{KeyStatus, "5", KeySendHeader, "1"}, "HEADERS HEADERS+END_STREAM"},
		} {
			// In one write, so that the answer finds the request complete.
			var id uint32
			c.Batch(func() {
				id = c.Open(c.Request(path, tt.pairs...), message == nil)
				if message != nil {
					c.WriteData(id, message, true)
				}
			})
			r := c.CollectAll(id)
			if r.Sequence() != tt.want || r.Get("grpc-status") != "5" || r.Get(KeyBackend) != b.Name() {
				t.Errorf("%s: %s, %v, %v", method, r.Sequence(), r.Head, r.Trailers)
			}
		}
	}
}

func TestCancelled(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := Start(t, Options{})
	client := testpb.NewTestServiceClient(dial(t, b, nil))
	next := func() Cancellation {
		t.Helper()
		select {
		case c := <-b.Cancelled():
			return c
		case <-time.After(timeout):
			t.Fatal("no cancellation")
			return Cancellation{}
		}
	}

	ctx, cancel := context.WithCancel(call(t, KeyBlock, "1", KeySendHeader, "1"))
	stream, err := client.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Header(); err != nil { // The call is running.
		t.Fatal(err)
	}
	if b.Active() != 1 {
		t.Errorf("%d active", b.Active())
	}
	before := time.Now()
	cancel()
	c := next()
	if c.Call.Method != "/grpc.testing.TestService/FullDuplexCall" || !errors.Is(c.Err, context.Canceled) || c.At.Before(before) {
		t.Errorf("got %+v", c)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Canceled {
		t.Error(err)
	}

	// A raw client whose deadline only the backend watches.
	raw := wiretest.Dial(t, b.Addr(), nil)
	id := raw.Open(raw.Request("/grpc.testing.TestService/FullDuplexCall", KeyBlock, "1", "grpc-timeout", "50m"), false)
	if c := next(); !errors.Is(c.Err, context.DeadlineExceeded) || !c.Call.HasDeadline || c.Call.Timeout > 50*time.Millisecond {
		t.Errorf("got %+v", c)
	}
	raw.Collect(id)

	// The connection breaks.
	raw.Open(raw.Request("/grpc.testing.TestService/FullDuplexCall", KeyBlock, "1", KeySendHeader, "1"), false)
	raw.ExpectHeaders()
	raw.Abort()
	if c := next(); !errors.Is(c.Err, context.Canceled) {
		t.Errorf("got %+v", c)
	}
}

func TestHealthAndReflection(t *testing.T) {
	b := Start(t, Options{})
	cc := dial(t, b, nil)
	client := healthpb.NewHealthClient(cc)
	for _, service := range []string{"", Service} {
		r, err := client.Check(call(t), &healthpb.HealthCheckRequest{Service: service})
		if err != nil || r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("%q: %v, %v", service, r, err)
		}
	}
	b.Health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	if r, err := client.Check(call(t), new(healthpb.HealthCheckRequest)); err != nil || r.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("%v, %v", r, err)
	}
	stream, err := reflectionpb.NewServerReflectionClient(cc).ServerReflectionInfo(call(t))
	if err != nil {
		t.Fatal(err)
	}
	err = stream.Send(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := stream.Recv()
	if err != nil || !strings.Contains(r.String(), Service) {
		t.Errorf("%v, %v", r, err)
	}
	if c := b.Calls(); c.Total() != 0 || c.Of("Check") != 3 || b.Last() != nil {
		t.Errorf("counts %v, last %v", c, b.Last())
	}
}

func TestTLS(t *testing.T) {
	wiretest.CheckLeaks(t)
	ca := wiretest.NewCA(t)
	b := Start(t, Options{TLS: ca.ServerConfig(), ClientCAs: ca.Pool})
	client := testpb.NewTestServiceClient(dial(t, b, credentials.NewTLS(ca.ClientConfig(ca.ClientCert("alice")))))
	if _, err := client.EmptyCall(call(t), new(testpb.Empty)); err != nil {
		t.Fatal(err)
	}
	if st := b.Last().TLS; st == nil || st.PeerCertificates[0].Subject.CommonName != "alice" {
		t.Errorf("TLS state %+v", st)
	}
	client = testpb.NewTestServiceClient(dial(t, b, credentials.NewTLS(ca.ClientConfig())))
	if _, err := client.EmptyCall(call(t), new(testpb.Empty)); status.Code(err) != codes.Unavailable {
		t.Errorf("without a certificate: %v", err)
	}
}

func TestHookAndOptions(t *testing.T) {
	b := Start(t, Options{
		MaxConcurrentStreams: 7, NoRecord: true, Delay: time.Millisecond,
		Hook: func(c *Call) error {
			if c.Method == "/grpc.testing.TestService/EmptyCall" {
				return status.Error(codes.ResourceExhausted, "hooked")
			}
			return grpc.SetHeader(c.Context, metadata.Pairs("x-hook", "1"))
		},
	})
	c := wiretest.Dial(t, b.Addr(), nil)
	found := false
	for _, s := range c.ExpectSettings().Settings {
		found = found || s == http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 7}
	}
	if !found {
		t.Error("no MAX_CONCURRENT_STREAMS of 7")
	}
	client := testpb.NewTestServiceClient(dial(t, b, nil))
	if _, err := client.EmptyCall(call(t), new(testpb.Empty)); status.Code(err) != codes.ResourceExhausted {
		t.Error(err)
	}
	var header metadata.MD
	if _, err := client.UnaryCall(call(t), new(testpb.SimpleRequest), grpc.Header(&header)); err != nil || len(header.Get("x-hook")) != 1 {
		t.Errorf("%v, %v", header, err)
	}
	if b.Last() != nil || b.Calls().Total() != 2 {
		t.Errorf("last %v, counts %v", b.Last(), b.Calls())
	}
}

func TestStopAndComeBack(t *testing.T) {
	wiretest.CheckLeaks(t)
	b, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	c := wiretest.Dial(t, b.Addr(), nil)
	c.Open(c.Request("/grpc.testing.TestService/FullDuplexCall", KeyBlock, "1", KeySendHeader, "1"), false)
	c.ExpectHeaders()
	b.CloseConns()
	if err := c.ExpectClosed(); err == nil {
		t.Error("not closed")
	}
	c = wiretest.Dial(t, b.Addr(), nil) // Still listening.
	c.Barrier()
	if b.Accepted() != 2 {
		t.Errorf("%d connections", b.Accepted())
	}

	// A running call holds a graceful stop up; the client learns of it at once.
	c.Open(c.Request("/grpc.testing.TestService/FullDuplexCall", KeyBlock, "1", KeySendHeader, "1"), false)
	c.ExpectHeaders()
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		b.GracefulStop(ctx)
	}()
	if f := c.ExpectGoAway(); f.Code != http2.ErrCodeNo {
		t.Errorf("got %v", f)
	}
	select {
	case <-stopped:
		t.Error("did not wait")
	default:
	}
	cancel()
	<-stopped
	c.ExpectClosed()
	b.Stop()
	if b.Open() != 0 || b.Active() != 0 {
		t.Errorf("%d connections, %d calls", b.Open(), b.Active())
	}
	var d net.Dialer
	if nc, err := d.DialContext(t.Context(), "tcp", b.Addr()); err == nil {
		_ = nc.Close()
		t.Error("still listening")
	}

	again := Start(t, Options{Addr: b.Addr()})
	if again.Addr() != b.Addr() {
		t.Errorf("came back on %s, was on %s", again.Addr(), b.Addr())
	}
	wiretest.Dial(t, b.Addr(), nil).Barrier()
	again.GracefulStop(t.Context()) // Nothing runs: at once, although a client stays connected.
}

func TestNewErrors(t *testing.T) {
	ca := wiretest.NewCA(t)
	used := Start(t, Options{})
	for want, o := range map[string]Options{
		"starting a backend: both a socket and an address are given": {Unix: "x", Addr: "y"},
		"starting a backend: client certificates need TLS":           {ClientCAs: ca.Pool},
		"address already in use":                                     {Addr: used.Addr()},
	} {
		if b, err := New(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, %v", o, b, err)
		}
	}
}

func TestPayloadIsZero(t *testing.T) {
	p, err := payload(testpb.PayloadType_COMPRESSABLE, 100)
	if err != nil || !bytes.Equal(p.Body, make([]byte, 100)) {
		t.Errorf("got %v, %v", p, err)
	}
}
