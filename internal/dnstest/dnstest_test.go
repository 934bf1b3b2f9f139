package dnstest

import (
	"fmt"
	"testing"

	"github.com/miekg/dns"
)

func ask(t *testing.T, s *Server, network, name string, qtype uint16) *dns.Msg {
	t.Helper()
	c := dns.Client{Net: network}
	m, _, err := c.Exchange(new(dns.Msg).SetQuestion(name, qtype), s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestServer(t *testing.T) {
	s := New(t)
	s.Set(
		t, "svc.test. 5 IN A 10.0.0.1", "svc.test. 5 IN A 10.0.0.2", "alias.test. 5 IN CNAME svc.test.",
		"_grpc._tcp.test. 5 IN SRV 0 1 50051 svc.test.",
	)
	for _, network := range []string{"udp", "tcp"} {
		if m := ask(t, s, network, "svc.test.", dns.TypeA); len(m.Answer) != 2 || m.Rcode != dns.RcodeSuccess {
			t.Errorf("%s: got %v", network, m)
		}
	}
	if m := ask(t, s, "udp", "alias.test.", dns.TypeA); len(m.Answer) != 3 {
		t.Errorf("got %v; want the alias and two addresses", m)
	}
	if m := ask(t, s, "udp", "_grpc._tcp.test.", dns.TypeSRV); len(m.Answer) != 1 || len(m.Extra) != 2 {
		t.Errorf("got %v; want the target's addresses, too", m)
	}
	s.SetNegative(7)
	if m := ask(t, s, "udp", "svc.test.", dns.TypeAAAA); m.Rcode != dns.RcodeSuccess || len(m.Answer) != 0 || m.Ns[0].(*dns.SOA).Minttl != 7 {
		t.Errorf("got %v; want no data for 7 s", m)
	}
	if m := ask(t, s, "udp", "nobody.test.", dns.TypeA); m.Rcode != dns.RcodeNameError || len(m.Ns) != 1 {
		t.Errorf("got %v; want no such name", m)
	}
	if q := s.Queries(); len(q) != 6 || q[1] != (Query{"svc.test.", "A", "tcp"}) {
		t.Errorf("got queries %v", q)
	}
}

func TestMoods(t *testing.T) {
	s := New(t)
	var many []string
	for i := range 200 {
		many = append(many, fmt.Sprintf("many.test. 5 IN A 10.0.0.%d", i))
	}
	s.Set(t, many...)
	if m := ask(t, s, "udp", "many.test.", dns.TypeA); !m.Truncated || len(m.Answer) >= 200 {
		t.Errorf("got %d records by UDP, truncated: %v", len(m.Answer), m.Truncated)
	}
	if m := ask(t, s, "tcp", "many.test.", dns.TypeA); m.Truncated || len(m.Answer) != 200 {
		t.Errorf("got %d records by TCP, truncated: %v", len(m.Answer), m.Truncated)
	}
	arrived := s.Arrived()
	s.SetMood(Code(dns.RcodeServerFailure))
	if m := ask(t, s, "udp", "many.test.", dns.TypeA); m.Rcode != dns.RcodeServerFailure || len(m.Answer) != 0 {
		t.Errorf("got %v; want SERVFAIL", m)
	}
	<-arrived
	s.SetMood(nil)
	if m := ask(t, s, "udp", "many.test.", dns.TypeA); m.Rcode != dns.RcodeSuccess {
		t.Errorf("got %v; want success again", m)
	}
}
