package discovery

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/miekg/dns"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/dnstest"
)

// askFor is a DNS configuration that asks a test's server.
func askFor(s *dnstest.Server) DNS {
	return DNS{Resolver: &Resolver{Addresses: []string{s.Addr}}}
}

func TestA(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "svc.test. 1 IN A 10.0.0.2", "svc.test. 1 IN A 10.0.0.1", "svc.test. 1 IN AAAA fd00::1")
	a := &A{Name: "svc.test.", Port: "50051", DNS: askFor(s)}
	r := watch(t, a)
	r.awaitList(t, "10.0.0.1:50051,name=svc.test", "10.0.0.2:50051,name=svc.test", "[fd00::1]:50051,name=svc.test")
	list, _ := r.last()
	if want := "dns:///svc.test.:50051"; list[0].Origin != want {
		t.Errorf("origin is %q; want %q", list[0].Origin, want)
	}
	// Its TTL of a second makes the source look again by itself.
	s.Set(t, "svc.test. 1 IN A 10.0.0.3")
	r.awaitList(t, "10.0.0.3:50051,name=svc.test")
}

// TestAKeepsQuiet: an answer that is the same is handed on once.
func TestAKeepsQuiet(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "svc.test. 1 IN A 10.0.0.1")
	r := watch(t, &A{Name: "svc.test.", Port: "1", DNS: DNS{Resolver: &Resolver{Addresses: []string{s.Addr}}, Refresh: caddy.Duration(minRefresh)}})
	waitFor(t, func() bool { return len(s.Queries()) >= 10 })
	if updates, errs := r.count(); updates != 1 || errs != 0 {
		t.Errorf("%d updates, %d errors", updates, errs)
	}
}

func TestARefresh(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "svc.test. 3600 IN A 10.0.0.1")
	a := &A{Name: "svc.test.", Port: "1", DNS: askFor(s)}
	a.DNS.Refresh = caddy.Duration(time.Hour)
	r := watch(t, a)
	r.awaitList(t, "10.0.0.1:1,name=svc.test")
	s.Set(t, "svc.test. 3600 IN A 10.0.0.2")
	a.Refresh()
	a.Refresh()
	r.awaitList(t, "10.0.0.2:1,name=svc.test")
}

// TestAErrors: each kind of trouble has its words, and the source finds back.
func TestAErrors(t *testing.T) {
	s := dnstest.New(t)
	s.SetNegative(1)
	r := watch(t, &A{Name: "svc.test.", Port: "1", DNS: askFor(s)})
	r.awaitError(t, "DNS has no name svc.test.")
	s.Set(t, "svc.test. 1 IN TXT x")
	r.awaitError(t, "DNS has no such record for the name svc.test.")
	s.SetMood(dnstest.Code(dns.RcodeServerFailure))
	r.awaitError(t, "answered SERVFAIL")
	if updates, _ := r.count(); updates != 0 {
		t.Errorf("%d updates out of errors", updates)
	}
	s.Set(t, "svc.test. 1 IN A 10.0.0.1")
	s.SetMood(nil)
	r.awaitList(t, "10.0.0.1:1,name=svc.test")
	s.SetMood(dnstest.Silent)
	// The list stays, and is handed on again after the trouble.
	before, _ := r.count()
	s.SetMood(dnstest.Code(dns.RcodeRefused))
	r.awaitError(t, "answered REFUSED")
	s.SetMood(nil)
	waitFor(t, func() bool { updates, _ := r.count(); return updates == before+1 })
	r.awaitList(t, "10.0.0.1:1,name=svc.test")
}

func TestALiteral(t *testing.T) {
	for name, want := range map[string]string{"10.0.0.1": "10.0.0.1:1", "::1": "[::1]:1", "[::1]": "[::1]:1"} {
		watch(t, &A{Name: name, Port: "1"}).awaitList(t, want)
	}
}

func TestALocalhost(t *testing.T) {
	yes := true
	watch(t, &A{Name: "localhost", Port: "1", DNS: DNS{Versions: &IPVersions{IPv4: &yes}}}).awaitList(t, "127.0.0.1:1,name=localhost")
}

func TestARefused(t *testing.T) {
	no := false
	refused(t, &A{Port: "1"}, "name is missing")
	refused(t, &A{Name: "a"}, "port is missing; write the endpoints' port behind the name: a 50051")
	refused(t, &A{Name: "a", Port: "0"}, `port "0" is not a number from 1 to 65535`)
	refused(t, &A{Name: "a", Port: "65536"}, `port "65536" is not`)
	refused(t, &A{Name: "a", Port: "https"}, `port "https" is not`)
	refused(t, &A{Name: "dns:///a", Port: "1"}, "is not a name")
	refused(t, &A{Name: "{http.request.host}", Port: "1"}, "placeholder that is not known")
	refused(t, &A{Name: "a", Port: "1", DNS: DNS{Refresh: -1}}, "refresh is -1ns; the shortest is 100ms")
	refused(t, &A{Name: "a", Port: "1", DNS: DNS{Refresh: 1}}, "refresh is 1ns; the shortest is 100ms")
	refused(t, &A{Name: "a", Port: "1", DNS: DNS{DialTimeout: -1}}, "dial_timeout is -1ns")
	refused(t, &A{Name: "a", Port: "1", DNS: DNS{Versions: &IPVersions{IPv4: &no}}}, "versions excludes both")
	refused(t, &A{Name: "a", Port: "1", DNS: DNS{Resolver: &Resolver{}}}, "resolver.addresses is empty")
	for _, addr := range []string{"", ":53", "10.0.0.1:53-54", "unix//run/dns", "10.0.0.1:x"} {
		refused(t, &A{Name: "a", Port: "1", DNS: DNS{Resolver: &Resolver{Addresses: []string{addr}}}}, fmt.Sprintf("resolver address %q is not", addr))
	}
}

func TestADefaults(t *testing.T) {
	t.Setenv("A_NAME", "svc.test")
	t.Setenv("A_PORT", "50051")
	a := &A{Name: "{env.A_NAME}", Port: "{env.A_PORT}", DNS: DNS{Resolver: &Resolver{Addresses: []string{"10.0.0.1", "tcp/[::1]:5353", "udp4/dns.test"}}}}
	if err := provision(t, a); err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(a.name, a.port, a.resolver.own), "svc.test50051[{udp 10.0.0.1:53} {tcp [::1]:5353} {udp dns.test:53}]"; got != want {
		t.Errorf("got %s; want %s", got, want)
	}
	for ttl, want := range map[time.Duration]time.Duration{0: time.Second, 5 * time.Second: 5 * time.Second, time.Hour: 30 * time.Second} {
		if got := a.wait(ttl); got != want {
			t.Errorf("TTL %v: waits %v; want %v", ttl, got, want)
		}
	}
	for ttl, want := range map[time.Duration]time.Duration{0: 0, time.Millisecond: time.Second, 5 * time.Second: 5 * time.Second, time.Hour: 30 * time.Second} {
		if got := a.waitAfter(fmt.Errorf("looking: %w", &noRecordsError{ttl: ttl})); got != want {
			t.Errorf("nothing for %v: waits %v; want %v", ttl, got, want)
		}
	}
	if got := a.waitAfter(errors.New("timeout")); got != 0 {
		t.Errorf("waits %v after trouble; want as long as failures make it", got)
	}
	a.DNS.Refresh = caddy.Duration(minRefresh)
	if got := a.wait(0); got != minRefresh {
		t.Errorf("waits %v; want %v", got, minRefresh)
	}
}

func TestLoneAddress(t *testing.T) {
	parse := func(s string) (addrs []netip.Addr) {
		for a := range strings.FieldsSeq(s) {
			addrs = append(addrs, netip.MustParseAddr(a))
		}
		return addrs
	}
	now := time.Now()
	for _, c := range []struct {
		name  string
		looks []string
		want  int // Which look warns; -1 is none.
	}{
		{"one", []string{"10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.1"}, 2},
		{"one of each family", []string{"10.0.0.1 fd00::1", "10.0.0.1 fd00::1", "10.0.0.1 fd00::1"}, 2},
		{"two", []string{"10.0.0.1 10.0.0.2", "10.0.0.1 10.0.0.2", "10.0.0.1 10.0.0.2"}, -1},
		{"changes", []string{"10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.2"}, -1},
		{"grows for a while", []string{"10.0.0.1", "10.0.0.1", "10.0.0.1 10.0.0.2", "10.0.0.1", "10.0.0.1"}, -1},
		{"loopback", []string{"127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.1"}, -1},
	} {
		var l loneAddress
		for i, look := range c.looks {
			if got := l.suspicious(parse(look), now.Add(time.Duration(i)*loneFor/2)); got != (i == c.want) {
				t.Errorf("%s: look %d: warns: %v", c.name, i, got)
			}
		}
	}
}

const dnsCaddyfile = `refresh 5s
	resolvers 10.0.0.1
	resolvers 10.0.0.2:5353 tcp/10.0.0.3
	dial_timeout 2s
	dial_fallback_delay off
	versions ipv4 ipv6
}`

const dnsJSON = `"refresh":5000000000,"resolver":{"addresses":["10.0.0.1","10.0.0.2:5353","tcp/10.0.0.3"]},` +
	`"dial_timeout":2000000000,"dial_fallback_delay":-1,"versions":{"ipv4":true,"ipv6":true}}`

func TestACaddyfile(t *testing.T) {
	runCaddyfile(t, []caddyfileCase{
		{input: "a svc.test 50051", json: `{"name":"svc.test","port":"50051"}`},
		{input: "a {\n name svc.test\n port 1\n" + dnsCaddyfile, json: `{"name":"svc.test","port":"1",` + dnsJSON},
		{input: "a svc 1 2", err: "wrong argument count"},
		{input: "a svc 1 {\n name b\n}", err: "name is given twice"},
		{input: "a svc 1 {\n port 2\n}", err: "port is given twice"},
		{input: "a svc 1 {\n ttl 2s\n}", err: `unrecognized subdirective "ttl"; expected name, port, refresh`},
		{input: "a svc 1 {\n refresh soon\n}", err: `refresh: "soon" is not a duration; write 30s, say`},
		{input: "a svc 1 {\n refresh 0s\n}", err: `refresh: "0s" is not positive`},
		{input: "a svc 1 {\n refresh 1s\n refresh 2s\n}", err: "refresh is given twice"},
		{input: "a svc 1 {\n resolvers\n}", err: "wrong argument count"},
		{input: "a svc 1 {\n versions\n}", err: "wrong argument count"},
		{input: "a svc 1 {\n versions ipv5\n}", err: `versions: "ipv5" is neither ipv4 nor ipv6`},
		{input: "a svc 1 {\n dial_timeout -1s\n}", err: `dial_timeout: "-1s" is not positive`},
		{input: "a svc 1 {\n dial_fallback_delay on\n}", err: `dial_fallback_delay: "on" is neither a positive duration`},
	})
}

func TestTarget(t *testing.T) {
	for s, want := range map[string]string{
		"dns:///svc.test:50051":                  "svc.test 50051",
		"dns:///svc.test":                        "svc.test 443",
		"dns:svc.test:50051":                     "svc.test 50051",
		"dns:svc.test":                           "svc.test 443",
		"DNS://10.0.0.1:5353/svc.test:1":         "svc.test 1 [10.0.0.1:5353]",
		"dns://[fd00::1]/svc.test":               "svc.test 443 [[fd00::1]]",
		"dns:///[::1]:1":                         "::1 1",
		"dns:///[::1]":                           "::1 443",
		"dns:///10.0.0.1:1":                      "10.0.0.1 1",
		"dns://dns.test/{env.A_NAME}:{env.PORT}": "{env.A_NAME} {env.PORT} [dns.test]",
	} {
		a, err := Target(s)
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		got := a.Name + " " + a.Port
		if a.Resolver != nil {
			got += fmt.Sprint(" ", a.Resolver.Addresses)
		}
		if got != want {
			t.Errorf("%s: got %s; want %s", s, got, want)
		}
	}
	for s, want := range map[string]string{
		"svc.test:1":         "is not of the scheme dns",
		"dns://svc.test:1":   "what follows dns:// is the DNS server to ask; write dns:///svc.test:1",
		"dns:///":            "has no name",
		"dns:":               "has no name",
		"dns:///a:1,b:2":     "separate addresses by blanks",
		"dns:///:1":          `"" is not a name`,
		"dns:///svc.test:":   "ends with a colon",
		"dns:///a/b:1":       `"a/b" is not a name`,
		"dns:///::1":         "too many colons",
		"dns:///svc.test:1/": "is not a number", // The port, when provisioned.
	} {
		a, err := Target(s)
		if err == nil {
			err = provision(t, a)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got error %v; want %q", s, err, want)
		}
	}
}

// ExampleTarget shows a source at work: it hands the list of endpoints to a sink whenever it changes.
func ExampleTarget() {
	source, err := Target("dns:///127.0.0.1:50051")
	if err != nil {
		panic(err)
	}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	if err := source.Provision(ctx); err != nil {
		panic(err)
	}
	sink := newRecorder()
	go source.Watch(ctx, sink)
	<-sink.news
	list, _ := sink.last()
	fmt.Println(list[0].Address, list[0].Origin)
	// Output: 127.0.0.1:50051 dns:///127.0.0.1:50051
}

// waitFor waits until something is so.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("waited too long")
		}
		<-tick.C
	}
}
