//go:build unix

package e2e

import (
	"syscall"
	"testing"
	"time"

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
	l.stop()
	lost := 0
	for _, e := range p.Log("http.handlers.grpc_proxy") {
		if e["msg"] != "call failed" || e["upstream"] != all[0].addr { // the others may be slow on a busy machine
			continue
		}
		lost++
		end, took := e["ts"].(float64), e["duration"].(float64)
		if began := time.UnixMicro(int64(1e6 * (end - took))); began.After(out) || e["status"] != "DEADLINE_EXCEEDED" {
			t.Errorf("a call that began %v after the upstream was out failed there: %v", began.Sub(out), e)
		}
	}
	t.Logf("out after %v; %d of %d calls were lost", out.Sub(frozen).Round(time.Millisecond), lost, l.calls.Load())
	if most := concurrent * (2 + int(out.Sub(frozen)/deadline)); lost == 0 || lost > most {
		t.Errorf("%d calls were lost, want %d at most, and some for the test to say anything", lost, most)
	}
}
