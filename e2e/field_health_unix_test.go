//go:build unix

package e2e

import (
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

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
		func(t *testing.T) { hung(t, "health_check grpc\n\thealth_interval 200ms\n\thealth_timeout 200ms") },
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
	l.more(t, 200)
	frozen := time.Now()
	all[0].signal(t, syscall.SIGSTOP)
	eventually(t, "the one that hangs is out", func() bool { return state.Has(upstream.Unhealthy | upstream.Ejected) })
	out := time.Now()
	eventually(t, "it has no calls any more", func() bool { return state.Active() == 0 })
	l.more(t, 200)
	all[0].signal(t, syscall.SIGCONT)
	failures := l.stop()
	t.Logf("out after %v; %d of %d calls failed", out.Sub(frozen).Round(time.Millisecond), len(failures), l.calls.Load())
	if most := concurrent * (2 + int(out.Sub(frozen)/deadline)); len(failures) > most {
		t.Errorf("%d calls failed, want %d at most", len(failures), most)
	}
	for _, f := range failures {
		if status.Code(f.err) != codes.DeadlineExceeded {
			t.Errorf("a call failed with %v, want DEADLINE_EXCEEDED", f.err)
		}
		if f.start.After(out) {
			t.Errorf("a call that began %v after the upstream was out failed: %v", f.start.Sub(out), f.err)
		}
	}
	for _, b := range all[1:] {
		if st := stateOf(t, b.addr).Status(); st.Condition != upstream.ConditionHealthy {
			t.Errorf("%s, which answers, is %v: %s", b.addr, st.Condition, st.Text)
		}
	}
}
