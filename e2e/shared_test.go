package e2e

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// TestHandlersShareUpstreams: two handlers that check the same upstreams differently share their connections, and each sees the
// other's calls; only what they think of the upstreams' health is their own. Other checks after a reload change nothing of that.
func TestHandlersShareUpstreams(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 2)
	for _, b := range backends {
		for _, service := range []string{"x", "y", "grpc.testing.TestService"} {
			b.Health.SetServingStatus(service, serving)
		}
	}
	site := func(of string, interval string) string {
		return "@x header X-Handler x\n" +
			"grpc_proxy @x" + addrs(backends) + " {\n\thealth_check grpc\n\thealth_services " + of + "\n}\n" +
			"grpc_proxy" + addrs(backends) + " {\n\thealth_check grpc\n\thealth_services y\n\thealth_interval " + interval + "\n}"
	}
	p := proxytest.Start(t, proxytest.Options{Site: site("grpc.testing.TestService", "10s")})
	eventually(t, "both handlers know of both upstreams that they are well", func() bool {
		well := 0
		upstream.States.Range(func(key string, s *upstream.State) bool {
			for _, b := range backends {
				if strings.HasPrefix(key, "tcp/"+b.Addr()+" ") && s.Usable() {
					well++
				}
			}
			return true
		})
		return well == 4
	})
	c := client(t, p.H2C)
	s, err := c.FullDuplexCall(metadata.AppendToOutgoingContext(within(t, time.Minute), "x-handler", "x"))
	if err != nil {
		t.Fatal(err)
	}
	if err := pingPong(s, 1); err != nil {
		t.Fatal(err)
	}
	busy, idle := backends[0], backends[1]
	if busy.Active() == 0 {
		busy, idle = idle, busy
	}
	check := func(when string) {
		t.Helper()
		if got := spread(t, c, 20, 1, busy, idle); got[0] != 0 || got[1] != 20 {
			t.Errorf("%s: the upstream with a call of the other handler got %d calls, the other one %d", when, got[0], got[1])
		}
		for _, b := range backends {
			if n := b.Accepted(); n != 1 {
				t.Errorf("%s: %s has had %d connections", when, b.Name(), n)
			}
		}
	}
	check("at first")

	idle.Health.SetServingStatus("grpc.testing.TestService", notServing)
	eventually(t, "one handler has heard of it", func() bool {
		return len(p.Log("http.handlers.grpc_proxy")) > 0 && loggedOf(p, "upstream does not serve a service", idle) == 1
	})
	check("when one of the handlers does not use it")
	if loggedOf(p, "upstream does not serve a service", idle) != 1 {
		t.Error("both handlers ask about the service")
	}

	for _, reload := range []struct{ what, site string }{
		{"with another interval", site("grpc.testing.TestService", "20s")},
		{"with another service", site("x", "20s")},
	} {
		if err := p.Load(reload.site); err != nil {
			t.Fatal(err)
		}
		c = client(t, p.H2C) // the old connection may have been told to go
		check(reload.what)
		if err := pingPong(s, 1); err != nil {
			t.Errorf("%s: the stream has ended: %v", reload.what, err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Error(err)
	}
	eventually(t, "the stream is over", func() bool { return busy.Active() == 0 })
	eventually(t, "nobody counts it any more", func() bool { return upstream.LoadOf(upstream.Address{Network: "tcp", Dial: busy.Addr()}).Active() == 0 })
}

// loggedOf is how many lines of the log say so of the backend.
func loggedOf(p *proxytest.Proxy, msg string, b *backendtest.Backend) (n int) {
	for _, line := range p.Log("http.handlers.grpc_proxy") {
		if line["msg"] == msg && line["upstream"] == b.Addr() {
			n++
		}
	}
	return n
}
