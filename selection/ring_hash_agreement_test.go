package selection_test

import (
	"context"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer/ringhash"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	grpcmetadata "google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	ringhashkey "google.golang.org/grpc/resolver/ringhash"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const testTimeout = time.Minute // Nothing takes so long; machines are slow sometimes.

// servers starts n gRPC servers and returns a snapshot of them.
func servers(t *testing.T, n int) (*upstream.Snapshot, []*grpc.Server) {
	t.Helper()
	s := new(upstream.Snapshot)
	var list []*grpc.Server
	for i := range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		server := grpc.NewServer()
		healthgrpc.RegisterHealthServer(server, health.NewServer())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = server.Serve(ln)
		}()
		t.Cleanup(func() { server.Stop(); <-done })
		s.Endpoints = append(s.Endpoints, upstream.Endpoint{
			Index: i, Network: "tcp", Address: ln.Addr().String(), Weight: 1, State: new(upstream.State),
		})
		list = append(list, server)
	}
	return s, list
}

// dialRing makes a client whose own ring_hash policy chooses among the snapshot's endpoints.
func dialRing(t *testing.T, s *upstream.Snapshot, low, high int) *grpc.ClientConn {
	t.Helper()
	r := manual.NewBuilderWithScheme("ring")
	var endpoints []resolver.Endpoint
	for _, e := range s.Endpoints {
		to := resolver.Endpoint{Addresses: []resolver.Address{{Addr: e.Address}}}
		to = weight.Set(to, weight.EndpointInfo{Weight: e.Weight})
		endpoints = append(endpoints, ringhashkey.SetHashKey(to, e.Metadata["hash_key"]))
	}
	r.InitialState(resolver.State{Endpoints: endpoints})
	config := fmt.Sprintf(`{"loadBalancingConfig":[{"%s":{"minRingSize":%d,"maxRingSize":%d,"requestHashHeader":"k"}}]}`, ringhash.Name, low, high)
	conn, err := grpc.NewClient("ring:///x", grpc.WithResolvers(r), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(config))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// serverOf makes a call with the key and returns which server it came to.
func serverOf(ctx context.Context, conn *grpc.ClientConn, values ...string) (string, error) {
	for _, v := range values {
		ctx = grpcmetadata.AppendToOutgoingContext(ctx, "k", v)
	}
	var at peer.Peer
	_, err := healthgrpc.NewHealthClient(conn).Check(ctx, new(healthgrpc.HealthCheckRequest), grpc.Peer(&at), grpc.WaitForReady(true))
	if err != nil {
		return "", err
	}
	return at.Addr.String(), nil
}

// grpc-go's own ring_hash sends each key to the same endpoint as ours: as it is, with weights, with hash keys, with other ring
// sizes, with several values, and when an endpoint is gone.
func TestRingHashAgreesWithGRPC(t *testing.T) {
	tests := []struct {
		name      string
		low, high int
		change    func(e *upstream.Endpoint)
	}{
		{"defaults", 0, 0, nil},
		{"small ring", 3, 20, nil},
		{"weights", 0, 0, func(e *upstream.Endpoint) { e.Weight = uint32(1 + e.Index*e.Index) }},
		{"weights, at the limit", 1000, 1100, func(e *upstream.Endpoint) { e.Weight = uint32(1 + e.Index*100) }},
		{"hash keys", 1024, 4096, func(e *upstream.Endpoint) {
			e.Metadata = map[string]string{"hash_key": fmt.Sprint("pod-", 7-e.Index)}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
			defer cancel()
			s, list := servers(t, 7)
			for i := range s.Endpoints {
				if tt.change != nil {
					tt.change(&s.Endpoints[i])
				}
			}
			conn := dialRing(t, s, tt.low, tt.high)
			config := hashPolicies["ring_hash"]
			if tt.low != 0 {
				config = fmt.Sprintf(`%s,"min_ring_size":%d,"max_ring_size":%d}`, config[:len(config)-1], tt.low, tt.high)
			}
			ours := mustLoad(config).Build(s)
			agree := func(k int, try func(values ...string) (string, error)) {
				t.Helper()
				v := []string{fmt.Sprint("user-", k), "second"}[:1+k%2]
				theirs, err := try(v...)
				if err != nil {
					t.Fatal(err)
				}
				i, ok := pick(ours, selection.PickInfo{Call: &call.Call{Metadata: values{"k": v}}})
				if !ok || s.Endpoints[i].Address != theirs {
					t.Fatalf("key %q: gRPC picked %s, we %s, %v", v, theirs, s.Endpoints[i].Address, ok)
				}
			}
			for k := range 300 {
				agree(k, func(v ...string) (string, error) { return serverOf(ctx, conn, v...) })
			}
			// gRFC A42: a call goes on from an endpoint in TRANSIENT_FAILURE to the next on the ring.
			gone := s.Endpoints[2].Address
			list[2].Stop()
			s.Endpoints[2].State.SetUsable(false)
			for k := range 300 {
				agree(k, func(v ...string) (string, error) {
					for {
						// The client may learn only from the call that the connection is gone.
						at, err := serverOf(ctx, conn, v...)
						if ctx.Err() != nil || err == nil && at != gone {
							return at, err
						}
					}
				})
			}
		})
	}
}

// Calls without a key are spread by both as the ring has it.
func TestRingHashAgreesWithGRPCOnRandomKeys(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	s, _ := servers(t, 4)
	conn := dialRing(t, s, 20, 20)
	ours := mustLoad(`{"policy":"ring_hash","keys":[{"source":"header","name":"k"}],"min_ring_size":20,"max_ring_size":20}`).Build(s)
	// Without a key, gRPC picks only endpoints that are connected already.
	for connected := make(map[string]bool); len(connected) < len(s.Endpoints); {
		at, err := serverOf(ctx, conn)
		if err != nil {
			t.Fatal(err)
		}
		connected[at] = true
	}
	const n = 4000
	theirs, here := make([]int, len(s.Endpoints)), make([]int, len(s.Endpoints))
	for range n {
		at, err := serverOf(ctx, conn)
		if err != nil {
			t.Fatal(err)
		}
		theirs[slices.IndexFunc(s.Endpoints, func(e upstream.Endpoint) bool { return e.Address == at })]++
		i, _ := pick(ours, selection.PickInfo{Call: new(call.Call)})
		here[i]++
	}
	for i := range theirs {
		// Five standard deviations of the difference of two such counts are at most 5 × sqrt(2 × 4000/4) = 224.
		if d := theirs[i] - here[i]; d > 224 || d < -224 {
			t.Errorf("endpoint %d: gRPC picked it %d times, we %d times", i, theirs[i], here[i])
		}
	}
}
