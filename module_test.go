package grpcproxy

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// provision runs a handler's life up to Validate, as Caddy does.
func provision(t testing.TB, h *Handler) error {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	if err := h.Provision(ctx); err != nil {
		return err
	}
	return h.Validate()
}

func references(t *testing.T, h *Handler) int {
	t.Helper()
	e := h.cluster.View().Endpoints[0].Endpoint
	n := 0
	transport.Pool.Range(func(key string, v *transport.Endpoint) bool {
		if v == e {
			n, _ = transport.Pool.References(key)
		}
		return true
	})
	return n
}

// TestCleanupGivesBackWhatProvisionTook: a configuration that fails half way, cleaned up twice, leaves the running
// one's endpoints alone (reverse_proxy forgets them).
func TestCleanupGivesBackWhatProvisionTook(t *testing.T) {
	running := &Handler{Upstreams: []*Upstream{{Dial: "127.0.0.1:7001"}}}
	if err := provision(t, running); err != nil {
		t.Fatal(err)
	}
	same := &Handler{Upstreams: []*Upstream{{Dial: "127.0.0.1:7001"}}}
	if err := provision(t, same); err != nil {
		t.Fatal(err)
	}
	if same.cluster.View().Endpoints[0] != running.cluster.View().Endpoints[0] {
		t.Fatal("two handlers with the same upstream do not share its connections")
	}
	if n := references(t, running); n != 2 {
		t.Fatalf("%d references, want 2", n)
	}

	failing := &Handler{
		Upstreams:      []*Upstream{{Dial: "127.0.0.1:7001"}},
		StreamTimeout:  -1, // refused by Validate, when everything was acquired
		TrustedProxies: []string{"10.0.0.0/8"},
	}
	if err := provision(t, failing); err == nil || !strings.Contains(err.Error(), "stream_timeout is -1ns; it must not be negative") {
		t.Fatalf("error %v", err)
	}
	half := &Handler{Upstreams: []*Upstream{{Dial: "127.0.0.1:7001"}, {Dial: "nonsense"}}}
	if err := provision(t, half); err == nil {
		t.Fatal("a bad upstream was accepted")
	}
	for range 2 {
		for _, h := range []*Handler{failing, half, same} {
			if err := h.Cleanup(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := references(t, running); n != 1 {
		t.Fatalf("%d references, want the running handler's one", n)
	}
	if err := running.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if n := references(t, running); n != 0 {
		t.Fatalf("%d references after all is gone", n)
	}
}

// TestIdentity: what makes a connection different keeps connections apart; what does not, shares them.
func TestIdentity(t *testing.T) {
	one, other := wiretest.NewCA(t), wiretest.NewCA(t)
	oneFile, otherFile := one.File(), other.File()
	cert, key := one.PairFiles(one.ClientCert("client"))
	pool := func(file string) json.RawMessage {
		raw, err := json.Marshal(map[string]any{"provider": "file", "pem_files": []string{file}})
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	make := func(tr *Transport) *transport.Endpoint {
		h := &Handler{Upstreams: []*Upstream{{Dial: "127.0.0.1:7002"}}, Transport: tr}
		if err := provision(t, h); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = h.Cleanup() })
		return h.cluster.View().Endpoints[0].Endpoint
	}
	withCA := func(file string) *Transport {
		return &Transport{TLS: &reverseproxy.TLSConfig{CARaw: pool(file)}}
	}
	plain, tls := make(nil), make(withCA(oneFile))
	if make(nil) != plain || make(withCA(oneFile)) != tls {
		t.Error("equal transports do not share")
	}
	if make(&Transport{MinConns: 1, MaxConns: 3, QueueSize: new(int), QueueFullStatus: "RESOURCE_EXHAUSTED"}) != plain {
		t.Error("how many connections there may be, and how many calls may wait, keeps connections apart")
	}
	distinct := map[*transport.Endpoint]string{plain: "plain", tls: "tls"}
	for name, tr := range map[string]*Transport{
		"another CA":     withCA(otherFile),
		"server name":    {TLS: &reverseproxy.TLSConfig{CARaw: pool(oneFile), ServerName: "x.test"}},
		"client auth":    {TLS: &reverseproxy.TLSConfig{CARaw: pool(oneFile), ClientCertificateFile: cert, ClientCertificateKeyFile: key}},
		"stream limit":   {MaxStreamsPerConn: 7},
		"ping interval":  {KeepAlive: &KeepAlive{Interval: caddy.Duration(time.Minute)}},
		"no certificate": {TLS: &reverseproxy.TLSConfig{InsecureSkipVerify: true}},
	} {
		e := make(tr)
		if have, ok := distinct[e]; ok {
			t.Errorf("%s shares connections with %s", name, have)
		}
		distinct[e] = name
	}
}

func TestValidate(t *testing.T) {
	ok := []*Upstream{{Dial: "localhost:1"}}
	for _, tc := range []struct {
		name string
		h    *Handler
		err  string
	}{
		{"no upstreams", &Handler{}, "no upstreams"},
		{"null upstream", &Handler{Upstreams: []*Upstream{nil}}, "upstreams[0] is null"},
		{"mixed schemes", &Handler{Upstreams: []*Upstream{{Dial: "a:1"}, {Dial: "https://b:1"}}}, "differ in scheme"},
		{"unknown placeholder", &Handler{Upstreams: []*Upstream{{Dial: "{http.request.host}:1"}}}, "placeholder"},
		{"unknown policy", &Handler{Upstreams: ok, LoadBalancing: &LoadBalancing{SelectionPolicyRaw: json.RawMessage(`{"policy":"nope"}`)}}, "nope"},
		{"trusted proxies", &Handler{Upstreams: ok, TrustedProxies: []string{"nope"}}, `"nope" is neither an IP address nor a CIDR range`},
		{"negative retries", &Handler{Upstreams: ok, LoadBalancing: &LoadBalancing{Retries: -1}}, "load_balancing.retries is -1"},
		{"tls for plaintext", &Handler{Upstreams: []*Upstream{{Dial: "h2c://a:1"}}, Transport: &Transport{TLS: new(reverseproxy.TLSConfig)}}, "the upstreams are plaintext"},
		{"local address", &Handler{Upstreams: ok, Transport: &Transport{LocalAddress: "nope"}}, "local_address"},
		{"resolver", &Handler{Upstreams: ok, Transport: &Transport{Resolver: &Resolver{Addresses: []string{":1-2"}}}}, "resolver address"},
		{"negative conns", &Handler{Upstreams: ok, Transport: &Transport{MaxConns: -1}}, "transport.max_conns"},
		{"short ping", &Handler{Upstreams: ok, Transport: &Transport{KeepAlive: &KeepAlive{Interval: 1}}}, "keep_alive.interval"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := provision(t, tc.h)
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("error %v, want one containing %q", err, tc.err)
			}
			if err := tc.h.Cleanup(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestPrivateRanges(t *testing.T) {
	h := &Handler{Upstreams: []*Upstream{{Dial: "unix//x"}}, TrustedProxies: []string{"private_ranges", "203.0.113.7"}}
	if err := provision(t, h); err != nil {
		t.Fatal(err)
	}
	if len(h.trusted) < 4 || h.trusted[len(h.trusted)-1].String() != "203.0.113.7/32" {
		t.Fatalf("trusted proxies %v", h.trusted)
	}
}
