package discovery

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/dnstest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func TestSRV(t *testing.T) {
	s := dnstest.New(t)
	s.Set(
		t, "_grpc._tcp.test. 1 IN SRV 1 10 50051 A.test.", "_grpc._tcp.test. 1 IN SRV 0 0 50052 b.test.",
		"_grpc._tcp.test. 1 IN SRV 0 65535 50051 b.test.", "_grpc._tcp.test. 1 IN SRV 2 1 1 nobody.test.",
		"a.test. 5 IN A 10.0.0.1", "a.test. 5 IN AAAA fd00::1", "b.test. 5 IN A 10.0.0.2",
	)
	src := &SRV{Service: "grpc", Proto: "_tcp", Name: "test.", DNS: askFor(s)}
	r := watch(t, src)
	r.awaitList(
		t, "10.0.0.2:50051,name=b.test,w=65535", "10.0.0.2:50052,name=b.test,w=1",
		"10.0.0.1:50051,name=A.test,w=10,p=1", "[fd00::1]:50051,name=A.test,w=10,p=1",
	)
	list, _ := r.last()
	if want := "srv:///_grpc._tcp.test."; list[0].Origin != want {
		t.Errorf("origin is %q; want %q", list[0].Origin, want)
	}
	for _, q := range s.Queries() {
		if q.Type != "SRV" && q.Name != "nobody.test." {
			t.Errorf("asked for %v, which the answer to SRV has", q)
		}
	}
	// By itself, since the TTL is a second.
	s.Set(t, "_grpc._tcp.test. 1 IN SRV 0 1 50053 b.test.", "b.test. 5 IN A 10.0.0.3")
	r.awaitList(t, "10.0.0.3:50053,name=b.test,w=1")
}

// TestSRVAsksForTargets: a server that leaves the addresses out is asked for them.
func TestSRVAsksForTargets(t *testing.T) {
	s := dnstest.New(t)
	records := []string{"svc.test. 60 IN SRV 0 1 1 alias.test.", "alias.test. 1 IN CNAME h0.test."}
	var want []string
	for i := range 40 {
		records = append(records, fmt.Sprintf("svc.test. 60 IN SRV 1 1 1 h%d.test.", i), fmt.Sprintf("h%d.test. 1 IN A 10.0.0.%d", i, 100+i))
		want = append(want, fmt.Sprintf("10.0.0.%d:1,name=h%d.test,w=1,p=1", 100+i, i))
	}
	s.Set(t, records...)
	s.SetMood(func(_ dnstest.Query, m *dns.Msg) *dns.Msg {
		m.Extra = nil
		return m
	})
	r := watch(t, &SRV{Name: "svc.test.", DNS: askFor(s)})
	want = append([]string{"10.0.0.100:1,name=alias.test,w=1"}, want...)
	r.awaitList(t, want...)

	// A target in trouble keeps its addresses, one that is gone loses them. The targets have the shortest TTL here.
	s.SetMood(func(q dnstest.Query, m *dns.Msg) *dns.Msg {
		m.Extra = nil
		if q.Name == "h7.test." {
			m.Rcode, m.Answer = dns.RcodeServerFailure, nil
		}
		return m
	})
	s.Set(t, slices.DeleteFunc(records, func(r string) bool { return strings.HasPrefix(r, "h5.test.") })...)
	r.await(t, "h7's last address, without h5", func(list []upstream.Endpoint, _ error) bool {
		has := func(name string) bool {
			return slices.ContainsFunc(list, func(e upstream.Endpoint) bool { return e.Name == name })
		}
		return len(list) == 40 && has("h7.test") && !has("h5.test")
	})
}

// TestSRVTrouble: addresses that came with an answer are remembered for when the target cannot be looked up.
func TestSRVTrouble(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "svc.test. 1 IN SRV 0 1 1 a.test.", "a.test. 1 IN A 10.0.0.1")
	r := watch(t, &SRV{Name: "svc.test.", DNS: askFor(s)})
	r.awaitList(t, "10.0.0.1:1,name=a.test,w=1")
	s.SetMood(func(q dnstest.Query, m *dns.Msg) *dns.Msg {
		m.Extra = nil
		if q.Name == "a.test." {
			return dnstest.Code(dns.RcodeServerFailure)(q, m)
		}
		return m
	})
	s.Set(t, "svc.test. 1 IN SRV 0 1 2 a.test.")
	r.awaitList(t, "10.0.0.1:2,name=a.test,w=1")
	if _, err := r.last(); err != nil {
		t.Error(err)
	}
}

func TestSRVErrors(t *testing.T) {
	s := dnstest.New(t)
	s.SetNegative(1)
	r := watch(t, &SRV{Name: "svc.test.", DNS: askFor(s)})
	r.awaitError(t, "DNS has no name svc.test.")
	s.Set(t, "svc.test. 1 IN SRV 0 0 1 .")
	r.awaitError(t, "the SRV records of svc.test. say that the service is not available")
	if _, err := r.last(); !errors.Is(err, ErrNoEndpoints) {
		t.Errorf("%v is no ErrNoEndpoints", err)
	}
	s.Set(t, "svc.test. 1 IN SRV 0 0 1 a.test.", "svc.test. 1 IN SRV 0 0 1 b.test.")
	r.awaitError(t, "no target of the SRV records of svc.test. can be found: DNS has no name a.test.")
	s.SetMood(dnstest.Code(dns.RcodeServerFailure))
	r.awaitError(t, "looking up SRV of svc.test.: DNS server "+s.Addr+": answered SERVFAIL")
	s.SetMood(nil)
	s.Set(t, "svc.test. 1 IN SRV 0 0 1 a.test.", "a.test. 1 IN A 10.0.0.1")
	r.awaitList(t, "10.0.0.1:1,name=a.test,w=1")
}

func TestSRVRefused(t *testing.T) {
	refused(t, &SRV{}, "name is missing")
	refused(t, &SRV{Name: "a", Service: "grpc"}, "service and proto go together")
	refused(t, &SRV{Name: "a", Proto: "tcp"}, "service and proto go together")
	refused(t, &SRV{Name: "{http.request.host}"}, "placeholder that is not known")
	refused(t, &SRV{Name: "a", Service: "{x}", Proto: "tcp"}, "placeholder that is not known")
	refused(t, &SRV{Name: "a", DNS: DNS{Refresh: 1}}, "the shortest is 100ms")
}

func TestSRVCaddyfile(t *testing.T) {
	runCaddyfile(t, []caddyfileCase{
		{input: "srv _grpc._tcp.svc.test", json: `{"name":"_grpc._tcp.svc.test"}`},
		{
			input: "srv {\n service grpc\n proto tcp\n name svc.test\n grace_period 5s\n" + dnsCaddyfile,
			json:  `{"service":"grpc","proto":"tcp","name":"svc.test",` + dnsJSON,
		},
		{input: "srv a b", err: "wrong argument count"},
		{input: "srv a {\n name b\n}", err: "name is given twice"},
		{input: "srv a {\n service b\n service c\n}", err: "service is given twice"},
		{input: "srv a {\n proto b\n proto c\n}", err: "proto is given twice"},
		{input: "srv a {\n port 1\n}", err: `unrecognized subdirective "port"; expected service`},
		{input: "srv a {\n grace_period soon\n}", err: `grace_period: "soon" is not a duration`},
		{input: "srv a {\n refresh\n}", err: "wrong argument count"},
	})
}
