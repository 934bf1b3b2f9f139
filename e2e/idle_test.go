package e2e

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"google.golang.org/grpc/credentials"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestIdleTimeouts: Caddy cuts a request whose body is silent, or whose client takes nothing, for a minute. Here it is a
// second; streams that are silent for three live on, and so does one whose client stops reading for as long.
func TestIdleTimeouts(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 3 s")
	}
	wiretest.CheckLeaks(t)
	const pause = 3 * time.Second
	b := backendtest.Start(t, backendtest.Options{})
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	p := proxytest.Start(t, proxytest.Options{
		Site: "grpc_proxy " + b.Addr(), CertFile: cert, KeyFile: key,
		Servers: "timeouts {\n\tread_body_idle 1s\n\twrite_idle 1s\n}",
	})
	window := &quic.Config{InitialStreamReceiveWindow: 64 << 10, MaxStreamReceiveWindow: 64 << 10}
	fronts := map[string]opener{
		"h2c": openGRPC(dial(t, p.H2C, nil, small...)),
		"tls": openGRPC(dial(t, p.TLS, credentials.NewTLS(ca.ClientConfig()), small...)),
		"h3":  dialH3(t, p.TLS, ca.ClientConfig(), window).Open,
	}
	ctx := within(t, pause+2*timeout)
	var ready, wg sync.WaitGroup
	resume := make(chan struct{})
	run := func(what string, f func(wait func()) error) {
		ready.Add(1)
		wg.Go(func() {
			waited := false
			wait := func() {
				waited = true
				ready.Done()
				<-resume
			}
			if err := f(wait); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if !waited {
				ready.Done()
			}
		})
	}
	for front, open := range fronts {
		run(front+", silent", func(wait func()) error { return silent(ctx, open, wait) })
		run(front+", slow reader", func(wait func()) error { return slowReader(ctx, open, wait) })
		// Its answer waits until the client's last words, which come late.
		run(front+", slow writer", func(wait func()) error { return slowWriter(ctx, open, wait) })
	}
	ready.Wait()
	<-time.After(pause)
	close(resume)
	wg.Wait()
}

func silent(ctx context.Context, open opener, wait func()) error {
	k := kinds[3]
	s, err := open(ctx, k)
	if err != nil {
		return err
	}
	for i := range 2 {
		if i > 0 {
			wait()
		}
		if err := s.Send(k.requests()[2]); err != nil {
			return err
		}
		if _, err := recv(s, k, nil); err != nil {
			return err
		}
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	_, err = recv(s, k, nil)
	return ended(err)
}

func slowReader(ctx context.Context, open opener, wait func()) error {
	k := kinds[2]
	s, err := open(ctx, k)
	if err != nil {
		return err
	}
	req := new(testgrpc.StreamingOutputCallRequest)
	for range 40 {
		req.ResponseParameters = append(req.ResponseParameters, &testgrpc.ResponseParameters{Size: 50_000})
	}
	if err := s.Send(req); err != nil {
		return err
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	for n := 0; ; n++ {
		if n == 1 {
			wait()
		}
		if _, err := recv(s, k, nil); err != nil {
			if n != 40 && ended(err) == nil {
				return context.Canceled
			}
			return ended(err)
		}
	}
}

func slowWriter(ctx context.Context, open opener, wait func()) error {
	k := kinds[1]
	s, err := open(ctx, k)
	if err != nil {
		return err
	}
	for i, m := range k.requests() {
		if i == 3 {
			wait()
		}
		if err := s.Send(m); err != nil {
			return err
		}
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	_, err = recv(s, k, nil)
	return ended(err)
}
