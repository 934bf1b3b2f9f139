package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// fieldHealth are faults of health checks and ejections.
var fieldHealth = []fieldCase{
	{
		"an upstream that a file adds starts slowly",
		"in a trial slow_start without a health check gave a new upstream its full share at once; Envoy's slow start mode counts from when a host is added",
		slowStartOfNewUpstream,
	},
}

func slowStartOfNewUpstream(t *testing.T) {
	old := backendtest.Start(t, backendtest.Options{Name: "old"})
	file := filepath.Join(t.TempDir(), "upstreams.json")
	list := func(addrs ...string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(`[{"address":"`+strings.Join(addrs, `"},{"address":"`)+`"}]`), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	list(old.Addr())
	// With this aggression the share stays at 10 % for 1.7 s, and then grows fast.
	const window, cold = 2 * time.Second, 1700 * time.Millisecond
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic file " + file + " {\n\t\trefresh 100ms\n\t}\n\tlb_policy round_robin\n" +
		"\tslow_start 2s {\n\t\taggression 0.05\n\t}\n}"})
	c := client(t, p.H2C)
	spread(t, c, 1, 1, old)
	since := stateOf(t, old.Addr()).UsableSince()
	eventually(t, "the old one is warm", func() bool { return time.Since(since) > window })
	for addrs := []string{old.Addr()}; ; {
		fresh := backendtest.Start(t, backendtest.Options{Name: "new"})
		addrs = append(addrs, fresh.Addr())
		list(addrs...)
		eventually(t, "the new one is there", func() bool {
			if _, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty)); err != nil {
				t.Fatal(err)
			}
			return fresh.Calls().Total() > 0
		})
		state := stateOf(t, fresh.Addr())
		got := spread(t, c, 110, 1, old, fresh)
		if time.Since(state.UsableSince()) > cold {
			t.Log("the machine is too slow; once more")
			continue
		}
		if state.Status().Condition != upstream.ConditionWarming || got[1] > 20 {
			t.Errorf("the new upstream is %v and got %d of 110 calls, want 10", state.Status().Condition, got[1])
		}
		return
	}
}
