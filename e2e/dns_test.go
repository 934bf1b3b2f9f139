package e2e

import (
	"fmt"
	"net"
	"testing"

	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/dnstest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// samePort starts backends on one port of several addresses of this machine, as the pods of a service have it.
func samePort(t *testing.T, n int, o backendtest.Options) (backends []*backendtest.Backend, port string) {
	t.Helper()
	for range 20 {
		l, addr := listen(t)
		_ = l.Close()
		_, port, _ = net.SplitHostPort(addr)
		backends = backends[:0]
		for i := range n {
			o := o
			o.Addr = fmt.Sprintf("127.0.0.%d:%s", i+1, port)
			probe, err := net.Listen("tcp", o.Addr)
			if err != nil {
				break // somebody has the port
			}
			_ = probe.Close()
			o.Name = fmt.Sprint("b", i)
			backends = append(backends, backendtest.Start(t, o))
		}
		if len(backends) == n {
			return backends, port
		}
	}
	t.Skip("no port is free on all addresses, or this system has only 127.0.0.1")
	return nil, ""
}

// TestDNSTarget: `dns:///name:port` is all addresses of the name. One that comes to the name gets calls, one that leaves it
// gets no more; a name server that fails changes nothing.
func TestDNSTarget(t *testing.T) {
	for name, form := range map[string]string{
		"target":           "to dns:///backend.test:%[1]s\nresolvers %[2]s",
		"target at server": "to dns://%[2]s/backend.test:%[1]s",
		"dynamic":          "dynamic a backend.test %[1]s {\n\tresolvers %[2]s\n}",
	} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			backends, port := samePort(t, 3, backendtest.Options{})
			dns := dnstest.New(t)
			dns.Set(t, "backend.test. 1 IN A 127.0.0.1", "backend.test. 1 IN A 127.0.0.2")
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n" + fmt.Sprintf(form, port, dns.Addr) + "\nlb_policy round_robin\n}"})
			c := client(t, p.H2C)
			eventually(t, "both get the same, once they are connected to", func() bool {
				got := spread(t, c, 20, 2, backends...)
				return got[0] == 10 && got[1] == 10
			})
			dns.Set(t, "backend.test. 1 IN A 127.0.0.2", "backend.test. 1 IN A 127.0.0.3")
			follow := func() {
				t.Helper()
				eventually(t, "the proxy follows the name", func() bool {
					got := spread(t, c, 20, 2, backends...)
					return got[0] == 0 && got[1] == 10 && got[2] == 10
				})
			}
			follow()
			dns.SetMood(dnstest.Code(2)) // SERVFAIL
			asked := len(dns.Queries())
			eventually(t, "the proxy asks again", func() bool { return len(dns.Queries()) > asked+2 })
			follow()
		})
	}
}

// TestDNSFails: calls are told why there is no upstream, and names only where that is allowed.
func TestDNSFails(t *testing.T) {
	wiretest.CheckLeaks(t)
	dns := dnstest.New(t)
	for _, tc := range []struct{ option, want string }{
		{"", "no upstream is known, since they cannot be looked up"},
		{"expose_upstream", "no upstream is known: dns:///nothing.test:50051: DNS has no name nothing.test."},
	} {
		p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy dns:///nothing.test:50051 {\n\tresolvers " + dns.Addr + "\n" + tc.option + "\n}"})
		_, err := client(t, p.H2C).EmptyCall(within(t, timeout), new(testgrpc.Empty))
		if s := status.Convert(err); s.Code() != codes.Unavailable || s.Message() != tc.want {
			t.Errorf("%q: %v, want %q", tc.option, err, tc.want)
		}
	}
}

// TestDNSTLS: endpoints found by a name are verified by the name, not by their addresses.
func TestDNSTLS(t *testing.T) {
	wiretest.CheckLeaks(t)
	ca := wiretest.NewCA(t)
	backends, port := samePort(t, 2, backendtest.Options{TLS: ca.ServerConfig("backend.test")})
	dns := dnstest.New(t)
	dns.Set(t, "backend.test. 60 IN A 127.0.0.1", "backend.test. 60 IN A 127.0.0.2", "other.test. 60 IN A 127.0.0.1")
	site := "grpc_proxy {\n\tto dns:///%s:" + port + "\n\tresolvers " + dns.Addr + "\n\ttls_trust_pool file " + ca.File() + "\n}"
	p := proxytest.Start(t, proxytest.Options{Site: fmt.Sprintf(site, "backend.test")})
	spread(t, client(t, p.H2C), 20, 2, backends...)
	if err := p.Load(fmt.Sprintf(site, "other.test")); err != nil {
		t.Fatal(err)
	}
	_, err := client(t, p.H2C).EmptyCall(within(t, timeout), new(testgrpc.Empty))
	if status.Code(err) != codes.Unavailable {
		t.Errorf("an endpoint with another name's certificate: %v", err)
	}
	t.Log(err)
}
