package healthcheck

import (
	"context"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/rpc"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const (
	isServing  = healthpb.HealthCheckResponse_SERVING
	notServes  = healthpb.HealthCheckResponse_NOT_SERVING
	hour       = caddy.Duration(time.Hour)
	ms         = caddy.Duration(time.Millisecond)
	testSecond = caddy.Duration(time.Second)
)

// What a server pushes takes effect without waiting for the next probe, in either direction.
func TestWatchActsAtOnce(t *testing.T) {
	wiretest.CheckLeaks(t)
	for _, mode := range []string{ModeAuto, ModeWatch} {
		t.Run(mode, func(t *testing.T) {
			b := backendtest.Start(t, backendtest.Options{})
			a := active(t, &Active{Interval: hour, Timeout: 10 * testSecond, Fails: 5, Passes: 5}, &GRPC{Mode: mode})
			s := attend(t, a, b.Addr()).State
			if s.Usable() || s.Status().Condition != upstream.ConditionConnecting {
				t.Errorf("before the first answer: usable %v, %+v", s.Usable(), s.Status())
			}
			eventually(t, "healthy", s.Usable)
			for range 5 {
				b.Health.SetServingStatus("", notServes)
				eventually(t, "unusable", func() bool { return !s.Usable() })
				if st := s.Status(); st.Condition != upstream.ConditionUnhealthy || !strings.Contains(st.Text, "NOT_SERVING") {
					t.Errorf("status %+v", st)
				}
				b.Health.SetServingStatus("", isServing)
				eventually(t, "usable again", s.Usable)
			}
		})
	}
}

// A server that goes away while it is watched, and comes back on the same port.
func TestWatchServerRestarts(t *testing.T) {
	for _, mode := range []string{ModeAuto, ModeWatch} {
		t.Run(mode, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			b := backendtest.Start(t, backendtest.Options{})
			a := active(t, &Active{Interval: 50 * ms, Timeout: 5 * testSecond, Fails: 1}, &GRPC{Mode: mode})
			s := attend(t, a, b.Addr()).State
			eventually(t, "healthy", s.Usable)
			b.Stop()
			eventually(t, "unhealthy", func() bool { return s.Has(upstream.Unhealthy) })
			backendtest.Start(t, backendtest.Options{Addr: b.Addr()})
			eventually(t, "healthy again", s.Usable)
		})
	}
}

// A server that stops in good order waits for its streams: the watch is none to wait for. Its successor on the same port is
// watched at once, and what the old one said of itself last does not stick to it.
func TestWatchServerLeaves(t *testing.T) {
	for _, mode := range []string{ModeAuto, ModeWatch} {
		t.Run(mode, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			b := backendtest.Start(t, backendtest.Options{})
			// Were it not for the watch, nothing would be known for an hour.
			a := active(t, &Active{Interval: hour, Timeout: 5 * testSecond, UnhealthyInterval: hour, UnhealthyEdgeInterval: hour}, &GRPC{Mode: mode})
			s := attend(t, a, b.Addr()).State
			eventually(t, "healthy", s.Usable)
			eventually(t, "watched", func() bool { return b.Calls()["/grpc.health.v1.Health/Watch"] == 1 })
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			b.GracefulStop(ctx)
			if ctx.Err() != nil {
				t.Error("the server waited for the watch in vain")
			}
			eventually(t, "unhealthy", func() bool { return s.Has(upstream.Unhealthy) })
			backendtest.Start(t, backendtest.Options{Addr: b.Addr()})
			eventually(t, "healthy again", s.Usable)
		})
	}
}

// A connection that is lost is no reason to think ill of an endpoint that can be reached by another.
func TestWatchConnectionLost(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	a := active(t, &Active{Interval: hour, Timeout: 10 * testSecond}, &GRPC{Mode: ModeAuto})
	end := attend(t, a, b.Addr())
	eventually(t, "healthy", end.State.Usable)
	told := make(chan upstream.Status, 16)
	defer end.State.WatchStatus(func(_, to upstream.Status) { told <- to })()
	b.CloseConns()
	eventually(t, "a connection", func() bool { return b.Accepted() >= 2 })
	// It is watched on the new one.
	b.Health.SetServingStatus("", notServes)
	for {
		select {
		case st := <-told:
			if st.Reason == upstream.Unhealthy && strings.Contains(st.Text, "NOT_SERVING") {
				return
			}
			if st.Reason == upstream.Unhealthy {
				t.Errorf("told %+v of a connection that was lost", st)
			}
		case <-time.After(patience):
			t.Fatal("not watched any more")
		}
	}
}

// healthServer answers Check as it is told and has no Watch.
type healthServer struct {
	healthpb.UnimplementedHealthServer
	mu    sync.Mutex
	check func(context.Context, *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error)
	watch func(*healthpb.HealthCheckRequest, healthpb.Health_WatchServer) error
}

func (h *healthServer) Check(ctx context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	h.mu.Lock()
	f := h.check
	h.mu.Unlock()
	if f == nil {
		return h.UnimplementedHealthServer.Check(ctx, r)
	}
	return f(ctx, r)
}

func (h *healthServer) Watch(r *healthpb.HealthCheckRequest, s healthpb.Health_WatchServer) error {
	if h.watch == nil {
		return h.UnimplementedHealthServer.Watch(r, s)
	}
	return h.watch(r, s)
}

func (h *healthServer) answer(st healthpb.HealthCheckResponse_ServingStatus, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.check = func(context.Context, *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
		return &healthpb.HealthCheckResponse{Status: st}, err
	}
}

// serve runs a grpc-go server with a health service of the test's, none if h is nil.
func serve(t testing.TB, h healthpb.HealthServer) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	if h != nil {
		healthpb.RegisterHealthServer(srv, h)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
	t.Cleanup(func() {
		srv.Stop()
		<-done
	})
	return l.Addr().String()
}

func TestCheckOnlyServer(t *testing.T) {
	wiretest.CheckLeaks(t)
	h := new(healthServer)
	h.answer(isServing, nil)
	a := active(t, &Active{Interval: 20 * ms, Timeout: 10 * ms * 1000}, new(GRPC))
	s := attend(t, a, serve(t, h)).State
	eventually(t, "healthy", s.Usable)
	for _, bad := range []struct {
		status healthpb.HealthCheckResponse_ServingStatus
		err    error
		text   string
	}{
		{notServes, nil, "NOT_SERVING"},
		{healthpb.HealthCheckResponse_UNKNOWN, nil, "the server says UNKNOWN"},
		{healthpb.HealthCheckResponse_SERVICE_UNKNOWN, nil, "SERVICE_UNKNOWN"},
		{0, grpcstatus.Error(codes.NotFound, "what?"), "does not know the service"},
		{0, grpcstatus.Error(codes.Unavailable, "overloaded"), "UNAVAILABLE: overloaded"},
		{0, grpcstatus.Error(codes.Unauthenticated, "who are you?"), "UNAUTHENTICATED: who are you?"},
	} {
		h.answer(bad.status, bad.err)
		eventually(t, "unhealthy by "+bad.text, func() bool { return s.Has(upstream.Unhealthy) })
		if text := s.Status().Text; !strings.Contains(text, bad.text) {
			t.Errorf("text %q, want %q in it", text, bad.text)
		}
		h.answer(isServing, nil)
		eventually(t, "healthy again", s.Usable)
	}
}

// A server without the health service is healthy (gRFC A17), unless configured otherwise.
func TestUnimplemented(t *testing.T) {
	addr := serve(t, nil)
	for _, mode := range []string{ModeAuto, ModeWatch, ModeCheck} {
		t.Run(mode, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			s := attend(t, active(t, &Active{Interval: 20 * ms, Timeout: 5 * testSecond}, &GRPC{Mode: mode}), addr).State
			eventually(t, "healthy", s.Usable)

			s = attend(t, active(t, &Active{Interval: 20 * ms, Timeout: 5 * testSecond}, &GRPC{Mode: mode, Unimplemented: UnimplementedUnhealthy}), addr).State
			eventually(t, "unhealthy", func() bool { return s.Has(upstream.Unhealthy) })
			if text := s.Status().Text; !strings.Contains(text, "no health service") {
				t.Errorf("text %q", text)
			}
		})
	}
}

// Calls of a service leave an endpoint where it is not serving or unknown; others stay.
func TestServices(t *testing.T) {
	for _, mode := range []string{ModeAuto, ModeWatch, ModeCheck} {
		t.Run(mode, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			b := backendtest.Start(t, backendtest.Options{})
			b.Health.SetServingStatus("pkg.A", isServing)
			a := active(t, &Active{Interval: 20 * ms, Timeout: 10 * testSecond}, &GRPC{Mode: mode, Services: []string{"pkg.A", "pkg.B"}})
			s := attend(t, a, b.Addr()).State
			eventually(t, "usable", s.Usable)
			is := func(a, b bool) {
				t.Helper()
				if s.UsableFor("pkg.A") != a || s.UsableFor("pkg.B") != b || !s.UsableFor("pkg.Other") || s.Status().Condition != upstream.ConditionHealthy {
					t.Errorf("usable for pkg.A %v, pkg.B %v, another %v; %+v", s.UsableFor("pkg.A"), s.UsableFor("pkg.B"), s.UsableFor("pkg.Other"), s.Status())
				}
			}
			is(true, false) // pkg.B is unknown
			b.Health.SetServingStatus("pkg.B", isServing)
			eventually(t, "pkg.B is being served", func() bool { return s.UsableFor("pkg.B") })
			is(true, true)
			b.Health.SetServingStatus("pkg.A", notServes)
			eventually(t, "pkg.A is not being served", func() bool { return !s.UsableFor("pkg.A") })
			is(false, true)
			b.Health.SetServingStatus("", notServes)
			eventually(t, "unhealthy as a whole", func() bool { return s.Has(upstream.Unhealthy) })
			if s.UsableFor("pkg.B") || s.UsableFor("pkg.Other") {
				t.Error("usable for some service")
			}
		})
	}
}

// A server that is to be asked about services need not know the empty name.
func TestServicesOnly(t *testing.T) {
	for _, mode := range []string{ModeAuto, ModeWatch, ModeCheck} {
		t.Run(mode, func(t *testing.T) {
			h := &healthServer{}
			h.check = func(_ context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
				if r.Service != "pkg.A" {
					return nil, grpcstatus.Error(codes.NotFound, "what?")
				}
				return &healthpb.HealthCheckResponse{Status: isServing}, nil
			}
			h.watch = func(r *healthpb.HealthCheckRequest, s healthpb.Health_WatchServer) error {
				st := isServing
				if r.Service != "pkg.A" {
					st = healthpb.HealthCheckResponse_SERVICE_UNKNOWN
				}
				_ = s.Send(&healthpb.HealthCheckResponse{Status: st})
				<-s.Context().Done()
				return s.Context().Err()
			}
			addr := serve(t, h)
			settings := func() *Active { return &Active{Interval: 50 * ms, Timeout: 10 * testSecond, Fails: 1} }
			s := attend(t, active(t, settings(), &GRPC{Mode: mode, Services: []string{"pkg.A", "pkg.B"}}), addr).State
			eventually(t, "usable", s.Usable)
			if !s.UsableFor("pkg.A") || s.UsableFor("pkg.B") {
				t.Errorf("usable for pkg.A %v, pkg.B %v", s.UsableFor("pkg.A"), s.UsableFor("pkg.B"))
			}
			s = attend(t, active(t, settings(), &GRPC{Mode: mode}), addr).State
			eventually(t, "unhealthy, with no service named", func() bool { return s.Has(upstream.Unhealthy) })
		})
	}
}

// A probe that hangs is no answer, and the calls of a frozen server do not keep it in.
func TestHangingProbe(t *testing.T) {
	h := new(healthServer)
	h.answer(isServing, nil)
	a := active(t, &Active{Interval: 50 * ms, Timeout: 300 * ms}, &GRPC{Mode: ModeCheck})
	s := attend(t, a, serve(t, h)).State
	eventually(t, "healthy", s.Usable)
	h.mu.Lock()
	h.check = func(ctx context.Context, _ *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	h.mu.Unlock()
	eventually(t, "unhealthy", func() bool { return s.Has(upstream.Unhealthy) })
	if st := s.Status(); !strings.Contains(st.Text, "300ms") && !strings.Contains(st.Text, "DEADLINE_EXCEEDED") {
		t.Errorf("text %q", st.Text)
	}
	h.answer(isServing, nil)
	eventually(t, "healthy again", s.Usable)
}

// A Watch that is accepted and never answered does not keep the endpoint waiting in auto mode, and is no answer in the
// other.
func TestHangingWatch(t *testing.T) {
	wiretest.CheckLeaks(t)
	h := &healthServer{watch: func(_ *healthpb.HealthCheckRequest, s healthpb.Health_WatchServer) error {
		<-s.Context().Done()
		return s.Context().Err()
	}}
	h.answer(isServing, nil)
	addr := serve(t, h)
	s := attend(t, active(t, &Active{Interval: 50 * ms, Timeout: 300 * ms}, &GRPC{}), addr).State
	eventually(t, "healthy", s.Usable)
	s = attend(t, active(t, &Active{Interval: 50 * ms, Timeout: 300 * ms}, &GRPC{Mode: ModeWatch}), addr).State
	eventually(t, "unhealthy", func() bool { return s.Has(upstream.Unhealthy) })
}

// What a probe looks like to the server.
func TestProbeOnTheWire(t *testing.T) {
	type seen struct {
		md      metadata.MD
		service string
		left    time.Duration
	}
	got := make(chan seen, 16)
	h := new(healthServer)
	h.check = func(ctx context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		d, _ := ctx.Deadline()
		select {
		case got <- seen{md, r.Service, time.Until(d)}:
		default:
		}
		return &healthpb.HealthCheckResponse{Status: isServing}, nil
	}
	g := &GRPC{Mode: ModeCheck, Services: []string{"pkg.S"}, Authority: "health.example", Headers: http.Header{"X-Token": {"secret"}}}
	a := active(t, &Active{Interval: hour, Timeout: 20 * testSecond}, g)
	s := attend(t, a, serve(t, h)).State
	eventually(t, "healthy", s.Usable)
	q := <-got
	if q.service == "" {
		q = <-got
	}
	if q.service != "pkg.S" || q.left <= 0 || q.left > 20*time.Second {
		t.Errorf("service %q, %v left", q.service, q.left)
	}
	for key, want := range map[string]string{":authority": "health.example", "user-agent": DefaultUserAgent, "x-token": "secret"} {
		if v := q.md.Get(key); len(v) != 1 || v[0] != want {
			t.Errorf("%s is %q, want %q", key, v, want)
		}
	}
}

// Checks travel on the connections of the calls, or on the port they are told.
func TestConnections(t *testing.T) {
	traffic, other := backendtest.Start(t, backendtest.Options{}), backendtest.Start(t, backendtest.Options{})
	end := attend(t, active(t, &Active{Interval: 10 * ms, Timeout: 5 * testSecond}, new(GRPC)), traffic.Addr())
	eventually(t, "healthy", end.State.Usable)
	if end.Conns() != 1 || traffic.Accepted() != 1 {
		t.Errorf("%d connections in the pool, %d accepted", end.Conns(), traffic.Accepted())
	}
	other.Health.SetServingStatus("", notServes)
	_, port, _ := net.SplitHostPort(other.Addr())
	n, err := net.LookupPort("tcp", port)
	if err != nil {
		t.Fatal(err)
	}
	s := attend(t, active(t, &Active{Port: n, Interval: 10 * ms, Timeout: 5 * testSecond}, new(GRPC)), traffic.Addr()).State
	eventually(t, "unhealthy by the other port", func() bool { return strings.Contains(s.Status().Text, "NOT_SERVING") })
}

// An endpoint whose streams are all taken by calls is not ill.
func TestBusyEndpoint(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{MaxConcurrentStreams: 1})
	a := active(t, &Active{Interval: 20 * ms, Timeout: 10 * testSecond, Fails: 1}, &GRPC{Mode: ModeCheck})
	addrs, _, err := upstream.Parse(b.Addr())
	if err != nil {
		t.Fatal(err)
	}
	end := transport.NewEndpoint(addrs[0], transport.Config{MaxConns: 1})
	t.Cleanup(func() { _ = end.Destruct() })
	state := new(upstream.State)
	defer end.Attach(state)()
	info := &upstream.Endpoint{Network: "tcp", Address: b.Addr(), State: state}
	watch, err := rpc.Begin(t.Context(), func(fields []h2.Field, recv h2.Receiver) (*h2.Stream, error) { // holds the only stream
		s, err := end.OpenWait(t.Context(), fields, false, recv)
		if err != nil {
			return nil, err
		}
		return s, nil
	}, &rpc.Request{Scheme: "http", Authority: "x", Path: "/grpc.health.v1.Health/Watch", MaxAnswer: maxMessage})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Close()
	defer a.Attend(info, end)()
	healthy := func() bool { return state.UsableExcept(upstream.NoRoom) }
	eventually(t, "healthy", healthy)
	for range 5 {
		before := b.Calls()["/grpc.health.v1.Health/Check"]
		eventually(t, "another check", func() bool { return b.Calls()["/grpc.health.v1.Health/Check"] > before })
	}
	if !healthy() {
		t.Errorf("a busy endpoint is %+v", state.Status())
	}
}

// The timeout is for the first message of a Watch, not for the stream.
func TestWatchOutlastsTimeout(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	s := attend(t, active(t, &Active{Interval: 50 * ms, Timeout: testSecond}, new(GRPC)), b.Addr()).State
	eventually(t, "healthy", s.Usable)
	eventually(t, "checks for longer than the timeout", func() bool { return b.Calls()["/grpc.health.v1.Health/Check"] > 70 })
	if n := b.Calls()["/grpc.health.v1.Health/Watch"]; n != 1 {
		t.Errorf("watched %d times", n)
	}
}
