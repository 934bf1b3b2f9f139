//go:build unix

package e2e

import (
	"context"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() {
	const origin = "one of three upstreams was stopped (SIGSTOP) for 5 s, and nothing noticed: 573 of 24,915 calls were lost; "
	fieldHealth = append(fieldHealth, fieldCase{
		"an upstream that hangs is noticed by the calls", origin + "Envoy's outlier detection counts timeouts (local origin)",
		func(t *testing.T) { hung(t, "outlier_detection") },
	}, fieldCase{
		"an upstream that hangs is noticed by health checks", origin + "grpc/health/v1 wants no answer in time to be taken as unhealthy",
		func(t *testing.T) { hung(t, "health_check grpc\n\thealth_interval 200ms\n\thealth_timeout 300ms") },
	}, fieldCase{
		"calls on an upstream that hangs are ended", origin + "calls without a deadline waited on it for as long as it hung; Envoy closes connections on a failed check for that (close_connections_on_host_health_failure)",
		hungCalls,
	})
}

// hung stops one of three upstreams under load. What is lost are calls that began before it was out, of which each caller has one
// at a time, each until its deadline.
func hung(t *testing.T, block string) {
	const (
		concurrent = 12
		deadline   = 600 * time.Millisecond
	)
	var all [3]*process
	site := "grpc_proxy"
	for i := range all {
		all[i] = startProcess(t, anyPort)
		site += " " + all[i].addr
	}
	p := proxytest.Start(t, proxytest.Options{Site: site + " {\n\t" + block + "\n}"})
	c := bounded(t, p.H2C, deadline)
	for _, b := range all {
		reached(t, c, b)
	}
	state := stateOf(t, all[0].addr)
	l := startCallers(t, concurrent, c)
	l.more(t, 50)
	frozen := time.Now()
	all[0].signal(t, syscall.SIGSTOP)
	eventually(t, "the one that hangs is out", func() bool { return state.Has(upstream.Unhealthy | upstream.Ejected) })
	out := time.Now()
	eventually(t, "it has no calls any more", func() bool { return state.Active() == 0 })
	l.more(t, 50)
	all[0].signal(t, syscall.SIGCONT)
	l.stop()
	lost := 0
	for _, e := range p.Log("http.handlers.grpc_proxy") {
		if e["msg"] != "call failed" || e["upstream"] != all[0].addr { // the others may be slow on a busy machine
			continue
		}
		lost++
		end, took := e["ts"].(float64), e["duration"].(float64)
		if began := time.UnixMicro(int64(1e6 * (end - took))); began.After(out) {
			t.Errorf("a call that began %v after the upstream was out failed there: %v", began.Sub(out), e)
		}
	}
	t.Logf("out after %v; %d of %d calls were lost", out.Sub(frozen).Round(time.Millisecond), lost, l.calls.Load())
	if most := concurrent * (2 + int(out.Sub(frozen)/deadline)); lost == 0 || lost > most {
		t.Errorf("%d calls were lost, want %d at most, and some for the test to say anything", lost, most)
	}
}

// hungCalls stops one of two upstreams, each of which has streams without a deadline. Those that are silent are ended, but neither
// one whose client goes on sending, nor those on the other upstream.
func hungCalls(t *testing.T) {
	all := [2]*process{startProcess(t, anyPort), startProcess(t, anyPort)}
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + all[0].addr + " " + all[1].addr +
		" {\n\tlb_policy round_robin\n\thealth_check grpc\n\thealth_interval 200ms\n\thealth_timeout 700ms\n\thealth_end_hung_calls\n}"})
	c := client(t, p.H2C)
	for _, b := range all {
		reached(t, c, b)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	on := make(map[string][]testgrpc.TestService_FullDuplexCallClient)
	for range 4 {
		s, err := c.FullDuplexCall(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := pingPong(s, 1); err != nil {
			t.Fatal(err)
		}
		md, err := s.Header()
		if err != nil {
			t.Fatal(err)
		}
		name := md.Get(backendtest.KeyBackend)[0]
		on[name] = append(on[name], s)
	}
	hangs := on[all[0].addr]
	if len(hangs) != 2 {
		t.Fatalf("%d streams on one of the two upstreams", len(hangs))
	}
	all[0].signal(t, syscall.SIGSTOP)
	silent, busy := hangs[0], hangs[1]
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for tick := time.NewTicker(5 * time.Millisecond); ; {
			if err := busy.Send(new(testgrpc.StreamingOutputCallRequest)); err != nil {
				t.Errorf("the stream that is not silent: %v", err)
				return
			}
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	})
	_, err := silent.Recv()
	if st := status.Convert(err); st.Code() != codes.Unavailable || !strings.Contains(st.Message(), "the upstream hangs") {
		t.Errorf("the silent stream ends with %v", err)
	}
	close(stop)
	wg.Wait()
	all[0].signal(t, syscall.SIGCONT)
	for _, s := range append(on[all[1].addr], busy) {
		if err := pingPong(s, 1); err != nil {
			t.Errorf("a stream that is to live: %v", err)
		}
	}
}
