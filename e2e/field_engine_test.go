package e2e

import (
	"context"
	"fmt"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// fieldEngine are faults of frames, windows and connections.
var fieldEngine = []fieldCase{
	{
		"no call is executed twice",
		"when an upstream broke a rule, calls still waiting to be written were replayed elsewhere and written all the same: two upstreams " +
			"charged one card; gRFC A6: a transparent retry is for what the server has not seen",
		noCallIsExecutedTwice,
	},
	{
		"cancelled calls are not sent",
		"calls that clients had cancelled before they were written went to the upstream all the same, each with its RST_STREAM, and nginx and Netty " +
			"close connections that bring many of these (CVE-2023-44487); RFC 9113 section 5.1.1: an identifier may be skipped",
		cancelledCallsAreNotSent,
	},
	{
		"cancelled calls are forgotten",
		"calls cancelled while an upstream held the connection's window stayed in memory, 6.7 KB each, until the connection ended; " +
			"RFC 9113 section 5.1: a reset stream is closed",
		cancelledCallsAreForgotten,
	},
}

func init() {
	caddy.RegisterModule(forgetting{})
	httpcaddyfile.RegisterHandlerDirective("test_forgotten", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return forgetting{}, nil
	})
}

// requestsCame is how many requests came through the handler, requestsGone how many of them nothing refers to any more.
var requestsCame, requestsGone atomic.Int64

// forgetting is a handler in front of the proxy that sees when a request is forgotten.
type forgetting struct{}

func (forgetting) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_forgotten", New: func() caddy.Module { return new(forgetting) }}
}

func (forgetting) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	own := new(http.Request)
	*own = *r
	requestsCame.Add(1)
	runtime.AddCleanup(own, func(struct{}) { requestsGone.Add(1) }, struct{}{})
	return next.ServeHTTP(w, own)
}

func cancelledCallsAreForgotten(t *testing.T) {
	up := wiretest.Listen(t, wiretest.Options{
		HoldWindows: true, DiscardData: true, Settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1 << 20}},
	})
	p := proxytest.Start(t, proxytest.Options{Site: "route {\n\ttest_forgotten\n\tgrpc_proxy " + up.Addr() + " {\n\t\tmax_conns 1\n\t}\n}"})
	c := client(t, p.H2C)
	came, gone := requestsCame.Load(), requestsGone.Load()
	// Uploads take most of the window of the upstream's connection, calls the rest.
	ctx, stop := context.WithCancel(within(t, timeout))
	const uploads, calls = 3, 100
	for range uploads {
		s, err := c.StreamingInputCall(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&testgrpc.StreamingInputCallRequest{Payload: &testgrpc.Payload{Body: make([]byte, 60<<10)}}); err != nil {
			t.Fatal(err)
		}
	}
	conn := up.Accept()
	for range uploads {
		conn.ExpectHeaders()
	}
	// The window moves a byte at a time: a connection whose window stands still takes no calls.
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn.WriteWindowUpdate(0, 1)
			select {
			case <-done:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	defer func() { close(done); <-ended }()
	req := &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: make([]byte, 1<<10)}}
	for range calls {
		ctx, cancel := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() {
			_, err := c.UnaryCall(ctx, req)
			ended <- err
		}()
		f := conn.ExpectHeaders()
		cancel()
		if err := <-ended; status.Code(err) != codes.Canceled {
			t.Fatalf("%v, want CANCELLED", err)
		}
		conn.ExpectReset(f.Stream)
	}
	var left int64
	// A few may be kept for a moment, by goroutines that have not ended or by pools.
	eventually(t, "the cancelled calls are forgotten", func() bool {
		runtime.GC()
		left = requestsCame.Load() - came - (requestsGone.Load() - gone)
		return left <= uploads+10
	})
	stop()
}

func noCallIsExecutedTwice(t *testing.T) {
	var executed sync.Map
	sound := backendtest.Start(t, backendtest.Options{Hook: func(c *backendtest.Call) error {
		for _, call := range c.Metadata["x-call"] {
			if _, twice := executed.LoadOrStore(call, true); twice {
				return status.Errorf(codes.AlreadyExists, "%s was executed twice", call)
			}
		}
		return nil
	}})
	site := "grpc_proxy " + sound.Addr()
	var bad []*ruleBreaker
	for range 16 {
		b := startRuleBreaker(t)
		bad = append(bad, b)
		site += " " + b.Addr().String()
	}
	p := proxytest.Start(t, proxytest.Options{Site: site + " {\n\tlb_policy random\n}"})
	ctx := within(t, timeout)
	var wg sync.WaitGroup
	var results sync.Map
	for g := range 6 {
		c := client(t, p.H2C)
		for i := range 30 {
			wg.Go(func() {
				call := fmt.Sprint(g, "/", i)
				req := &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: make([]byte, 100*i)}}
				_, err := c.UnaryCall(metadata.AppendToOutgoingContext(ctx, "x-call", call), req)
				results.Store(call, err)
			})
		}
	}
	wg.Wait()
	ok := 0
	for _, b := range bad {
		eventually(t, "its connections have ended", b.settled)
	}
	for call, result := range results.Range {
		err, _ := result.(error)
		saw := 0
		for _, b := range bad {
			if b.saw(call.(string)) {
				saw++
			}
		}
		_, done := executed.Load(call)
		switch code := status.Code(err); {
		case code == codes.AlreadyExists, saw > 1, done && saw > 0:
			t.Errorf("call %s ended with %v; %d others have seen it, too", call, err, saw)
		case code == codes.OK && done:
			ok++
		case code != codes.Unavailable:
			t.Errorf("call %s: %v, executed %t; %d others have seen it", call, err, done, saw)
		}
	}
	t.Logf("%d calls came through", ok)
}

func cancelledCallsAreNotSent(t *testing.T) {
	up := wiretest.Listen(t, wiretest.Options{
		DiscardData: true, Settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1 << 30}},
	})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + up.Addr()})
	ctx, stop := context.WithCancel(within(t, timeout))
	conn, stopped := fillUp(t, ctx, client(t, p.H2C), up)
	state := stateOf(t, up.Addr())
	c := client(t, p.H2C)
	const calls = 50
	for i := range calls {
		ctx, cancel := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() {
			_, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: make([]byte, 10*i)}})
			ended <- err
		}()
		eventually(t, "the call is at the upstream", func() bool { return state.Active() == 2 })
		cancel()
		if err := <-ended; status.Code(err) != codes.Canceled {
			t.Fatalf("%v, want CANCELLED", err)
		}
		eventually(t, "the proxy has given the call up", func() bool { return state.Active() == 1 })
	}
	conn.Resume()
	// The next call comes behind what was left of them. It finds the table of the header compression in order.
	result := make(chan error, 1)
	go func() {
		_, err := c.UnaryCall(metadata.AppendToOutgoingContext(ctx, "x-last", "yes"), &testgrpc.SimpleRequest{})
		result <- err
	}()
	sent := 0
	f := conn.ExpectHeaders()
	for ; f.Get("x-last") != "yes"; f = conn.ExpectHeaders() {
		sent++
	}
	if sent > calls/5 { // a system's buffers may take a little more now and then, and with that the call of that moment
		t.Errorf("%d calls were sent, though they had been cancelled", sent)
	}
	conn.WriteHeaders(f.Stream, wiretest.Head(), false)
	conn.WriteData(f.Stream, wiretest.Message(nil), false)
	conn.WriteHeaders(f.Stream, wiretest.Fields("grpc-status", "0"), true)
	if err := <-result; err != nil {
		t.Error(err)
	}
	stop()
	<-stopped
}
