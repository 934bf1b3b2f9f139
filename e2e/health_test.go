package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const (
	serving    = grpc_health_v1.HealthCheckResponse_SERVING
	notServing = grpc_health_v1.HealthCheckResponse_NOT_SERVING
)

func addrs(backends []*backendtest.Backend) string {
	s := ""
	for _, b := range backends {
		s += " " + b.Addr()
	}
	return s
}

// TestPushedHealth: NOT_SERVING pushed by Watch takes new calls away, costs none, and leaves open streams alone; SERVING
// brings them back.
func TestPushedHealth(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 2)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addrs(backends) + " {\n\thealth_check grpc\n\tlb_policy round_robin\n}"})
	c := client(t, p.H2C)
	spread(t, c, 20, 2, backends...)
	s, err := c.FullDuplexCall(metadata.AppendToOutgoingContext(within(t, time.Minute), "x", "y"))
	if err != nil {
		t.Fatal(err)
	}
	ping := func() {
		t.Helper()
		if err := s.Send(&testgrpc.StreamingOutputCallRequest{ResponseParameters: []*testgrpc.ResponseParameters{{Size: 1}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	ping()
	load := startCallers(t, 8, client(t, p.H2C))
	for range 3 {
		for _, b := range backends {
			state := stateOf(t, b.Addr())
			b.Health.SetServingStatus("", notServing)
			begin := time.Now()
			eventually(t, b.Name()+" is unhealthy", func() bool { return !state.Usable() })
			t.Logf("%s: noticed after %v", b.Name(), time.Since(begin).Round(100*time.Microsecond))
			eventually(t, "the last calls that were on their way have come", func() bool {
				n := b.Calls().Total()
				load.more(t, 100)
				return b.Calls().Total() == n
			})
			n := b.Calls().Total()
			load.more(t, 200)
			if got := b.Calls().Total(); got != n {
				t.Errorf("%d calls went to %s, which is not serving", got-n, b.Name())
			}
			ping()
			b.Health.SetServingStatus("", serving)
			eventually(t, b.Name()+" is healthy", state.Usable)
			served(t, b, b.Calls().Total()+20)
		}
	}
	for _, f := range load.stop() {
		t.Errorf("a call failed: %v", f.err)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
}

// TestHealthPerService: calls of a service leave the upstreams where it is not serving, others stay.
func TestHealthPerService(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 2)
	for _, b := range backends {
		b.Health.SetServingStatus("grpc.testing.TestService", serving)
	}
	site := func(interval string) string {
		return "grpc_proxy " + addrs(backends) + " {\n\thealth_services grpc.testing.TestService\n\thealth_interval " + interval + "\n\tlb_policy round_robin\n}"
	}
	p := proxytest.Start(t, proxytest.Options{Site: site("10s")})
	c := client(t, p.H2C)
	health := grpc_health_v1.NewHealthClient(dial(t, p.H2C, nil))
	eventually(t, "both have calls of the service", func() bool {
		got := spread(t, c, 10, 1, backends...)
		return got[0] > 0 && got[1] > 0
	})
	backends[0].Health.SetServingStatus("grpc.testing.TestService", notServing)
	eventually(t, "the service's calls leave", func() bool {
		got := spread(t, c, 10, 1, backends...)
		return got[0] == 0
	})
	// The health service itself is another service, which is not named.
	for range 10 {
		if _, err := health.Check(within(t, timeout), new(grpc_health_v1.HealthCheckRequest)); err != nil {
			t.Fatal(err)
		}
	}
	// Reloads that change the checks, the old ones of which end when the new ones have begun, change nothing about that.
	for _, interval := range []string{"11s", "12s"} {
		if err := p.Load(site(interval)); err != nil {
			t.Fatal(err)
		}
		c = client(t, p.H2C)
		if got := spread(t, c, 50, 1, backends...); got[0] != 0 {
			t.Errorf("after a reload %d of 50 calls went where the service is not serving", got[0])
		}
	}
	backends[0].Health.SetServingStatus("grpc.testing.TestService", serving)
	eventually(t, "they come back", func() bool {
		got := spread(t, c, 10, 1, backends...)
		return got[0] > 0
	})
}

// TestFirstVerdict: calls wait for the first answer of a health check, and go nowhere that is not serving.
func TestFirstVerdict(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 3)
	backends[0].Health.SetServingStatus("", notServing)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addrs(backends) + " {\n\thealth_check grpc\n}"})
	got := spread(t, client(t, p.H2C), 100, 8, backends...)
	if got[0] != 0 {
		t.Errorf("%d calls went to an upstream that never served", got[0])
	}
	for _, b := range backends {
		b.Health.SetServingStatus("", notServing)
	}
	eventually(t, "all are unhealthy", func() bool {
		return !stateOf(t, backends[1].Addr()).Usable() && !stateOf(t, backends[2].Addr()).Usable()
	})
	_, err := client(t, p.H2C).EmptyCall(within(t, timeout), new(testgrpc.Empty))
	if s := status.Convert(err); s.Code() != codes.Unavailable || s.Message() != "none of the 3 upstreams is usable: 3 unhealthy" {
		t.Errorf("with no healthy upstream: %v", err)
	}
}

// TestPanic: when too few are healthy, all are used.
func TestPanic(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 3)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addrs(backends) + " {\n\thealth_check grpc\n\tpanic_threshold 50\n\tlb_policy round_robin\n}"})
	c := client(t, p.H2C)
	spread(t, c, 30, 2, backends...)
	backends[0].Health.SetServingStatus("", notServing)
	eventually(t, "one is left out", func() bool { return spread(t, c, 20, 2, backends...)[0] == 0 })
	backends[1].Health.SetServingStatus("", notServing)
	eventually(t, "all are used", func() bool {
		got := spread(t, c, 30, 2, backends...)
		return got[0] == 10 && got[1] == 10 && got[2] == 10
	})
	backends[0].Health.SetServingStatus("", serving)
	eventually(t, "the panic is over", func() bool { return spread(t, c, 20, 2, backends...)[1] == 0 })
}

// TestPanicAtOnce: no call fails when all upstreams become unhealthy at the same moment.
func TestPanicAtOnce(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 2)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addrs(backends) + " {\n\thealth_check grpc\n\tpanic_threshold 50\n\tlb_policy round_robin\n}"})
	all := func(s grpc_health_v1.HealthCheckResponse_ServingStatus, usable bool) {
		for _, b := range backends {
			b.Health.SetServingStatus("", s)
		}
		eventually(t, "the upstreams' health is known", func() bool {
			return stateOf(t, backends[0].Addr()).Usable() == usable && stateOf(t, backends[1].Addr()).Usable() == usable
		})
	}
	c := client(t, p.H2C)
	spread(t, c, 30, 2, backends...)
	for range 3 {
		load := startCallers(t, 4, c)
		load.more(t, 100)
		all(notServing, false)
		load.more(t, 1000)
		if failures := load.stop(); len(failures) > 0 {
			t.Fatalf("%d calls failed, the first with %v", len(failures), failures[0].err)
		}
		all(serving, true)
		panics := func(text string) (n int) {
			for _, e := range p.Log("http.handlers.grpc_proxy") {
				if m, _ := e["msg"].(string); strings.Contains(m, text) && strings.Contains(m, "panic_threshold") {
					n++
				}
			}
			return n
		}
		eventually(t, "the panic is over", func() bool { return panics("so few") == panics("enough") })
	}
}

// TestOutlierInTrailers: an upstream that answers, with a message even, and then says UNAVAILABLE in its trailers, is ejected.
func TestOutlierInTrailers(t *testing.T) {
	wiretest.CheckLeaks(t)
	var broken atomic.Bool
	bad := backendtest.Start(t, backendtest.Options{Name: "bad", ServerOptions: []grpc.ServerOption{
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if err := h(srv, ss); err != nil || !broken.Load() {
				return err
			}
			return status.Error(codes.Unavailable, "after all")
		}),
	}})
	good := backendtest.Start(t, backendtest.Options{Name: "good"})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + bad.Addr() + " " + good.Addr() +
		" {\n\tlb_policy round_robin\n\toutlier_detection {\n\t\tconsecutive_failures 5\n\t\tmax_ejection_percent 50\n\t\tbase_ejection_time 500ms\n\t}\n}"})
	c := client(t, p.H2C)
	call := func() error {
		s, err := c.StreamingOutputCall(within(t, timeout), &testgrpc.StreamingOutputCallRequest{ResponseParameters: []*testgrpc.ResponseParameters{{Size: 10}}})
		if err != nil {
			return err
		}
		if _, err := s.Recv(); err != nil {
			t.Fatalf("no message before the end: %v", err)
		}
		if _, err := s.Recv(); !errors.Is(err, io.EOF) {
			return err
		}
		return nil
	}
	for range 20 {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}
	broken.Store(true)
	failed := 0
	for range 60 {
		if err := call(); err != nil {
			failed++
		}
	}
	if failed < 5 || failed > 8 {
		t.Errorf("%d of 60 calls failed, want those that it takes to be ejected: 5", failed)
	}
	state := stateOf(t, bad.Addr())
	if st := state.Status(); st.Condition != upstream.ConditionEjected {
		t.Errorf("the bad one is %v (%s)", st.Condition, st.Text)
	}
	broken.Store(false)
	eventually(t, "it is readmitted", func() bool {
		if err := call(); err != nil {
			t.Fatal(err)
		}
		return state.Status().Condition == upstream.ConditionHealthy
	})
}

// freezable is a way to the address over which nothing goes while it is frozen, as when a process is stopped: connections
// are taken, and that is all.
func freezable(t *testing.T, to string) (addr string, frozen *atomic.Bool) {
	t.Helper()
	l, addr := listen(t)
	frozen = new(atomic.Bool)
	done := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(func() {
		close(done)
		_ = l.Close()
		wg.Wait()
	})
	pass := func(from, to net.Conn) {
		defer from.Close()
		defer to.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := from.Read(buf)
			for frozen.Load() {
				select {
				case <-done:
					return
				case <-time.After(5 * time.Millisecond):
				}
			}
			if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				_ = in.Close()
				continue
			}
			wg.Go(func() { <-done; _ = in.Close(); _ = out.Close() })
			wg.Go(func() { pass(in, out) })
			wg.Go(func() { pass(out, in) })
		}
	})
	return addr, frozen
}

// TestFlapping: a backend that is well and ill by turns costs a few calls each time it is tried again, which is less and
// less often, and not half of those that it would get.
func TestFlapping(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	wiretest.CheckLeaks(t)
	begin := time.Now()
	bad := backendtest.Start(t, backendtest.Options{Name: "bad", ServerOptions: []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if time.Since(begin).Milliseconds()/100%2 == 1 {
				return nil, status.Error(codes.Unavailable, "again")
			}
			return h(ctx, req)
		}),
	}})
	good := backendtest.Start(t, backendtest.Options{Name: "good"})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + bad.Addr() + " " + good.Addr() +
		" {\n\tlb_policy round_robin\n\toutlier_detection {\n\t\tconsecutive_failures 3\n\t\tbase_ejection_time 300ms\n\t\tinterval 30s\n\t}\n}"})
	c := client(t, p.H2C)
	calls, failed := 0, 0
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); {
		calls++
		if _, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty)); err != nil {
			failed++
		}
	}
	t.Logf("%d of %d calls failed; %d of them went to the bad one", failed, calls, bad.Calls().Total())
	// Ejections last 0.3 s, 0.6 s, 0.9 s, …: four or five of them in 4 s, and no more than 3 failures before each.
	if failed == 0 || failed > 30 {
		t.Errorf("%d calls failed", failed)
	}
}
