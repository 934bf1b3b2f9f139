// Command server is the smallest proxy there can be on the call core: client connections that package h2 reads, straight into package
// proxy, round robin or whatever the default policy is to the backends. It has no configuration, no routes and no Caddy, and shows
// what the core costs by itself.
//
//	go build -o /tmp/core ./bench/core/server
//	/tmp/core 127.0.0.1:8443 127.0.0.1:50051 127.0.0.1:50052
//
// With CERT and KEY (files of PEM) in the environment clients are served TLS.
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	_ "net/http/pprof" // PPROF=address serves profiles
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/healthcheck"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/direct"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: server LISTEN BACKEND…")
		os.Exit(2)
	}
	fmt.Fprintln(os.Stderr, "server:", serve(os.Args[1], os.Args[2:]))
	os.Exit(1)
}

// counter is the observer: it counts calls by what they came to.
type counter struct{ ok, failed atomic.Int64 }

// Over implements proxy.Observer.
func (c *counter) Over(over *call.Call) {
	if over.Result.Code == 0 {
		c.ok.Add(1)
	} else {
		c.failed.Add(1)
	}
}

// serve serves until it cannot any more, and returns why.
func serve(listen string, backends []string) error {
	if addr := os.Getenv("PPROF"); addr != "" {
		runtime.SetMutexProfileFraction(100)
		go func() { _ = http.ListenAndServe(addr, nil) }()
	}
	p, err := newProxy(backends)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	cfg, err := tlsConfig()
	if err != nil {
		return err
	}
	h := &direct.Handler{Proxy: p}
	for {
		nc, err := l.Accept()
		if err != nil {
			return err
		}
		go serveConn(h, nc, cfg)
	}
}

func newProxy(backends []string) (*proxy.Proxy, error) {
	logger := zap.NewNop()
	health := new(healthcheck.Config) // observes attempts as the handler's does
	ctx, _ := caddy.NewContext(caddy.Context{Context: context.Background()})
	if err := health.Provision(ctx); err != nil {
		return nil, err
	}
	var endpoints []upstream.Endpoint
	for _, b := range backends {
		endpoints = append(endpoints, upstream.Endpoint{Network: "tcp", Address: b, Origin: "static"})
	}
	c, err := cluster.New(cluster.Config{
		Static:    endpoints,
		Policy:    selection.WithPriorities(new(selection.LeastRequest)),
		Transport: func(*upstream.Endpoint) transport.Config { return transport.Config{Logger: logger} },
		Cut:       func(*transport.Endpoint) int { return 0 },
		Logger:    logger,
	})
	if err != nil {
		return nil, err
	}
	c.Start()
	return proxy.New(proxy.Config{Cluster: c, Health: health, Observers: []proxy.Observer{new(counter)}, CancelBudget: 100, CancelWindow: 30 * time.Second}), nil
}

func tlsConfig() (*tls.Config, error) {
	cert, key := os.Getenv("CERT"), os.Getenv("KEY")
	if cert == "" {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12}, nil
}

func serveConn(h *direct.Handler, nc net.Conn, cfg *tls.Config) {
	if cfg != nil {
		tc := tls.Server(nc, cfg)
		if err := tc.Handshake(); err != nil {
			nc.Close()
			return
		}
		nc = tc
	}
	h.Serve(nc, h2.Config{MaxStreams: 1000})
}
