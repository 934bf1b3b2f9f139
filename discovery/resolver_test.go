package discovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/dnstest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

var both = families{v4: true, v6: true}

// resolverOf asks the servers, with settings of its own and an empty hosts file.
func resolverOf(t *testing.T, conf string, servers ...string) *resolver {
	t.Helper()
	wiretest.CheckLeaks(t)
	r := &resolver{conf: writeFile(t, "resolv.conf", conf), hosts: writeFile(t, "hosts", "")}
	for _, addr := range servers {
		r.own = append(r.own, dnsServer{"udp", addr})
	}
	return r
}

// ask looks a name up, as text: addresses and TTL, or the error.
func (r *resolver) ask(t *testing.T, name string, want families, k *known) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	addrs, ttl, err := r.addresses(ctx, name, want, k)
	if err != nil {
		if len(addrs) > 0 {
			t.Errorf("addresses %v besides error %v", addrs, err)
		}
		return err.Error()
	}
	return fmt.Sprint(addrs, " ", ttl)
}

func expect(t *testing.T, got, want string) {
	t.Helper()
	if !strings.Contains(got, want) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestResolve(t *testing.T) {
	s := dnstest.New(t)
	s.Set(
		t, "svc.test. 7 IN A 10.0.0.2", "svc.test. 5 IN A 10.0.0.1", "svc.test. 9 IN AAAA fd00::1",
		"v4.test. 60 IN A 10.0.1.1", "alias.test. 3 IN CNAME Hop.test.", "hop.test. 20 IN CNAME svc.test.",
		"dead.test. 3 IN CNAME nobody.test.", "text.test. 5 IN TXT x", "zero.test. 0 IN A 10.0.0.1",
		"loop1.test. 5 IN CNAME loop2.test.", "loop2.test. 5 IN CNAME loop1.test.",
	)
	r := resolverOf(t, "", s.Addr)
	for _, c := range []struct {
		name string
		want families
		text string
	}{
		{"svc.test.", both, "[10.0.0.1 10.0.0.2 fd00::1] 5s"},
		{"SVC.test", families{v4: true}, "[10.0.0.1 10.0.0.2] 5s"},
		{"svc.test.", families{v6: true}, "[fd00::1] 9s"},
		{"v4.test.", both, "[10.0.1.1] 1m0s"},
		{"alias.test.", both, "[10.0.0.1 10.0.0.2 fd00::1] 3s"},
		{"zero.test.", both, "[10.0.0.1] 0s"},
		{"nobody.test.", both, "DNS has no name nobody.test."},
		{"dead.test.", both, "DNS has no name dead.test."},
		{"v4.test.", families{v6: true}, "DNS has no such record for the name v4.test."},
		{"text.test.", both, "DNS has no such record for the name text.test."},
		{"a..test.", both, "not a domain name"},
	} {
		expect(t, r.ask(t, c.name, c.want, new(known)), c.text)
	}
	if got := r.ask(t, "loop1.test.", both, new(known)); strings.Contains(got, "[") {
		t.Errorf("got %s; want an error", got)
	}
	_, _, err := r.addresses(t.Context(), "nobody.test.", both, new(known))
	none, ok := errors.AsType[*noRecordsError](err)
	if !errors.Is(err, ErrNoEndpoints) || !ok || none.exists || none.ttl != time.Minute {
		t.Errorf("got %#v; want no such name, for a minute", err)
	}
}

func TestResolveChainLeftToUs(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "alias.test. 3 IN CNAME svc.test.", "svc.test. 5 IN A 10.0.0.1")
	s.SetMood(func(_ dnstest.Query, m *dns.Msg) *dns.Msg {
		m.Answer = m.Answer[:min(len(m.Answer), 1)]
		return m
	})
	expect(t, resolverOf(t, "", s.Addr).ask(t, "alias.test.", families{v4: true}, new(known)), "[10.0.0.1] 3s")
}

func TestResolveTruncated(t *testing.T) {
	s := dnstest.New(t)
	records := make([]string, 500)
	for i := range records {
		records[i] = fmt.Sprintf("many.test. 5 IN A 10.0.%d.%d", i/250, i%250)
	}
	s.Set(t, records...)
	r := resolverOf(t, "", s.Addr)
	addrs, ttl, err := r.addresses(t.Context(), "many.test.", families{v4: true}, new(known))
	if err != nil || len(addrs) != len(records) || ttl != 5*time.Second {
		t.Errorf("got %d addresses, %v, %v; want %d", len(addrs), ttl, err, len(records))
	}
	if q := s.Queries(); len(q) != 2 || q[0].Network != "udp" || q[1].Network != "tcp" {
		t.Errorf("asked %v; want UDP, then TCP", q)
	}
	r.own[0].network = "tcp"
	if addrs, _, err := r.addresses(t.Context(), "many.test.", families{v4: true}, new(known)); err != nil || len(addrs) != len(records) {
		t.Errorf("by TCP alone: got %d addresses, %v", len(addrs), err)
	}
	if q := s.Queries(); len(q) != 3 || q[2].Network != "tcp" {
		t.Errorf("asked %v; want one more by TCP", q)
	}
}

func TestResolveServers(t *testing.T) {
	good, bad := dnstest.New(t), dnstest.New(t)
	good.Set(t, "svc.test. 5 IN A 10.0.0.1")
	bad.Set(t, "svc.test. 5 IN A 10.0.0.66")
	closed, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := closed.LocalAddr().String()
	_ = closed.Close()

	for name, mood := range map[string]dnstest.Mood{
		"SERVFAIL": dnstest.Code(dns.RcodeServerFailure),
		"REFUSED":  dnstest.Code(dns.RcodeRefused),
		"silent":   dnstest.Silent,
		"referral": func(_ dnstest.Query, m *dns.Msg) *dns.Msg {
			m.Answer, m.RecursionAvailable = nil, false
			return m
		},
		"wrong question": func(_ dnstest.Query, m *dns.Msg) *dns.Msg {
			m.Question[0].Name = "other.test."
			return m
		},
		"wrong id": func(_ dnstest.Query, m *dns.Msg) *dns.Msg {
			m.Id++
			return m
		},
		"query": func(_ dnstest.Query, m *dns.Msg) *dns.Msg {
			m.Response = false
			return m
		},
	} {
		t.Run(name, func(t *testing.T) {
			bad.SetMood(mood)
			r := resolverOf(t, "options attempts:1", bad.Addr, nobody, good.Addr)
			r.timeout = 300 * time.Millisecond
			for range 3 { // It begins with any of them.
				expect(t, r.ask(t, "svc.test.", families{v4: true}, new(known)), "[10.0.0.1] 5s")
			}
			r.own = r.own[:2]
			got := r.ask(t, "svc.test.", families{v4: true}, new(known))
			expect(t, got, "looking up A of svc.test.: ")
			expect(t, got, "DNS server "+bad.Addr+": ")
			expect(t, got, "DNS server "+nobody+": ")
		})
	}
}

// TestResolveForged: a datagram that is not the answer does not keep the answer from being heard.
func TestResolveForged(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "svc.test. 5 IN A 10.0.0.1")
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			n, peer, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			query := new(dns.Msg)
			_ = query.Unpack(buf[:n])
			rr, _ := dns.NewRR("svc.test. 5 IN A 10.66.66.66")
			forged := new(dns.Msg).SetReply(query)
			forged.Id, forged.Answer = query.Id+1, []dns.RR{rr}
			wrong, _ := forged.Pack()
			forged.Id, forged.Answer[0] = query.Id, dns.Copy(rr)
			forged.Answer[0].(*dns.A).A = net.IPv4(10, 0, 0, 1)
			right, _ := forged.Pack()
			for _, packet := range [][]byte{{1, 2, 3}, wrong, right[:len(right)-5], right} {
				_, _ = conn.WriteTo(packet, peer)
			}
		}
	}()
	defer func() { _ = conn.Close(); <-done }()
	r := resolverOf(t, "options attempts:1", conn.LocalAddr().String())
	expect(t, r.ask(t, "svc.test.", families{v4: true}, new(known)), "[10.0.0.1] 5s")
}

func TestResolveWithoutEDNS(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "svc.test. 5 IN A 10.0.0.1")
	var plain atomic.Int32
	s.SetMood(func(_ dnstest.Query, m *dns.Msg) *dns.Msg {
		if m.IsEdns0() != nil {
			return dnstest.Code(dns.RcodeFormatError)(dnstest.Query{}, m)
		}
		plain.Add(1)
		return m
	})
	expect(t, resolverOf(t, "", s.Addr).ask(t, "svc.test.", families{v4: true}, new(known)), "[10.0.0.1] 5s")
	if plain.Load() != 1 {
		t.Errorf("asked %d times without EDNS", plain.Load())
	}
}

func TestResolveSearch(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "svc.b.test. 5 IN A 10.0.0.1", "svc. 5 IN A 10.0.0.66", "outer.x. 5 IN A 10.0.0.2")
	r := resolverOf(t, "search a.test b.test\noptions ndots:2 attempts:1", s.Addr)
	v4 := families{v4: true}
	k := new(known)
	expect(t, r.ask(t, "svc", v4, k), "[10.0.0.1] 5s")
	if k.found != "svc.b.test." {
		t.Errorf("found %q", k.found)
	}
	expect(t, r.ask(t, "outer.x", v4, new(known)), "[10.0.0.2] 5s")
	expect(t, r.ask(t, "none", v4, new(known)), "DNS has no name none (asked for none.a.test., none.b.test., none.)")

	// Trouble with the name that it was must not lead to another service.
	trouble := func(name string) {
		s.SetMood(func(q dnstest.Query, m *dns.Msg) *dns.Msg {
			if q.Name == name {
				return dnstest.Code(dns.RcodeServerFailure)(q, m)
			}
			return m
		})
	}
	trouble("svc.b.test.")
	expect(t, r.ask(t, "svc", v4, k), "looking up A of svc.b.test.: DNS server "+s.Addr+": answered SERVFAIL")
	// A search domain that never works does not matter.
	trouble("svc.a.test.")
	expect(t, r.ask(t, "svc", v4, k), "[10.0.0.1] 5s")
	// But it may be the right one.
	trouble("none.a.test.")
	expect(t, r.ask(t, "none", v4, new(known)), "answered SERVFAIL")
}

// TestResolveOneFamilyFails: the other's addresses count, and those that the first had before stay.
func TestResolveOneFamilyFails(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "svc.test. 5 IN A 10.0.0.1", "svc.test. 5 IN AAAA fd00::1")
	r := resolverOf(t, "options attempts:1", s.Addr)
	fail := func(types ...string) {
		s.SetMood(func(q dnstest.Query, m *dns.Msg) *dns.Msg {
			if slices.Contains(types, q.Type) {
				return dnstest.Code(dns.RcodeServerFailure)(q, m)
			}
			return m
		})
	}
	k := new(known)
	fail("AAAA")
	expect(t, r.ask(t, "svc.test.", both, k), "[10.0.0.1] 5s")
	fail()
	expect(t, r.ask(t, "svc.test.", both, k), "[10.0.0.1 fd00::1] 5s")
	fail("AAAA")
	s.Set(t, "svc.test. 5 IN A 10.0.0.2")
	expect(t, r.ask(t, "svc.test.", both, k), "[10.0.0.2 fd00::1] 5s")
	fail("A", "AAAA")
	expect(t, r.ask(t, "svc.test.", both, k), "answered SERVFAIL")
	fail("A")
	expect(t, r.ask(t, "svc.test.", both, k), "answered SERVFAIL") // No AAAA, and A is not known.
	fail()
	expect(t, r.ask(t, "svc.test.", both, k), "[10.0.0.2] 5s")
}

func TestResolveHostsFirst(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "svc.test. 5 IN A 10.0.0.1", "svc.test. 5 IN AAAA fd00::1")
	r := resolverOf(t, "", s.Addr)
	r.hosts = writeFile(t, "hosts", "10.9.9.9 svc.test")
	expect(t, r.ask(t, "svc.test", both, new(known)), "[10.9.9.9]")
	expect(t, r.ask(t, "svc.test", families{v6: true}, new(known)), "[fd00::1]")
	expect(t, r.ask(t, "localhost", both, new(known)), "[127.0.0.1 ::1]")
	// Without DNS servers Go's resolver is asked, which has no server but may know names of the machine.
	r.own, r.conf, r.hosts = nil, filepath.Join(t.TempDir(), "none"), filepath.Join(t.TempDir(), "none")
	if addrs, _, err := r.addresses(t.Context(), "127.0.0.1", both, new(known)); err != nil || fmt.Sprint(addrs) != "[127.0.0.1]" {
		t.Errorf("got %v, %v", addrs, err)
	}
}

// TestResolveCancelled: nobody waits for a server when nobody wants to know any more.
func TestResolveCancelled(t *testing.T) {
	s := dnstest.New(t)
	s.SetMood(dnstest.Silent)
	r := resolverOf(t, "", s.Addr)
	r.timeout = time.Hour
	ctx, cancel := context.WithCancel(t.Context())
	arrived := s.Arrived()
	go func() {
		<-arrived
		cancel()
	}()
	if _, _, err := r.addresses(ctx, "svc.test.", families{v4: true}, new(known)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v; want context.Canceled", err)
	}
}

func TestFollow(t *testing.T) {
	rr := func(s string) dns.RR {
		r, err := dns.NewRR(s)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	msb := rr("a.test. 0 IN A 10.0.0.1")
	msb.Header().Ttl = 1 << 31
	list, _, ttl := follow([]dns.RR{rr("b.test. 1 IN A 10.0.0.9"), msb, rr("a.test. 5 CH A 10.0.0.2")}, "A.test.", dns.TypeA)
	if len(list) != 1 || ttl != 0 {
		t.Errorf("got %v, %v", list, ttl)
	}
	list, end, ttl := follow([]dns.RR{rr("c.test. 8 IN A 10.0.0.1"), rr("b.test. 4 IN CNAME c.test."), rr("a.test. 6 IN CNAME b.test.")}, "a.test.", dns.TypeA)
	if len(list) != 1 || end != "c.test." || ttl != 4*time.Second {
		t.Errorf("got %v at %s for %v; the order of records does not matter", list, end, ttl)
	}
}
