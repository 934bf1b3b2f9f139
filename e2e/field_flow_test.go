package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// fieldFlow are faults of windows, of what is held for slow readers, and of fields' values.
var fieldFlow = []fieldCase{
	{
		"blanks_around_values",
		"a service that echoed a blank took its upstream out for everybody: grpc-go sends grpc-message and metadata with blanks at their ends as they are; RFC 9110 section 5.5 excludes them",
		blanksAroundValues,
	},
	{
		"talkative_upstream",
		"an upstream that sent 1,000 empty DATA frames and PINGs lost its connection, and the calls of others with it; RFC 9113 section 10.5 leaves it to us what is too much",
		talkativeUpstream,
	},
	{
		"stalled_uploads",
		"one upload that nobody read used up the window of the connection that two Caddys share, and no other client's call passed; RFC 9113 section 5.2.2 warns of it",
		stalledUploads,
	},
	{
		"stalled_uploads_small_window",
		"the same with an upstream whose connections have the protocol's first window, 65,535 bytes: another connection takes the calls",
		stalledUploadsSmallWindow,
	},
	{
		"stalled_readers_hold_no_more_than_allowed",
		"100 clients that read fast and then stopped held 77 MiB in windows that had grown, 1,000 would have held ten times that; no window can be taken back (RFC 9113 section 6.9), so calls end with RESOURCE_EXHAUSTED",
		stalledReadersEnd,
	},
}

func blanksAroundValues(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{Hook: func(c *backendtest.Call) error {
		if v := c.Metadata.Get("x-say"); len(v) > 0 {
			if pad := c.Metadata.Get("x-pad"); len(pad) != 1 || pad[0] != "p" {
				t.Errorf("the upstream got %q", pad)
			}
			if err := grpc.SetHeader(c.Context, metadata.Pairs("x-head", "h ", "x-blank", " ")); err != nil {
				return err
			}
			if err := grpc.SetTrailer(c.Context, metadata.Pairs("x-trail", "\tt")); err != nil {
				return err
			}
			if v[0] == "error" {
				return status.Error(codes.NotFound, "no such user: ")
			}
		}
		return nil
	}})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + " {\n\tfail_duration 1m\n\toutlier_detection {\n\t\tconsecutive_failures 1\n\t}\n}"})
	c := client(t, p.H2C)
	for range 3 {
		for say, want := range map[string]codes.Code{"error": codes.NotFound, "fine": codes.OK} {
			var head, trail metadata.MD
			ctx := metadata.AppendToOutgoingContext(within(t, timeout), "x-say", say, "x-pad", " p ")
			_, err := c.EmptyCall(ctx, &testgrpc.Empty{}, grpc.Header(&head), grpc.Trailer(&trail))
			if s := status.Convert(err); s.Code() != want || want == codes.NotFound && s.Message() != "no such user:" {
				t.Fatalf("%s: %v", say, err)
			}
			got := metadata.Join(head, trail)
			for name, want := range map[string]string{"x-head": "h", "x-blank": "", "x-trail": "t"} {
				if v := got.Get(name); len(v) != 1 || v[0] != want {
					t.Errorf("%s: %s is %q, want %q", say, name, v, want)
				}
			}
		}
		// Whoever comes next is served.
		if _, err := c.EmptyCall(context.Background(), &testgrpc.Empty{}); err != nil {
			t.Fatal(err)
		}
	}
}

func talkativeUpstream(t *testing.T) {
	l := wiretest.Listen(t, wiretest.Options{NoSettingsAck: true})
	waits := make(chan struct{})
	l.Serve(func(c *wiretest.Conn) {
		first := c.ExpectHeaders()
		c.WriteHeaders(first.Stream, wiretest.Head(), false)
		second := c.ExpectHeaders()
		c.WriteHeaders(second.Stream, wiretest.Head(), false)
		c.Batch(func() {
			for i := range 1000 {
				c.WriteData(second.Stream, nil, false)
				c.WritePing(false, [8]byte{byte(i)})
			}
			c.WriteData(second.Stream, wiretest.Message(nil), false)
			c.WriteHeaders(second.Stream, wiretest.Fields("grpc-status", "0"), true)
		})
		<-waits
		c.WriteData(first.Stream, wiretest.Message(nil), false)
		c.WriteHeaders(first.Stream, wiretest.Fields("grpc-status", "0"), true)
	})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + l.Addr()})
	s, err := client(t, p.H2C).StreamingOutputCall(within(t, timeout), new(testgrpc.StreamingOutputCallRequest))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Header(); err != nil {
		t.Fatal(err)
	}
	if _, err := client(t, p.H2C).EmptyCall(within(t, timeout), &testgrpc.Empty{}); err != nil {
		t.Errorf("the call it happened to: %v", err)
	}
	close(waits)
	if _, err := s.Recv(); err != nil {
		t.Errorf("the other call: %v", err)
	}
}

// stall begins an upload and returns when nothing of it moves any more.
func stall(t *testing.T, c testgrpc.TestServiceClient) {
	t.Helper()
	s, err := c.StreamingInputCall(metadata.AppendToOutgoingContext(t.Context(), "x-stall", "1"))
	if err != nil {
		t.Fatal(err)
	}
	var sent atomic.Int64
	go func() {
		msg := &testgrpc.StreamingInputCallRequest{Payload: &testgrpc.Payload{Body: make([]byte, 30_000)}}
		for s.Send(msg) == nil {
			sent.Add(30_000)
		}
	}()
	last, since := int64(0), time.Now()
	eventually(t, "the upload stalls", func() bool {
		if n := sent.Load(); n != last || n == 0 {
			last, since = n, time.Now()
		}
		return time.Since(since) > 50*time.Millisecond
	})
}

// passes makes unary calls and an upload as another client.
func passes(t *testing.T, addr string, size int) {
	t.Helper()
	c := client(t, addr)
	for range 10 {
		if _, err := c.UnaryCall(within(t, timeout), &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: make([]byte, size)}}); err != nil {
			t.Fatalf("a unary call: %v", err)
		}
	}
	s, err := c.StreamingInputCall(within(t, timeout))
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := s.Send(&testgrpc.StreamingInputCallRequest{Payload: &testgrpc.Payload{Body: make([]byte, size)}}); err != nil {
			break
		}
	}
	if _, err := s.CloseAndRecv(); err != nil {
		t.Fatalf("an upload: %v", err)
	}
}

func stalledUploads(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{Hook: func(c *backendtest.Call) error {
		if len(c.Metadata.Get("x-stall")) > 0 {
			<-c.Context.Done()
		}
		return nil
	}})
	p := proxytest.Start(t, proxytest.Options{Site: "respond 200"})
	hop := "@hop header x-hop 1\nhandle @hop {\n\tgrpc_proxy " + b.Addr() + "\n}\nhandle {\n\tgrpc_proxy " + p.H2C + " {\n\t\theader_up x-hop 1\n\t}\n}"
	if err := p.Load(hop); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		stall(t, client(t, p.H2C))
		passes(t, p.H2C, 100_000) // at once, before anything can be known of the stalled ones
	}
}

func stalledUploadsSmallWindow(t *testing.T) {
	var conns atomic.Int32
	srv := &http.Server{
		HTTP2:             &http.HTTP2Config{MaxReceiveBufferPerConnection: 65535, MaxReceiveBufferPerStream: 1 << 20},
		Protocols:         new(http.Protocols),
		ReadHeaderTimeout: timeout,
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				conns.Add(1)
			}
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("x-stall") != "" {
				<-r.Context().Done()
				return
			}
			_, _ = io.Copy(io.Discard, r.Body)
			w.Header().Set("content-type", "application/grpc")
			w.Header().Set("trailer", "grpc-status")
			_, _ = w.Write(wiretest.Message(nil))
			w.Header().Set("grpc-status", "0")
		}),
	}
	srv.Protocols.SetUnencryptedHTTP2(true)
	l, addr := listen(t)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addr})
	stall(t, client(t, p.H2C))
	passes(t, p.H2C, 1000) // in what the upload has left
	eventually(t, "another connection is made", func() bool { return conns.Load() > 1 })
	passes(t, p.H2C, 100_000)
	if n := conns.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
}

func stalledReadersEnd(t *testing.T) {
	const limit = 1 << 20
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{
		Site: "grpc_proxy " + b.Addr() + " {\n\tstream_memory_limit 1MiB\n\tfail_duration 1m\n}", AccessLog: true,
	})
	if n := h2.ProcessBudget.Limit(); n != limit {
		t.Fatalf("the limit is %d", n)
	}
	reader := client(t, p.H2C)
	ctx := within(t, 4*timeout)
	var all []testgrpc.TestService_StreamingOutputCallClient
	for range 40 {
		all = append(all, stalled(t, ctx, client(t, p.H2C, small...), 100, 50_000))
		if _, err := reader.UnaryCall(within(t, timeout), &testgrpc.SimpleRequest{ResponseSize: 50_000}); err != nil {
			t.Fatalf("a client that reads: %v", err)
		}
	}
	eventually(t, "no more is held than allowed", func() bool { return h2.ProcessBudget.Held() <= limit })
	// Who is left can still read all of it.
	left, ended := 0, 0
	for _, s := range all {
		n, err := 0, error(nil)
		for ; err == nil; n++ {
			_, err = s.Recv()
		}
		if ended++; errors.Is(err, io.EOF) && n == 101 {
			left, ended = left+1, ended-1
		} else if errors.Is(err, io.EOF) {
			t.Errorf("OK after %d messages", n-1)
		}
	}
	t.Logf("%d calls ended, %d were left", ended, left)
	if ended == 0 || left == 0 {
		t.Errorf("%d calls ended, %d were left", ended, left)
	}
	exhausted := func() (n int) {
		for _, e := range p.Log("http.log.access") {
			if e["grpc_reason"] == "STREAM_MEMORY_LIMIT" {
				if n++; e["grpc_status"] != "RESOURCE_EXHAUSTED" {
					t.Errorf("%v", e["grpc_status"])
				}
			}
		}
		return n
	}
	eventually(t, "the log has them", func() bool { return exhausted() == ended })
	if err := p.Load("grpc_proxy " + b.Addr()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the default is back", func() bool { return h2.ProcessBudget.Limit() == h2.DefaultBudgetLimit })
}
