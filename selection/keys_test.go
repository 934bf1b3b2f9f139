package selection

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/bits"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
)

// metadata is request metadata as a call on any way has it.
type metadata map[string][]string

func (m metadata) Values(key string) []string { return m[key] }

// fullCall has a value for every source.
func fullCall(t testing.TB) *call.Call {
	t.Helper()
	subject, err := asn1.Marshal(pkix.Name{CommonName: "me"}.ToRDNSequence())
	if err != nil {
		t.Fatal(err)
	}
	id, err := url.Parse("spiffe://example.org/me")
	if err != nil {
		t.Fatal(err)
	}
	repl := caddy.NewReplacer()
	repl.Set("user", "joe")
	return &call.Call{
		Service: "pkg.S", Method: "M", Path: "/pkg.S/M", URI: "/pkg.S/M?a=1&b=x%20y&a=2&empty=&c", Authority: "example.org:443",
		Metadata: metadata{
			"x-user":  {"u1"},
			"x-many":  {"a", "b", "c"},
			"x-empty": {""},
			"cookie":  {"first=1; second=two", `lb="quoted"; third`},
		},
		Peer:         netip.MustParseAddrPort("[::ffff:10.0.0.7]:1234"),
		ClientIP:     netip.MustParseAddr("2001:db8::7"),
		TLS:          &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{RawSubject: subject, URIs: []*url.URL{id}, DNSNames: []string{"me.example.org"}}}},
		Placeholders: repl,
	}
}

// What is hashed, and that equal texts of different sources have equal hashes, as in gRPC and Envoy.
func TestKeySources(t *testing.T) {
	c := fullCall(t)
	tests := []struct {
		key  HashKey
		want string
	}{
		{HashKey{Source: "header", Name: "X-User"}, "u1"},
		{HashKey{Source: "header", Name: "x-many"}, "a,b,c"},
		{HashKey{Source: "header", Name: "x-empty"}, ""},
		{HashKey{Source: "header", Name: "x-missing"}, ""},
		{HashKey{Source: "header", Name: "Host"}, "example.org:443"},
		{HashKey{Source: "method"}, "M"},
		{HashKey{Source: "service"}, "pkg.S"},
		{HashKey{Source: "path"}, "/pkg.S/M"},
		{HashKey{Source: "uri"}, c.URI},
		{HashKey{Source: "authority"}, "example.org:443"},
		{HashKey{Source: "client_ip"}, "2001:db8::7"},
		{HashKey{Source: "peer_ip"}, "10.0.0.7"},
		{HashKey{Source: "tls_subject"}, string(c.TLS.PeerCertificates[0].RawSubject)},
		{HashKey{Source: "tls_san"}, "spiffe://example.org/me"},
		{HashKey{Source: "cookie", Name: "first"}, "1"},
		{HashKey{Source: "cookie", Name: "second"}, "two"},
		{HashKey{Source: "cookie", Name: "lb"}, "quoted"},
		{HashKey{Source: "cookie", Name: "third"}, ""},
		{HashKey{Source: "cookie", Name: "First"}, ""},
		{HashKey{Source: "query", Name: "a"}, "1,2"},
		{HashKey{Source: "query", Name: "b"}, "x y"},
		{HashKey{Source: "query", Name: "c"}, ""},
		{HashKey{Source: "query", Name: "empty"}, ""},
		{HashKey{Source: "query", Name: "missing"}, ""},
		{HashKey{Source: "placeholder", Name: "{user}"}, "joe"},
		{HashKey{Source: "placeholder", Name: "{user}/{missing}"}, "joe/"},
		{HashKey{Source: "placeholder", Name: "{missing}"}, ""},
		{HashKey{Source: "placeholder", Name: "{http.request.header.X-Many}"}, "a,b,c"},
	}
	for _, tt := range tests {
		s, err := newSources([]HashKey{tt.key})
		if err != nil {
			t.Errorf("%+v: %v", tt.key, err)
			continue
		}
		h, ok := s.hash(c)
		if want := xxhash.Sum64String(tt.want); ok != (tt.want != "") || ok && h != want {
			t.Errorf("%+v: %x, %v; want the hash of %q, %x", tt.key, h, ok, tt.want, want)
		}
		if h, ok := s.hash(new(call.Call)); ok {
			t.Errorf("%+v: an empty call has the hash %x", tt.key, h)
		}
		if h, ok := s.hash(nil); ok {
			t.Errorf("%+v: no call has the hash %x", tt.key, h)
		}
	}
}

func TestClientName(t *testing.T) {
	c := fullCall(t)
	cert := c.TLS.PeerCertificates[0]
	cert.EmailAddresses, cert.IPAddresses = []string{"me@example.org"}, []net.IP{net.IPv4(10, 0, 0, 1)}
	for _, want := range []string{"spiffe://example.org/me", "me.example.org", "me@example.org", "10.0.0.1", ""} {
		if got := clientName(c); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		switch want { // Take away what was found.
		case "spiffe://example.org/me":
			cert.URIs = nil
		case "me.example.org":
			cert.DNSNames = nil
		case "me@example.org":
			cert.EmailAddresses = nil
		case "10.0.0.1":
			cert.IPAddresses = nil
		}
	}
}

func TestKeysCombined(t *testing.T) {
	header := func(name string, terminal bool) HashKey {
		return HashKey{Source: "header", Name: name, Terminal: terminal}
	}
	hash := func(parts ...string) (h uint64) {
		for _, p := range parts {
			h = bits.RotateLeft64(h, 1) ^ xxhash.Sum64String(p)
		}
		return h
	}
	tests := []struct {
		name string
		keys []HashKey
		want uint64
		none bool
	}{
		{"two", []HashKey{header("x-user", false), {Source: "method"}}, hash("u1", "M"), false},
		{"other order", []HashKey{{Source: "method"}, header("x-user", false)}, hash("M", "u1"), false},
		{"twice the same", []HashKey{header("x-user", false), header("x-user", false)}, hash("u1", "u1"), false},
		{"missing one", []HashKey{header("x-none", false), {Source: "method"}}, hash("M"), false},
		{"terminal", []HashKey{header("x-user", true), {Source: "method"}}, hash("u1"), false},
		{"terminal missing", []HashKey{header("x-none", true), {Source: "method"}}, hash("M"), false},
		{"terminal missing after one", []HashKey{{Source: "service"}, header("x-none", true), {Source: "method"}}, hash("pkg.S"), false},
		{"all missing", []HashKey{header("x-none", true), header("x-empty", false)}, 0, true},
	}
	for _, tt := range tests {
		s, err := newSources(tt.keys)
		if err != nil {
			t.Fatal(err)
		}
		if h, ok := s.hash(fullCall(t)); ok == tt.none || h != tt.want {
			t.Errorf("%s: %x, %v; want %x", tt.name, h, ok, tt.want)
		}
	}
	if hash("M", "u1") == hash("u1", "M") || hash("u1", "u1") == 0 {
		t.Error("the combination does not tell these apart")
	}
}

func TestKeysNoAllocation(t *testing.T) {
	c := fullCall(t)
	for _, k := range []HashKey{
		{Source: "header", Name: "x-user"},
		{Source: "header", Name: "x-many"},
		{Source: "method"},
		{Source: "service"},
		{Source: "path"},
		{Source: "authority"},
		{Source: "client_ip"},
		{Source: "peer_ip"},
		{Source: "tls_subject"},
		{Source: "cookie", Name: "lb"},
		{Source: "query", Name: "a"},
		{Source: "placeholder", Name: "{http.request.header.x-user}"},
	} {
		s, err := newSources([]HashKey{k})
		if err != nil {
			t.Fatal(err)
		}
		if n := testing.AllocsPerRun(100, func() { s.hash(c) }); n != 0 {
			t.Errorf("%+v: %v allocations", k, n)
		}
	}
}

func TestKeyErrors(t *testing.T) {
	for _, tt := range []struct {
		key  HashKey
		want string
	}{
		{HashKey{}, "the source is missing; it is one of header, "},
		{HashKey{Source: "heather", Name: "x"}, `there is no source "heather"; it is one of header, `},
		{HashKey{Source: "header"}, "source header needs a name"},
		{HashKey{Source: "cookie"}, "source cookie needs a name"},
		{HashKey{Source: "query"}, "source query needs a name"},
		{HashKey{Source: "method", Name: "x"}, `source method takes no name, but "x" is given`},
		{HashKey{Source: "header", Name: "x user"}, `"x user" is not a metadata key: ' ' is none of`},
		{HashKey{Source: "header", Name: "trace-bin"}, `"trace-bin" is binary metadata`},
		{HashKey{Source: "placeholder", Name: "user"}, `there is no placeholder in "user"; write {`},
	} {
		if _, err := newSources([]HashKey{tt.key}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.key, err, tt.want)
		}
	}
	if _, err := newSources(nil); err == nil || !strings.Contains(err.Error(), "nothing to hash") {
		t.Errorf("no keys: %v", err)
	}
}

func BenchmarkHashKey(b *testing.B) {
	c := fullCall(b)
	for _, k := range []HashKey{
		{Source: "header", Name: "x-user"},
		{Source: "path"},
		{Source: "client_ip"},
		{Source: "cookie", Name: "lb"},
		{Source: "placeholder", Name: "{user}"},
	} {
		s, err := newSources([]HashKey{k})
		if err != nil {
			b.Fatal(err)
		}
		b.Run(k.Source, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				s.hash(c)
			}
		})
	}
}
