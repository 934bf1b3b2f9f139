package e2e

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// small is grpc-go's least flow-control window.
var small = []grpc.DialOption{grpc.WithInitialWindowSize(65535), grpc.WithInitialConnWindowSize(65535), grpc.WithStaticStreamWindowSize(65535)}

// stalled begins a call whose answer is n messages of a size, and takes none of them.
func stalled(t *testing.T, ctx context.Context, c testgrpc.TestServiceClient, n int, size int32) testgrpc.TestService_StreamingOutputCallClient {
	t.Helper()
	req := new(testgrpc.StreamingOutputCallRequest)
	for range n {
		req.ResponseParameters = append(req.ResponseParameters, &testgrpc.ResponseParameters{Size: size})
	}
	s, err := c.StreamingOutputCall(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Header(); err != nil {
		t.Fatal(err)
	}
	return s
}

// logged waits for the access log's entry of the one call there was.
func logged(t *testing.T, p *proxytest.Proxy) map[string]any {
	t.Helper()
	var entries []map[string]any
	eventually(t, "the call is in the access log", func() bool {
		entries = p.Log("http.log.access")
		return len(entries) > 0
	})
	return entries[0]
}

// TestStalledReader: a call ends at the proxy when its time is over, though its client takes nothing: whether the proxy is
// in the middle of a write, or of a flush, and whether the upstream goes on or has said all.
func TestStalledReader(t *testing.T) {
	for _, tc := range []struct {
		name string
		n    int
		size int32
		// complete: all of the answer but what the client's window holds fits into the proxy.
		complete bool
	}{
		{"large", 100, 100_000, false},
		{"small", 200_000, 100, false},
		{"complete", 1, 100_000, true},
		{"complete_small", 700, 100, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			b := backendtest.Start(t, backendtest.Options{})
			// Not grpc-timeout: at that, the client would end the call itself.
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + " {\n\tstream_timeout 400ms\n}", AccessLog: true})
			start := time.Now()
			s := stalled(t, within(t, timeout), client(t, p.H2C, small...), tc.n, tc.size)
			if tc.complete {
				eventually(t, "the upstream has said all", func() bool { return b.Active() == 0 })
			}
			entry := logged(t, p)
			took := time.Since(start)
			t.Logf("after %v: %v, ended by %v", took, entry["grpc_status"], entry["grpc_ended_by"])
			if took > 2*time.Second {
				t.Errorf("the call ended after %v", took)
			}
			eventually(t, "the upstream's call has ended", func() bool { return b.Active() == 0 })
			var err error
			n := 0
			for ; err == nil; n++ {
				_, err = s.Recv()
			}
			t.Logf("the client has %d messages of %d, and %v", n-1, tc.n, err)
			if c := status.Code(ended(err)); c == codes.OK && n-1 < tc.n {
				t.Errorf("the client got OK for %d messages of %d", n-1, tc.n)
			}
		})
	}
}
