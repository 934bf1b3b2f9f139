package orca_test

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v3orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	v3orcaservice "github.com/cncf/xds/go/xds/service/orca/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	grpcorca "google.golang.org/grpc/orca"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/orca"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// serve starts a gRPC server on the address, any if empty.
func serve(t *testing.T, addr string, register func(*grpc.Server)) (*grpc.Server, string) {
	t.Helper()
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	var l net.Listener
	var err error
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) { // the port of a server that was just stopped
		if l, err = net.Listen("tcp", addr); err == nil || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	register(s)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return s, l.Addr().String()
}

// watch asks the server for reports until the test ends.
func watch(t *testing.T, addr string, interval time.Duration, log *zap.Logger) (*transport.Endpoint, <-chan orca.Load) {
	t.Helper()
	e := transport.NewEndpoint(upstream.Address{Network: "tcp", Dial: addr}, transport.Config{})
	ctx, cancel := context.WithCancel(context.Background())
	loads := make(chan orca.Load)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s := orca.Stream{
			Endpoint: e, Authority: "backend.example.com", Interval: interval, Logger: log,
			Receive: func(report []byte) {
				var m orca.Metrics
				l, err := m.Read(report)
				if err != nil {
					t.Errorf("report %x: %v", report, err)
				}
				select {
				case loads <- l:
				case <-ctx.Done():
				}
			},
		}
		s.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		if err := e.Destruct(); err != nil {
			t.Error(err)
		}
	})
	return e, loads
}

func next[T any](t *testing.T, what string, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatalf("no %s in time", what)
		panic("unreachable")
	}
}

// The service of grpc-go, as servers register it.
func TestStreamFromServer(t *testing.T) {
	wiretest.CheckLeaks(t)
	metrics := grpcorca.NewServerMetricsRecorder()
	metrics.SetCPUUtilization(0.25)
	metrics.SetQPS(50)
	metrics.SetEPS(2)
	register := func(s *grpc.Server) {
		if err := grpcorca.Register(s, grpcorca.ServiceOptions{ServerMetricsProvider: metrics}); err != nil {
			t.Fatal(err)
		}
	}
	server, addr := serve(t, "", register)
	_, loads := watch(t, addr, time.Second, nil)
	if got, want := next(t, "report", loads), (orca.Load{Utilization: 0.25, QPS: 50, EPS: 2}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	// It restarts. It closes in good order, which our stream must not hold up: the server would wait for it for ever.
	stopped := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(stopped)
	}()
	next(t, "end of the server", stopped)
	metrics.SetApplicationUtilization(0.75)
	serve(t, addr, register)
	if got := next(t, "report of the new server", loads); got.Utilization != 0.75 {
		t.Errorf("%+v, want utilization 0.75", got)
	}
}

// service is one of the test's own.
type service struct {
	v3orcaservice.UnimplementedOpenRcaServiceServer
	asked chan *asked
}

type asked struct {
	*v3orcaservice.OrcaLoadReportRequest
	header metadata.MD
	stream grpc.ServerStreamingServer[v3orcapb.OrcaLoadReport]
	answer chan error
}

func (s *service) StreamCoreMetrics(r *v3orcaservice.OrcaLoadReportRequest, stream v3orcaservice.OpenRcaService_StreamCoreMetricsServer) error {
	md, _ := metadata.FromIncomingContext(stream.Context())
	a := &asked{r, md, stream, make(chan error)}
	select {
	case s.asked <- a:
	case <-stream.Context().Done():
		return stream.Context().Err()
	}
	select {
	case err := <-a.answer:
		return err
	case <-stream.Context().Done():
		return stream.Context().Err()
	}
}

func TestStreamAsks(t *testing.T) {
	wiretest.CheckLeaks(t)
	svc := &service{asked: make(chan *asked)}
	_, addr := serve(t, "", func(s *grpc.Server) { v3orcaservice.RegisterOpenRcaServiceServer(s, svc) })
	_, loads := watch(t, addr, 90*time.Second+time.Millisecond, nil)
	a := next(t, "question", svc.asked)
	if got := a.ReportInterval.AsDuration(); got != 90*time.Second+time.Millisecond {
		t.Errorf("asked for reports each %v", got)
	}
	if got := a.header.Get(":authority"); !slices.Equal(got, []string{"backend.example.com"}) {
		t.Errorf("authority %q", got)
	}
	// Many reports, and some that are larger than what is read at once.
	for i := range 50 {
		r := &v3orcapb.OrcaLoadReport{CpuUtilization: float64(i + 1)}
		if i%7 == 0 {
			r.NamedMetrics = map[string]float64{strings.Repeat("x", 1000*i): 1}
		}
		if err := a.stream.Send(r); err != nil {
			t.Fatal(err)
		}
		if got := next(t, "report", loads); got.Utilization != float64(i+1) {
			t.Fatalf("report %d: %+v", i, got)
		}
	}
	// It is asked again after any other end than UNIMPLEMENTED, with or without an error.
	for _, err := range []error{status.Error(codes.Internal, "no"), nil} {
		a.answer <- err
		a = next(t, "question", svc.asked)
	}
	if err := a.stream.Send(&v3orcapb.OrcaLoadReport{CpuUtilization: 0.5}); err != nil {
		t.Fatal(err)
	}
	if got := next(t, "report", loads); got.Utilization != 0.5 {
		t.Errorf("%+v", got)
	}
}

// A server without the service is left alone, but the one that comes after it at the same address is asked.
func TestStreamUnimplemented(t *testing.T) {
	wiretest.CheckLeaks(t)
	core, logs := observer.New(zap.ErrorLevel)
	var questions atomic.Int32
	server, addr := serve(t, "", func(s *grpc.Server) {
		v3orcaservice.RegisterOpenRcaServiceServer(s, unimplemented{count: &questions})
	})
	e, loads := watch(t, addr, time.Second, zap.New(core))
	for end := time.Now().Add(patience); logs.Len() == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it is not said that the service is missing")
		}
	}
	server.Stop()
	if n := questions.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	metrics := grpcorca.NewServerMetricsRecorder()
	metrics.SetCPUUtilization(0.5)
	serve(t, addr, func(s *grpc.Server) {
		if err := grpcorca.Register(s, grpcorca.ServiceOptions{ServerMetricsProvider: metrics}); err != nil {
			t.Fatal(err)
		}
	})
	connect(t, e) // as a call does: nobody is asked on a connection that nobody needs
	if got := next(t, "report", loads); got.Utilization != 0.5 {
		t.Errorf("%+v", got)
	}
	if logs.Len() != 1 {
		t.Errorf("%d lines were logged: %v", logs.Len(), logs.All())
	}
}

type unimplemented struct {
	v3orcaservice.UnimplementedOpenRcaServiceServer
	count *atomic.Int32
}

func (u unimplemented) StreamCoreMetrics(*v3orcaservice.OrcaLoadReportRequest, v3orcaservice.OpenRcaService_StreamCoreMetricsServer) error {
	u.count.Add(1)
	return status.Error(codes.Unimplemented, "")
}

// connect makes the endpoint connect, as a call does.
func connect(t *testing.T, e *transport.Endpoint) {
	t.Helper()
	for end := time.Now().Add(patience); e.Conns() == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no connection")
		}
		s, err := e.OpenWait(t.Context(), []h2.Field{
			{Name: ":method", Value: "POST"},
			{Name: ":scheme", Value: "http"},
			{Name: ":path", Value: "/x.Y/Z"},
			{Name: ":authority", Value: "x"},
			{Name: "te", Value: "trailers"},
			{Name: "content-type", Value: "application/grpc"},
		}, true, h2.NewBlocking())
		if err == nil {
			s.Reset(h2.Cancel)
			s.Conn().Flush()
		}
	}
}

// A server that ends its connections when they are some time old is asked on the next one at once, whether it has reported
// by then or not.
func TestStreamConnectionAge(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	svc := &service{asked: make(chan *asked)}
	server := grpc.NewServer(grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 200 * time.Millisecond}))
	v3orcaservice.RegisterOpenRcaServiceServer(server, svc)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	watch(t, l.Addr().String(), time.Hour, nil)
	began := time.Now()
	for range 4 {
		next(t, "question", svc.asked)
	}
	if d := time.Since(began); d > 5*time.Second { // with pauses it were more than 6
		t.Errorf("it was asked four times within %v", d)
	}
}

// What is no answer to the question is told from one that cannot be read, and neither stops the asking.
func TestStreamBadAnswers(t *testing.T) {
	wiretest.CheckLeaks(t)
	core, logs := observer.New(zap.DebugLevel)
	svc := &service{asked: make(chan *asked)}
	_, addr := serve(t, "", func(s *grpc.Server) { v3orcaservice.RegisterOpenRcaServiceServer(s, svc) })
	_, loads := watch(t, addr, time.Second, zap.New(core))
	a := next(t, "question", svc.asked)
	large := &v3orcapb.OrcaLoadReport{NamedMetrics: map[string]float64{strings.Repeat("x", 2<<20): 1}}
	if err := a.stream.Send(large); err != nil {
		t.Fatal(err)
	}
	a = next(t, "question", svc.asked)
	if err := a.stream.Send(&v3orcapb.OrcaLoadReport{CpuUtilization: 0.5}); err != nil {
		t.Fatal(err)
	}
	if got := next(t, "report", loads); got.Utilization != 0.5 {
		t.Errorf("%+v", got)
	}
	if n := logs.FilterMessage("stream of load reports ended").Len(); n != 1 {
		t.Errorf("%d lines say why it was asked again: %v", n, logs.All())
	}
}
