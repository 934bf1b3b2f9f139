// Package backendtest runs real grpc-go servers for tests and benchmarks. Each serves grpc.testing.TestService (what
// grpc-go's interop client and server speak), health and reflection, records the calls that come, and can be told per
// call, through request metadata, how to answer: see the keys in script.go, from [KeyStatus] on.
//
// [Start] is for tests, [New] for everything else.
package backendtest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/reflection"
)

// Service is the name of the service that is served besides health and reflection.
const Service = "grpc.testing.TestService"

// Options say how a backend is run. The zero value is a plaintext backend on a free port of 127.0.0.1.
type Options struct {
	// Name is what the backend calls itself in the header and trailer field [KeyBackend]. Default: its address.
	Name string
	// Addr is the address to listen on, for a backend that comes back on the port of an earlier one.
	// Default: 127.0.0.1:0.
	Addr string
	// Unix is the path of a socket to listen on instead.
	Unix string
	// TLS makes the backend speak TLS only. ClientCAs makes it demand a client's certificate from them besides.
	TLS       *tls.Config
	ClientCAs *x509.CertPool
	// MaxConcurrentStreams is announced in SETTINGS; 0 is grpc-go's default, no limit.
	MaxConcurrentStreams uint32
	// ServerOptions are passed to grpc.NewServer, after those above.
	ServerOptions []grpc.ServerOption
	// Register adds further services.
	Register func(*grpc.Server)
	// Delay is how long every call of the service waits before it is answered.
	Delay time.Duration
	// Hook is called with each call of the service before it is answered, and before what the call's metadata asks
	// for. An error ends the call. Header and trailer metadata can be set through the call's context.
	Hook func(c *Call) error
	// NoRecord keeps no more of calls than their number, for benchmarks.
	NoRecord bool
}

// Backend is a running server.
type Backend struct {
	// Health is the health service's state. The server as a whole ("") and [Service] are SERVING at first.
	Health *health.Server

	opts      Options
	name      string
	server    *grpc.Server
	conns     *connListener
	served    chan struct{} // The server's Serve has returned.
	stop      sync.Once
	recorder  recorder
	cancelled chan Cancellation
}

// Start runs a backend until the end of the test.
func Start(t testing.TB, o Options) *Backend {
	t.Helper()
	b, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	return b
}

// New runs a backend until one of its Stop methods is called.
func New(o Options) (*Backend, error) {
	network, addr := "tcp", "127.0.0.1:0"
	switch {
	case o.Unix != "" && o.Addr != "":
		return nil, errors.New("starting a backend: both a socket and an address are given")
	case o.ClientCAs != nil && o.TLS == nil:
		return nil, errors.New("starting a backend: client certificates need TLS")
	case o.Unix != "":
		network, addr = "unix", o.Unix
	case o.Addr != "":
		addr = o.Addr
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), network, addr)
	if err != nil {
		return nil, fmt.Errorf("starting a backend: %w", err)
	}
	b := &Backend{
		Health: health.NewServer(), opts: o, name: o.Name, conns: newConnListener(l), served: make(chan struct{}),
		cancelled: make(chan Cancellation, 1024),
	}
	if b.name == "" {
		b.name = b.Addr()
	}
	b.server = grpc.NewServer(b.serverOptions()...)
	testpb.RegisterTestServiceServer(b.server, &service{name: b.name})
	healthpb.RegisterHealthServer(b.server, b.Health)
	reflection.Register(b.server)
	if o.Register != nil {
		o.Register(b.server)
	}
	b.Health.SetServingStatus(Service, healthpb.HealthCheckResponse_SERVING)
	b.recorder.init(b.server.GetServiceInfo())
	go func() {
		defer close(b.served)
		_ = b.server.Serve(b.conns) // Ends by Stop, or with the listener.
	}()
	return b, nil
}

func (b *Backend) serverOptions() []grpc.ServerOption {
	opts := []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(b.unary),
		grpc.ChainStreamInterceptor(b.stream),
		grpc.MaxRecvMsgSize(1 << 30),
		grpc.WaitForHandlers(true),
	}
	if cfg := b.opts.TLS; cfg != nil {
		if b.opts.ClientCAs != nil {
			cfg = cfg.Clone()
			cfg.ClientAuth = tls.RequireAndVerifyClientCert
			cfg.ClientCAs = b.opts.ClientCAs
		}
		opts = append(opts, grpc.Creds(credentials.NewTLS(cfg)))
	}
	if n := b.opts.MaxConcurrentStreams; n > 0 {
		opts = append(opts, grpc.MaxConcurrentStreams(n))
	}
	return append(opts, b.opts.ServerOptions...)
}

// Name is the backend's name.
func (b *Backend) Name() string { return b.name }

// Addr is the address as an upstream is written: host:port, or unix/ and the path of the socket.
func (b *Backend) Addr() string {
	a := b.conns.Addr()
	if a.Network() == "unix" {
		return "unix/" + a.String()
	}
	return a.String()
}

// Target is the address as a target for grpc.NewClient.
func (b *Backend) Target() string {
	if path, ok := strings.CutPrefix(b.Addr(), "unix/"); ok {
		return "unix:" + path
	}
	return "passthrough:///" + b.Addr()
}

// Accepted is the number of connections that were ever accepted, Open of those not closed yet.
func (b *Backend) Accepted() int { return b.conns.count() }

// Open is the number of connections that are open.
func (b *Backend) Open() int { return len(b.conns.open()) }

// CloseConns closes all connections without a word; the backend goes on listening.
func (b *Backend) CloseConns() {
	for _, nc := range b.conns.open() {
		_ = nc.Close()
	}
}

// Stop closes the listener and all connections and cancels all calls. It returns when the last of them has ended (a Hook
// must heed its call's context). It may be called more than once.
func (b *Backend) Stop() {
	b.stop.Do(func() {
		b.Health.Shutdown()
		b.server.Stop()
	})
	<-b.served
}

// GracefulStop reports NOT_SERVING, closes the listener, sends GOAWAY, lets calls run to their end, and then stops. Calls
// that have not ended at the deadline of ctx are ended; health's Watch is one that never ends by itself.
func (b *Backend) GracefulStop(ctx context.Context) {
	b.Health.Shutdown()
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.server.GracefulStop()
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
	b.Stop()
	<-done
}
