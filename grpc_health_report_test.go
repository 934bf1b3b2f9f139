package grpcproxy

import (
	"fmt"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
)

// BenchmarkHealthReport is what each change of an upstream's health costs per name that is watched.
func BenchmarkHealthReport(b *testing.B) {
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			p := &Handler{Upstreams: []*Upstream{{Dial: fmt.Sprintf("127.0.0.1:20001-%d", 20000+n)}}}
			if err := provision(b, p); err != nil {
				b.Fatal(err)
			}
			defer func() { _ = p.Cleanup() }()
			app := new(App)
			app.join(p)
			running.start(app)
			defer running.remove(app)
			h := &Health{app: app, percent: 50}
			for b.Loop() {
				if r := h.report(""); r != grpcwire.Serving {
					b.Fatal(r)
				}
			}
		})
	}
}
