package selection_test

import (
	"context"
	"math"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer/leastrequest"
	"google.golang.org/grpc/balancer/weightedroundrobin"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	grpcmetadata "google.golang.org/grpc/metadata"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// counted is a gRPC server that counts the calls it gets, and holds those that ask for it until release is closed.
type counted struct {
	addr    string
	calls   atomic.Int64
	held    atomic.Int64
	release chan struct{}
}

const holdKey = "hold"

func newCounted(t *testing.T, metrics orca.ServerMetricsProvider) *counted {
	t.Helper()
	c := &counted{release: make(chan struct{})}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.addr = ln.Addr().String()
	server := grpc.NewServer(orca.CallMetricsServerOption(metrics), grpc.ChainUnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			if md, _ := grpcmetadata.FromIncomingContext(ctx); len(md.Get(holdKey)) > 0 {
				c.held.Add(1)
				select {
				case <-c.release:
				case <-ctx.Done():
				}
			} else {
				c.calls.Add(1)
			}
			orca.CallMetricsRecorderFromContext(ctx) // Without this, grpc-go reports nothing.
			return handler(ctx, req)
		}))
	healthgrpc.RegisterHealthServer(server, health.NewServer())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(ln)
	}()
	t.Cleanup(func() { server.Stop(); <-done })
	return c
}

// caller makes one call to one of the servers.
type caller func(ctx context.Context) error

// grpcCaller calls through a client whose own policy chooses.
func grpcCaller(t *testing.T, list []*counted, config string) caller {
	t.Helper()
	r := manual.NewBuilderWithScheme("agree")
	var state resolver.State
	for _, c := range list {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: c.addr}}})
	}
	r.InitialState(state)
	client := dialTo(t, "agree:///x", grpc.WithResolvers(r), grpc.WithDefaultServiceConfig(config))
	return func(ctx context.Context) error {
		_, err := client.Check(ctx, new(healthgrpc.HealthCheckRequest), grpc.WaitForReady(true))
		return err
	}
}

func dialTo(t *testing.T, target string, opts ...grpc.DialOption) healthgrpc.HealthClient {
	t.Helper()
	conn, err := grpc.NewClient(target, append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return healthgrpc.NewHealthClient(conn)
}

// ourCaller calls through our policy, telling it what the proxy would.
func ourCaller(t *testing.T, list []*counted, policy selection.Policy) caller {
	t.Helper()
	if p, ok := policy.(caddy.Provisioner); ok {
		if err := p.Provision(caddy.Context{}); err != nil {
			t.Fatal(err)
		}
	}
	s := new(upstream.Snapshot)
	var clients []healthgrpc.HealthClient
	for i, c := range list {
		s.Endpoints = append(s.Endpoints, upstream.Endpoint{Index: i, Address: c.addr, State: new(upstream.State)})
		clients = append(clients, dialTo(t, c.addr))
	}
	picker := policy.Build(s)
	return func(ctx context.Context) error {
		pick, ok := picker.Pick(selection.PickInfo{})
		if !ok {
			t.Error("nothing picked")
		}
		i := pick.Index
		state := s.Endpoints[i].State
		state.Begin()
		defer state.End()
		var trailer grpcmetadata.MD
		_, err := clients[i].Check(ctx, new(healthgrpc.HealthCheckRequest), grpc.Trailer(&trailer), grpc.WaitForReady(true))
		a := new(call.Attempt)
		if v := trailer.Get("endpoint-load-metrics-bin"); len(v) > 0 {
			a.LoadReport = []byte(v[0])
		}
		pick.Done(a)
		return err
	}
}

// distribution makes n calls, one after the other, and returns the part of them that each server got.
func distribution(ctx context.Context, t *testing.T, list []*counted, c caller, n int) []float64 {
	t.Helper()
	before := make([]int64, len(list))
	for i, s := range list {
		before[i] = s.calls.Load()
	}
	for range n {
		if err := c(ctx); err != nil {
			t.Fatal(err)
		}
	}
	parts := make([]float64, len(list))
	for i, s := range list {
		parts[i] = float64(s.calls.Load()-before[i]) / float64(n)
	}
	return parts
}

// off is the largest difference between two distributions.
func off(a, b []float64) float64 {
	d := 0.0
	for i := range a {
		d = max(d, math.Abs(a[i]-b[i]))
	}
	return d
}

// grpc-go's weighted_round_robin and our orca give servers that report the same load the same parts, those of gRFC A58's
// formula.
func TestORCAAgreesWithGRPC(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	var list []*counted
	var want []float64
	sum := 0.0
	for _, load := range []struct{ cpu, application, qps, eps float64 }{
		{0.5, 0, 100, 0}, {0.9, 0, 100, 0}, {0.2, 0.4, 300, 0}, {0.5, 0, 100, 25}, {1.5, 0, 20, 0},
	} {
		m := orca.NewServerMetricsRecorder()
		m.SetCPUUtilization(load.cpu)
		m.SetQPS(load.qps)
		m.SetEPS(load.eps)
		used := load.cpu
		if load.application > 0 {
			m.SetApplicationUtilization(load.application)
			used = load.application
		}
		list = append(list, newCounted(t, m))
		w := load.qps / (used + load.eps/load.qps)
		want = append(want, w)
		sum += w
	}
	for i := range want {
		want[i] /= sum
	}
	for name, c := range map[string]caller{
		"grpc-go": grpcCaller(t, list, `{"loadBalancingConfig":[{"`+weightedroundrobin.Name+`":{"blackoutPeriod":"0s","weightUpdatePeriod":"0.1s"}}]}`),
		"ours":    ourCaller(t, list, &selection.ORCA{BlackoutPeriod: -1, WeightUpdatePeriod: caddy.Duration(100 * time.Millisecond)}),
	} {
		// It takes a report of each and an update of the weights.
		parts := distribution(ctx, t, list, c, 500)
		for off(parts, want) > 0.02 && ctx.Err() == nil {
			parts = distribution(ctx, t, list, c, 500)
		}
		parts = distribution(ctx, t, list, c, 2000)
		if d := off(parts, want); d > 0.01 {
			t.Errorf("%s: parts %.3f, want %.3f", name, parts, want)
		}
	}
}

// Of three servers of which one is busy, grpc-go's least_request_experimental sends that one the calls for which it alone is
// drawn. Ours looks at all of them, and sends it none.
func TestLeastRequestAgreesWithGRPC(t *testing.T) {
	for _, choices := range []int{2, 3} {
		for _, ours := range []bool{false, true} {
			ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
			defer cancel()
			var list []*counted
			for range 3 {
				list = append(list, newCounted(t, orca.NewServerMetricsRecorder()))
			}
			name, busy := "grpc-go", math.Pow(1./3, float64(choices))
			c := grpcCaller(t, list, `{"loadBalancingConfig":[{"`+leastrequest.Name+`":{"choiceCount":`+strconv.Itoa(choices)+`}}]}`)
			if ours {
				name, busy = "ours", 0
				c = ourCaller(t, list, &selection.LeastRequest{ChoiceCount: choices})
			}
			parts := busyDistribution(ctx, t, list, c)
			want := []float64{busy, (1 - busy) / 2, (1 - busy) / 2}
			for j, p := range want {
				if math.Abs(parts[j]-p) > 6.5*math.Sqrt(p*(1-p)/busyCalls) {
					t.Errorf("%d choices, %s: parts %.3f, want %.3f", choices, name, parts, want)
					break
				}
			}
		}
	}
}

const busyCalls = 1500

// busyDistribution makes calls while the first server, and only that, has calls that do not end.
func busyDistribution(ctx context.Context, t *testing.T, list []*counted, c caller) []float64 {
	t.Helper()
	distribution(ctx, t, list, c, 100) // connects to all
	hold := grpcmetadata.AppendToOutgoingContext(ctx, holdKey, "yes")
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(list[0].release)
	var ended, begun atomic.Int64
	for list[0].held.Load() == 0 || list[1].held.Load() == 0 || list[2].held.Load() == 0 {
		n := begun.Add(1)
		wg.Go(func() {
			if err := c(hold); err != nil {
				t.Error(err)
			}
			ended.Add(1)
		})
		poll(ctx, t, "the calls to be held", func() bool {
			return list[0].held.Load()+list[1].held.Load()+list[2].held.Load() == n
		})
	}
	close(list[1].release)
	close(list[2].release)
	poll(ctx, t, "the calls to end", func() bool { return ended.Load() == list[1].held.Load()+list[2].held.Load() })
	return distribution(ctx, t, list, c, busyCalls)
}

func poll(ctx context.Context, t *testing.T, what string, done func() bool) {
	t.Helper()
	for tick := time.NewTicker(time.Millisecond); !done(); {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v", what, ctx.Err())
		}
	}
}
