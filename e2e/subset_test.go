package e2e

import (
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestSubsetConnections: a subset's endpoints are the only ones that are connected to, whatever else is on: health checks,
// connections in advance, load reports. When they are gone others take their place, and are checked.
func TestSubsetConnections(t *testing.T) {
	for name, block := range map[string]string{
		"health checks":    "lb_policy deterministic_subset 2 {\n\tidentity a\n\tpolicy round_robin\n}\nhealth_check grpc\nhealth_interval 100ms\nhealth_fails 1",
		"min_conns":        "lb_policy deterministic_subset 2 {\n\tidentity a\n\tpolicy round_robin\n}\nmin_conns 1",
		"load reports":     "lb_policy deterministic_subset 2 {\n\tidentity a\n\tpolicy orca {\n\tenable_oob_load_report\n}\n}",
		"in a level":       "lb_policy priority {\n\tpolicy deterministic_subset 2 {\n\tidentity a\n}\n}\nhealth_check grpc",
		"with a threshold": "lb_policy deterministic_subset 2 {\n\tidentity a\n}\nhealth_check grpc\npanic_threshold 50",
	} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			backends := start(t, 8)
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addrs(backends) + " {\n" + block + "\n}"})
			c := client(t, p.H2C)
			used := func() (list []*backendtest.Backend) {
				for _, b := range backends {
					if b.Accepted() > 0 {
						list = append(list, b)
					}
				}
				return list
			}
			eventually(t, "both are in use", func() bool {
				spread(t, c, 50, 4, backends...)
				return len(used()) >= 2
			})
			spread(t, c, 200, 4, backends...)
			chosen := used()
			if len(chosen) != 2 {
				t.Fatalf("connected to %d of 8 upstreams, want 2", len(chosen))
			}
			if name != "health checks" {
				return
			}
			for _, b := range backends {
				if b != chosen[0] && b != chosen[1] {
					b.Health.SetServingStatus("", notServing)
				}
			}
			last := backends[7]
			for _, b := range backends {
				if b != chosen[0] && b != chosen[1] {
					last = b
				}
			}
			last.Health.SetServingStatus("", serving)
			for _, b := range chosen {
				b.Health.SetServingStatus("", notServing)
			}
			eventually(t, "the only good one gets all calls", func() bool {
				before := last.Calls().Of("EmptyCall")
				spread(t, c, 20, 2, backends...)
				return last.Calls().Of("EmptyCall") == before+20
			})
			chosen[1].Health.SetServingStatus("", serving)
			eventually(t, "the chosen one is back", func() bool { return spread(t, c, 20, 2, chosen[1])[0] == 20 })
		})
	}
}
