package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v3orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	v3orcaservice "github.com/cncf/xds/go/xds/service/orca/v3"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// fieldHealth are faults of health checks and ejections.
var fieldHealth = []fieldCase{
	{
		"an upstream that a file adds starts slowly",
		"in a trial slow_start without a health check gave a new upstream its full share at once; Envoy's slow start mode counts from when a host is added",
		slowStartOfNewUpstream,
	},
	{
		"what a client provokes ejects nobody",
		"a client that made a service echo a blank in a status message took it out for everybody; what an upstream answers to one client's request must not count against it",
		provokedAnswers,
	},
	{
		"a connection that ends for one stream ejects nobody",
		"nginx and HAProxy close the connection of all clients over one request that they do not like; outlier_detection then ejected them, and 142 of 194 calls failed instead of 58 of 142",
		lostConnections,
	},
	{
		"nginx is not ejected for closing the connection over one client's metadata",
		"nginx ends the connection of all clients over a field of 11 KB (GOAWAY ENHANCE_YOUR_CALM), so that outlier_detection ejected it",
		func(t *testing.T) {
			lostToPeer(t, func(t *testing.T, to string) string { return startNginx(t, to, "") }, "x-large", strings.Repeat("x", 11<<10))
		},
	},
	{
		"HAProxy is not ejected for closing the connection over one client's metadata",
		"HAProxy ends the connection of all clients over 350 fields, so that outlier_detection ejected it",
		func(t *testing.T) {
			var many []string
			for i := range 400 {
				many = append(many, fmt.Sprint("x-", i), "v")
			}
			lostToPeer(t, startHAProxy, many...)
		},
	},
	{
		"servers that end connections when they are old stay healthy",
		"with MaxConnectionAge 1 s on both upstreams and health_mode watch 334 of 800 calls failed; gRFC A9 makes such a GOAWAY a matter of course",
		oldConnections,
	},
	{
		"a Watch takes no call's place",
		"with max_conns 1 and one stream per connection health_check grpc took the stream for its Watch, and no call was ever served; with two, every second one waited out its queue time",
		func(t *testing.T) { watchedAndBusy(t, "health_check grpc") },
	},
	{
		"a stream of load reports takes no call's place",
		"the same with the stream of lb_policy orca with enable_oob_load_report (gRFC A51)",
		func(t *testing.T) { watchedAndBusy(t, "lb_policy orca {\n\t\tenable_oob_load_report\n\t}") },
	},
}

const touchy = "lb_policy round_robin\n\tfail_duration 1m\n\toutlier_detection {\n\t\tconsecutive_failures 1\n\t\tconsecutive_local_failures 1\n\t\tmax_ejection_percent 100\n\t}\n"

func provokedAnswers(t *testing.T) {
	backends := start(t, 2)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addrs(backends) + " {\n\t" + touchy + "}"})
	c := client(t, p.H2C)
	spread(t, c, 4, 1, backends...)
	cc := dial(t, p.H2C, nil)
	usable := func(after string) {
		t.Helper()
		for _, b := range backends {
			if st := stateOf(t, b.Addr()).Status(); st.Condition != upstream.ConditionHealthy {
				t.Fatalf("after %s, %s is %v: %s", after, b.Name(), st.Condition, st.Text)
			}
		}
	}
	for _, what := range provocations {
		what.provoke(t, cc)
		usable(what.name)
	}
	// Nor does a status message with a blank at its end, whatever becomes of it.
	for range 8 {
		err := asks(backendtest.KeyStatus, "NOT_FOUND", backendtest.KeyMessageBin, "no such user: ")(within(t, timeout), cc)
		if err == nil {
			t.Error("a call that is to fail succeeds")
		}
	}
	usable("a blank")
	spread(t, c, 4, 1, backends...)
	for _, b := range backends {
		if b.Accepted() != 1 {
			t.Errorf("%d connections to %s: the first was ended", b.Accepted(), b.Name())
		}
	}
}

func lostConnections(t *testing.T) {
	ends := map[string]func(c *wiretest.Conn, stream uint32){
		"/x.Y/GoAway": func(c *wiretest.Conn, stream uint32) {
			c.WriteGoAway(stream, http2.ErrCodeProtocol, "trailers")
			c.Close()
		},
		"/x.Y/Calm": func(c *wiretest.Conn, _ uint32) {
			c.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, "too many resets")
			c.Close()
		},
		"/x.Y/Close":   func(c *wiretest.Conn, _ uint32) { c.Close() },
		"/x.Y/Abort":   func(c *wiretest.Conn, _ uint32) { c.Abort() },
		"/x.Y/Illegal": func(c *wiretest.Conn, _ uint32) { c.WriteData(0, []byte("x"), true) },
		"/x.Y/Reset":   func(c *wiretest.Conn, stream uint32) { c.WriteReset(stream, http2.ErrCodeProtocol) },
		"/x.Y/Fault":   func(c *wiretest.Conn, stream uint32) { c.WriteReset(stream, http2.ErrCodeInternal) },
	}
	l := wiretest.Listen(t)
	var waiting atomic.Int32
	l.Serve(func(c *wiretest.Conn) {
		for {
			f := c.ExpectHeaders()
			end, ok := ends[f.Get(":path")]
			if !ok {
				waiting.Add(1)
				continue
			}
			end(c, f.Stream)
			if p := f.Get(":path"); p != "/x.Y/Reset" && p != "/x.Y/Fault" {
				return
			}
		}
	})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + l.Addr() + " {\n\t" + touchy + "}"})
	cc := dial(t, p.H2C, nil)
	call := func(path string) error {
		return cc.Invoke(within(t, timeout), path, new(testgrpc.Empty), new(testgrpc.Empty))
	}
	for path := range ends {
		waiting.Store(0)
		const others = 6
		var ended atomic.Int32
		var wg sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		for range others {
			wg.Go(func() {
				_ = cc.Invoke(ctx, "/x.Y/Wait", new(testgrpc.Empty), new(testgrpc.Empty))
				ended.Add(1)
			})
		}
		eventually(t, "the others' calls are there", func() bool { return waiting.Load() >= others })
		if err := call(path); err == nil {
			t.Errorf("%s succeeds", path)
		}
		if path != "/x.Y/Reset" && path != "/x.Y/Fault" {
			// Those that were certainly not processed have come back on another connection.
			eventually(t, "the others' calls have ended with their connection", func() bool { return ended.Load()+waiting.Load() >= 2*others })
		}
		cancel()
		wg.Wait()
		if s := stateOf(t, l.Addr()); s.Has(upstream.Ejected | upstream.Failing) {
			t.Fatalf("after %s: %s", path, s.Status().Text)
		}
	}
}

// lostToPeer makes calls with metadata that the upstream does not like, while others are under way.
func lostToPeer(t *testing.T, run func(t *testing.T, to string) string, namesAndValues ...string) {
	b := backendtest.Start(t, backendtest.Options{})
	addr := run(t, b.Addr())
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addr + " {\n\t" + touchy + "}"})
	c := client(t, p.H2C)
	spread(t, c, 1, 1, b)
	const others = 4
	for range 3 {
		ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(), backendtest.KeyBlock, "yes"))
		var wg sync.WaitGroup
		for range others {
			wg.Go(func() { _, _ = c.EmptyCall(ctx, new(testgrpc.Empty)) })
		}
		eventually(t, "the others' calls are there", func() bool { return b.Active() == others })
		for range 2 {
			_, err := c.EmptyCall(metadata.AppendToOutgoingContext(within(t, timeout), namesAndValues...), new(testgrpc.Empty))
			if err == nil {
				t.Error("the upstream takes it")
			}
		}
		cancel()
		wg.Wait()
		if s := stateOf(t, addr); s.Has(upstream.Ejected | upstream.Failing) {
			t.Fatal(s.Status().Text)
		}
		eventually(t, "the backend has no calls", func() bool { return b.Active() == 0 })
	}
	spread(t, c, 4, 1, b)
}

func oldConnections(t *testing.T) {
	age := grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 250 * time.Millisecond})
	var backends []*backendtest.Backend
	for _, name := range []string{"a", "b"} {
		backends = append(backends, backendtest.Start(t, backendtest.Options{Name: name, ServerOptions: []grpc.ServerOption{age}}))
	}
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addrs(backends) + " {\n\thealth_check grpc\n\thealth_mode watch\n}"})
	l := startCallers(t, 4, client(t, p.H2C))
	eventually(t, "each upstream has ended some connections", func() bool { return backends[0].Accepted() > 4 && backends[1].Accepted() > 4 })
	l.more(t, 50)
	for _, f := range l.stop() {
		t.Errorf("a call failed: %v", f.err)
	}
	for _, e := range p.Log("http.handlers.grpc_proxy") {
		if e["msg"] == "upstream unhealthy" {
			t.Errorf("%v", e)
		}
	}
}

func watchedAndBusy(t *testing.T, block string) {
	for _, limit := range []int{1, 2, 100} {
		var reports atomic.Int32
		b := backendtest.Start(t, backendtest.Options{
			MaxConcurrentStreams: uint32(limit),
			Register: func(s *grpc.Server) {
				v3orcaservice.RegisterOpenRcaServiceServer(s, loadReports{count: &reports})
			},
		})
		p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + " {\n\tmax_conns 1\n\t" + block + "\n}"})
		c := client(t, p.H2C)
		spread(t, c, 20, min(limit, 4), b)
		eventually(t, "it is watched", func() bool { return b.Calls()["/grpc.health.v1.Health/Watch"]+int64(reports.Load()) > 0 })
		// As many calls as the upstream allows on its one connection, all at once.
		ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(), backendtest.KeyBlock, "yes"))
		var wg sync.WaitGroup
		for range limit {
			wg.Go(func() { _, _ = c.EmptyCall(ctx, new(testgrpc.Empty)) })
		}
		eventually(t, "all calls are served", func() bool { return b.Active() == int64(limit) })
		cancel()
		wg.Wait()
		if st := stateOf(t, b.Addr()).Status(); st.Condition != upstream.ConditionHealthy {
			t.Errorf("the upstream is %v: %s", st.Condition, st.Text)
		}
	}
}

// loadReports reports its load once on each stream.
type loadReports struct {
	v3orcaservice.UnimplementedOpenRcaServiceServer
	count *atomic.Int32
}

func (l loadReports) StreamCoreMetrics(_ *v3orcaservice.OrcaLoadReportRequest, s v3orcaservice.OpenRcaService_StreamCoreMetricsServer) error {
	l.count.Add(1)
	if err := s.Send(&v3orcapb.OrcaLoadReport{CpuUtilization: 0.5}); err != nil {
		return err
	}
	<-s.Context().Done()
	return s.Context().Err()
}

func slowStartOfNewUpstream(t *testing.T) {
	old := backendtest.Start(t, backendtest.Options{Name: "old"})
	file := filepath.Join(t.TempDir(), "upstreams.json")
	list := func(addrs ...string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(`[{"address":"`+strings.Join(addrs, `"},{"address":"`)+`"}]`), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	list(old.Addr())
	// With this aggression the share stays at 10 % for 1.7 s, and then grows fast.
	const window, cold = 2 * time.Second, 1700 * time.Millisecond
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic file " + file + " {\n\t\trefresh 100ms\n\t}\n\tlb_policy round_robin\n" +
		"\tslow_start 2s {\n\t\taggression 0.05\n\t}\n}"})
	c := client(t, p.H2C)
	spread(t, c, 1, 1, old)
	since := stateOf(t, old.Addr()).UsableSince()
	eventually(t, "the old one is warm", func() bool { return time.Since(since) > window })
	for addrs := []string{old.Addr()}; ; {
		fresh := backendtest.Start(t, backendtest.Options{Name: "new"})
		addrs = append(addrs, fresh.Addr())
		list(addrs...)
		eventually(t, "the new one is there", func() bool {
			if _, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty)); err != nil {
				t.Fatal(err)
			}
			return fresh.Calls().Total() > 0
		})
		state := stateOf(t, fresh.Addr())
		got := spread(t, c, 55, 1, old, fresh)
		if time.Since(state.UsableSince()) > cold {
			t.Log("the machine is too slow; once more")
			continue
		}
		if state.Status().Condition != upstream.ConditionWarming || got[1] > 12 {
			t.Errorf("the new upstream is %v and got %d of 55 calls, want 5", state.Status().Condition, got[1])
		}
		return
	}
}
