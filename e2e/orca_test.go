package e2e

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/orca"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// costly is a backend whose every call costs a part of what it can do. It reports its load with each call.
type costly struct {
	*backendtest.Backend
	cost  float64 // of a call, in seconds of the one processor that it has
	calls atomic.Int64
	rate  atomic.Int64 // calls per second, over the last tenth
}

func (c *costly) utilization() float64 { return float64(c.rate.Load()) * c.cost }

func startCostly(t *testing.T, cost float64) *costly {
	t.Helper()
	c := &costly{cost: cost}
	c.Backend = backendtest.Start(t, backendtest.Options{ServerOptions: []grpc.ServerOption{
		orca.CallMetricsServerOption(nil),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			c.calls.Add(1)
			r := orca.CallMetricsRecorderFromContext(ctx)
			r.SetApplicationUtilization(c.utilization())
			r.SetQPS(float64(c.rate.Load()))
			return h(ctx, req)
		}),
	}})
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	go func() {
		const every = 100 * time.Millisecond
		tick := time.NewTicker(every)
		defer tick.Stop()
		last := int64(0)
		for {
			select {
			case <-tick.C:
				n := c.calls.Load()
				c.rate.Store((n - last) * int64(time.Second/every))
				last = n
			case <-done:
				return
			}
		}
	}()
	return c
}

// TestORCA: backends whose calls cost 1, 2 and 4 are used alike when each has what it can carry: 4, 2 and 1 of 7 calls.
func TestORCA(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	wiretest.CheckLeaks(t)
	backends := []*costly{startCostly(t, 0.0001), startCostly(t, 0.0002), startCostly(t, 0.0004)}
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + backends[0].Addr() + " " + backends[1].Addr() + " " + backends[2].Addr() +
		" {\n\tlb_policy orca {\n\t\tblackout_period 200ms\n\t\tweight_update_period 100ms\n\t}\n}"})
	load := startCallers(t, 8, client(t, p.H2C))
	var shares [3]float64
	eventually(t, "the load is even", func() bool {
		var before, n [3]int64
		for i, b := range backends {
			before[i] = b.calls.Load()
		}
		load.more(t, 2000)
		total := int64(0)
		for i, b := range backends {
			n[i] = b.calls.Load() - before[i]
			total += n[i]
		}
		ok := true
		for i, ideal := range [3]float64{4.0 / 7, 2.0 / 7, 1.0 / 7} {
			shares[i] = float64(n[i]) / float64(total)
			ok = ok && shares[i] > 0.9*ideal && shares[i] < 1.1*ideal
		}
		return ok
	})
	t.Logf("shares %.3f, utilization %.2f %.2f %.2f", shares, backends[0].utilization(), backends[1].utilization(), backends[2].utilization())
	for _, f := range load.stop() {
		t.Errorf("a call failed: %v", f.err)
	}
}

// TestORCAOutOfBand: reports on a stream of their own do the same.
func TestORCAOutOfBand(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	wiretest.CheckLeaks(t)
	var backends []*backendtest.Backend
	for _, util := range []float64{0.2, 0.8} {
		metrics := orca.NewServerMetricsRecorder()
		metrics.SetApplicationUtilization(util)
		metrics.SetQPS(100)
		b := backendtest.Start(t, backendtest.Options{Register: func(s *grpc.Server) {
			if err := orca.Register(s, orca.ServiceOptions{ServerMetricsProvider: metrics}); err != nil {
				t.Error(err)
			}
		}})
		backends = append(backends, b)
	}
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addrs(backends) +
		" {\n\tlb_policy orca {\n\t\tblackout_period 200ms\n\t\tweight_update_period 100ms\n\t\tenable_oob_load_report\n\t}\n}"})
	c := client(t, p.H2C)
	eventually(t, "the shares follow the reports", func() bool {
		got := spread(t, c, 500, 4, backends...)
		return got[0] > 360 && got[0] < 440 // 4 of 5
	})
}
