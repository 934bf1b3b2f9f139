package e2e

import (
	"context"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// fieldTransport are faults of dials, queues and certificates.
var fieldTransport = []fieldCase{
	{
		name:   "a half-open upstream costs no call",
		origin: "one of two upstreams accepts TCP and never speaks: 122 of 2,630 calls failed within their second; gRFC A62 and grpc-go's round_robin use READY subchannels only",
		run:    halfOpenUpstream,
	},
	{
		name:   "a half-open upstream costs no call after its dials have failed",
		origin: "the end of the backoff made the silent upstream eligible again before a dial had succeeded: 600 calls lost in 60 s",
		run:    halfOpenAgain,
	},
	{
		name:   "a server that speaks second",
		origin: "servers that send SETTINGS with their first answer; RFC 9113 section 3.4 lets clients send before",
		run:    speaksSecond,
	},
	{
		name:   "a lone upstream comes back late",
		origin: "after 8 to 40 s of outage the first call succeeded 2.6 to 8.9 s after the restart, with reverse_proxy after 0.1 s",
		run:    loneUpstreamComesBack,
	},
	{
		name:   "connections are not made without a pause",
		origin: "an upstream that answers each stream with GOAWAY or a close was dialled 2,637 times in 5 s; gRPC connection-backoff.md",
		run:    noPause,
	},
	{
		name:   "a full upstream is passed over",
		origin: "114 of 242 calls failed in the queue of an upstream whose streams were all taken while another was idle; gRFC A105",
		run:    fullUpstream,
	},
	{
		name:   "an upstream that allows no streams is passed over",
		origin: "RFC 9113 section 6.5.2: MAX_CONCURRENT_STREAMS may be 0, for a time",
		run:    noStreamsAllowed,
	},
	{
		name:   "an overloaded upstream answers those that still wait",
		origin: "at three times the load and queue_size 1024, 59 of the 1,000 calls that could be served in a second were of use to anybody",
		run:    overload,
	},
	{
		name:   "the queue goes by deadlines",
		origin: "calls waited in the order in which they came, and those with little time left expired behind those with much; EDF",
		run:    queueByDeadline,
	},
	{
		name:   "no queue",
		origin: "queue_size 0 could not be written; Envoy's max_pending_requests",
		run:    noQueue,
	},
}

// silentPort accepts connections and never speaks.
func silentPort(t *testing.T) (addr string, accepted func() int64) {
	t.Helper()
	l, addr := listen(t)
	var n atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		var open []net.Conn
		for {
			c, err := l.Accept()
			if err != nil {
				break
			}
			n.Add(1)
			open = append(open, c)
		}
		for _, c := range open {
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return addr, n.Load
}

// callFor makes calls, with a deadline that a dial's timeout (3 s) would use up, from so many callers until enough is true, and fails for each that fails.
func callFor(t *testing.T, addr string, callers int, enough func() bool) (calls int64) {
	t.Helper()
	c := client(t, addr)
	var n, failed atomic.Int64
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for !enough() && failed.Load() < 5 {
				ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
				if _, err := c.EmptyCall(ctx, &testgrpc.Empty{}); err != nil {
					failed.Add(1)
					t.Errorf("a call failed: %v", err)
				}
				cancel()
				n.Add(1)
				time.Sleep(time.Millisecond)
			}
		})
	}
	wg.Wait()
	return n.Load()
}

func halfOpenUpstream(t *testing.T) {
	silent, accepted := silentPort(t)
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + silent + " " + b.Addr()})
	start := time.Now()
	n := callFor(t, p.H2C, 4, func() bool { return accepted() > 0 && time.Since(start) > 500*time.Millisecond })
	t.Logf("%d calls, %d connections to the silent one", n, accepted())
	if got := b.Calls().Total(); got != n {
		t.Errorf("%d of %d calls arrived", got, n)
	}
}

func halfOpenAgain(t *testing.T) {
	silent, accepted := silentPort(t)
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + silent + " " + b.Addr() + " {\n\tdial_timeout 150ms\n\tlb_policy round_robin\n}"})
	var end atomic.Pointer[upstream.State]
	n := callFor(t, p.H2C, 4, func() bool {
		if s := end.Load(); s != nil && !s.Has(upstream.Backoff) {
			t.Error("it is taken for usable, though it has never spoken")
			return true
		} else if s == nil && accepted() > 1 {
			end.Store(stateOf(t, silent))
		}
		return accepted() >= 4
	})
	t.Logf("%d calls, %d connections to the silent one", n, accepted())
}

func speaksSecond(t *testing.T) {
	l := wiretest.Listen(t, wiretest.Options{NoSettings: true})
	l.Serve(func(c *wiretest.Conn) {
		c.HoldWindows(true) // it would speak first otherwise
		for i := 0; ; i++ {
			id := c.ExpectHeaders().Stream
			if i == 0 {
				c.WriteSettings()
			}
			c.Collect(id)
			c.WriteHeaders(id, wiretest.Head(), false)
			c.WriteData(id, wiretest.Message(nil), false)
			c.WriteHeaders(id, []hpack.HeaderField{{Name: "grpc-status", Value: "0"}}, true)
		}
	})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + l.Addr()})
	c := client(t, p.H2C)
	for range 3 {
		if _, err := c.EmptyCall(within(t, timeout), &testgrpc.Empty{}); err != nil {
			t.Errorf("a call failed: %v", err)
		}
	}
	if n := l.Accepted(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

func loneUpstreamComesBack(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr()})
	c := client(t, p.H2C)
	call := func() error {
		_, err := c.EmptyCall(within(t, timeout), &testgrpc.Empty{})
		return err
	}
	if err := call(); err != nil {
		t.Fatal(err)
	}
	b.Stop()
	eventually(t, "the upstream is down", func() bool { return status.Code(call()) == codes.Unavailable })
	// A long outage, in short: the waits between dials have grown to about ten seconds.
	end := endpointAt(t, b.Addr())
	var last time.Time
	for range 9 {
		eventually(t, "no dial under way", func() bool { return !end.Dialing() })
		last = time.Now()
		end.Retry()
	}
	// A refused connection answers at once, not with the deadline; the call has asked for another dial.
	if err := call(); status.Code(err) != codes.Unavailable {
		t.Errorf("nobody listens, and the call failed with %v", err)
	}
	backendtest.Start(t, backendtest.Options{Addr: b.Addr()})
	eventually(t, "a second has passed, or a call", func() bool {
		return time.Since(last) > 1100*time.Millisecond || call() == nil
	})
	if err := call(); err != nil {
		t.Errorf("the upstream is back, and the call failed: %v", err)
	}
}

func noPause(t *testing.T) {
	for name, end := range map[string]func(c *wiretest.Conn){
		"GOAWAY": func(c *wiretest.Conn) { c.WriteGoAway(0, http2.ErrCodeNo, "") },
		"close":  func(c *wiretest.Conn) { c.Abort() },
	} {
		t.Run(name, func(t *testing.T) {
			l := wiretest.Listen(t)
			l.Serve(func(c *wiretest.Conn) { c.ExpectHeaders(); end(c) })
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + l.Addr()})
			c := client(t, p.H2C)
			start := time.Now()
			calls := 0
			for ; time.Since(start) < 700*time.Millisecond; calls++ {
				_, err := c.EmptyCall(within(t, 100*time.Millisecond), &testgrpc.Empty{})
				if err == nil {
					t.Fatal("the call was answered")
				}
			}
			// 100 ms, 200 ms, 400 ms, … and never more than once a second after that.
			most := 5 + int(time.Since(start)/time.Second)
			t.Logf("%d calls, %d connections", calls, l.Accepted())
			if n := l.Accepted(); n > most {
				t.Errorf("%d connections in %v", n, time.Since(start))
			}
		})
	}
}

func fullUpstream(t *testing.T) {
	for _, policy := range []string{"round_robin", "first", "least_request", "random", "header x-key"} {
		t.Run(strings.Fields(policy)[0], func(t *testing.T) {
			a := backendtest.Start(t, backendtest.Options{MaxConcurrentStreams: 1})
			b := backendtest.Start(t, backendtest.Options{})
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + a.Addr() + " " + b.Addr() + " {\n\tmax_conns 1\n\tlb_policy " + policy + "\n}"})
			c := client(t, p.H2C)
			// A stream takes the only place of the first upstream.
			var held []testgrpc.TestService_FullDuplexCallClient
			for i := 0; a.Active() == 0 && i < 200; i++ {
				ctx := metadata.AppendToOutgoingContext(within(t, timeout), "x-key", string(rune('a'+i)))
				s, err := c.FullDuplexCall(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if err := pingPong(s, 10); err != nil {
					t.Fatal(err)
				}
				held = append(held, s)
			}
			if a.Active() == 0 {
				t.Fatal("the first upstream got no stream")
			}
			before := b.Calls().Total()
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() {
					for range 10 {
						ctx := metadata.AppendToOutgoingContext(within(t, timeout), "x-key", string(rune('a'+i)))
						if _, err := c.EmptyCall(ctx, &testgrpc.Empty{}); err != nil {
							t.Errorf("a call failed: %v", err)
						}
					}
				})
			}
			wg.Wait()
			if n := b.Calls().Total() - before; n != 80 {
				t.Errorf("%d of 80 calls went to the upstream that has room", n)
			}
			for _, s := range held {
				_ = s.CloseSend()
				if _, err := s.Recv(); ended(err) != nil {
					t.Error(err)
				}
			}
		})
	}
}

func noStreamsAllowed(t *testing.T) {
	l := wiretest.Listen(t, wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 0}}})
	l.Serve(func(*wiretest.Conn) { <-t.Context().Done() })
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + l.Addr() + " " + b.Addr() + " {\n\tlb_policy round_robin\n}"})
	n := callFor(t, p.H2C, 4, func() bool { return l.Accepted() > 0 && b.Calls().Total() > 100 })
	if got := b.Calls().Total(); got != n {
		t.Errorf("%d of %d calls arrived", got, n)
	}
}

func queueByDeadline(t *testing.T) {
	l := wiretest.Listen(t, wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + l.Addr() + " {\n\tmax_conns 1\n}"})
	c := client(t, p.H2C)
	var wg sync.WaitGroup
	var conn *wiretest.Conn
	for i, d := range []time.Duration{50, 90, 30, 70, 20} { // the first one has the stream at once
		wg.Go(func() {
			ctx := metadata.AppendToOutgoingContext(within(t, d*time.Second), "x-seconds", strconv.Itoa(int(d)))
			if _, err := c.EmptyCall(ctx, &testgrpc.Empty{}); err != nil {
				t.Errorf("a call failed: %v", err)
			}
		})
		if i == 0 {
			conn = l.Accept()
			eventually(t, "the first call has the stream", func() bool { return len(conn.Untaken(1)) > 0 })
		}
		eventually(t, "the call waits", func() bool { return stateOf(t, l.Addr()).Active() == int64(i+1) })
	}
	for _, want := range []string{"50", "20", "30", "70", "90"} {
		h := conn.ExpectHeaders()
		if got := h.Get("x-seconds"); got != want {
			t.Errorf("the call with %s s is served, want that with %s", got, want)
		}
		conn.Collect(h.Stream)
		conn.WriteHeaders(h.Stream, wiretest.Head(), false)
		conn.WriteData(h.Stream, wiretest.Message(nil), false)
		conn.WriteHeaders(h.Stream, []hpack.HeaderField{{Name: "grpc-status", Value: "0"}}, true)
	}
	wg.Wait()
}

func noQueue(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{MaxConcurrentStreams: 1})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + " {\n\tmax_conns 1\n\tqueue_size 0\n\tqueue_full_status resource_exhausted\n}"})
	c := client(t, p.H2C)
	s, err := c.FullDuplexCall(within(t, timeout)) // waits for the connection, which is not the queue
	if err != nil {
		t.Fatal(err)
	}
	if err := pingPong(s, 10); err != nil {
		t.Fatal(err)
	}
	_, err = c.EmptyCall(within(t, timeout), &testgrpc.Empty{})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("%v, want RESOURCE_EXHAUSTED at once", err)
	}
	_ = s.CloseSend()
	if _, err := s.Recv(); ended(err) != nil {
		t.Error(err)
	}
	eventually(t, "the next call has the stream", func() bool {
		_, err := c.EmptyCall(within(t, timeout), &testgrpc.Empty{})
		return err == nil
	})
}

// overload: calls come three times as fast as they can be served, with deadlines that a long queue would use up. What counts is
// that streams are not spent on calls that nobody waits for any more: most of the calls that reach the upstream are answered in
// time, on a slow machine too.
func overload(t *testing.T) {
	const (
		streams, service = 4, 100 * time.Millisecond // 40 calls a second
		deadline         = time.Second
		interval         = time.Second / 120
		calls            = 140
	)
	b := backendtest.Start(t, backendtest.Options{MaxConcurrentStreams: streams, Delay: service})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + " {\n\tmax_conns 1\n\tqueue_size 1024\n}"})
	c := client(t, p.H2C)
	var served atomic.Int64
	var wg sync.WaitGroup
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for range calls {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			if _, err := c.EmptyCall(ctx, &testgrpc.Empty{}); err == nil {
				served.Add(1)
			}
		})
		<-tick.C
	}
	wg.Wait()
	arrived := b.Calls().Total()
	t.Logf("of %d calls %d reached the upstream and %d were answered in time", calls, arrived, served.Load())
	if served.Load() < arrived/2 {
		t.Errorf("%d calls reached the upstream, only %d were answered in time", arrived, served.Load())
	}
}
