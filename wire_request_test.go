package grpcproxy_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// request sends a head of the test's own making, with END_STREAM, and returns what came of it at the upstream.
func (r *rig) request(fields []hpack.HeaderField) wiretest.Frame {
	r.t.Helper()
	c := &rpc{r: r, client: r.client, id: r.client.Open(fields, true)}
	c.take(0)
	c.head()
	c.trailers()
	c.ok()
	return c.req
}

// without drops the fields that every request has.
func without(fields []hpack.HeaderField, names ...string) []hpack.HeaderField {
	return slices.DeleteFunc(slices.Clone(fields), func(f hpack.HeaderField) bool { return slices.Contains(names, f.Name) })
}

// gRPC over HTTP/2: "Request-Headers → Call-Definition *Custom-Metadata"; "Call-Definition → Method Scheme Path TE
// [Authority] [Timeout] Content-Type [Message-Type] [Message-Encoding] [Message-Accept-Encoding] [User-Agent]".
func TestWireRequestHead(t *testing.T) {
	r := newRig(t, rigOptions{})
	req := r.request(append(r.client.Request("/pkg.v1.Service/Do%20It?q=1"), wiretest.Fields(
		"user-agent", "grpc-go/1.80", "grpc-encoding", "gzip", "grpc-accept-encoding", "gzip,identity",
		"x-many", "b", "x-many", "a", "x-many", "b", "x-data-bin", "AP8=", "x-data-bin", "AP8,AQI", "x-empty", "",
		"authorization", "Bearer t", "cookie", "a=1", "accept-encoding", "identity", "x-latin", "caf\xe9",
		"traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "grpc-trace-bin", "AAAB", "grpc-timeout", "99999999H",
	)...))
	want := wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/pkg.v1.Service/Do%20It?q=1", ":authority", r.H2C,
		"content-type", "application/grpc", "te", "trailers",
		"user-agent", "grpc-go/1.80", "grpc-encoding", "gzip", "grpc-accept-encoding", "gzip,identity",
		"x-many", "b", "x-many", "a", "x-many", "b", "x-data-bin", "AP8=", "x-data-bin", "AP8,AQI", "x-empty", "",
		"authorization", "Bearer t", "cookie", "a=1", "accept-encoding", "identity", "x-latin", "caf\xe9",
		"traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "grpc-trace-bin", "AAAB")
	sameFields(t, without(req.Fields, "grpc-timeout", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"), want)
	// "Request-Headers → Call-Definition *Custom-Metadata": what servers look at first stands in front, and the rest in an order
	// that is the same each time.
	var names []string
	for _, f := range req.Fields {
		if len(names) == 0 || names[len(names)-1] != f.Name {
			names = append(names, f.Name)
		}
	}
	order := "accept-encoding authorization cookie grpc-trace-bin traceparent via x-data-bin x-empty x-forwarded-for x-forwarded-host x-forwarded-proto x-latin x-many"
	if onDirect(t) { // the client's, which net/http does not keep
		order = "x-many x-data-bin x-empty authorization cookie accept-encoding x-latin traceparent grpc-trace-bin x-forwarded-for x-forwarded-proto x-forwarded-host via"
	}
	if got := strings.Join(names, " "); got != ":method :scheme :path :authority te content-type grpc-timeout grpc-encoding grpc-accept-encoding user-agent "+order {
		t.Errorf("order %s", got)
	}
	// RFC 9113 section 8.3: "All pseudo-header fields MUST appear … before all regular field lines."
	last := slices.IndexFunc(req.Fields, func(f hpack.HeaderField) bool { return !f.IsPseudo() })
	if i := slices.IndexFunc(req.Fields[last:], hpack.HeaderField.IsPseudo); i >= 0 {
		t.Errorf("pseudo-header fields are not in front: %v", req.Fields)
	}
}

// gRPC over HTTP/2: "TE → "te" "trailers" # Used to detect incompatible proxies". The field is hop-by-hop: what the client
// sent does not matter, what is sent upstream does.
func TestWireRequestHopByHop(t *testing.T) {
	r := newRig(t, rigOptions{})
	base := without(r.client.Request(wirePath), "te")
	for _, tt := range []struct {
		name string
		sent []string
	}{
		{"no te at all", nil},
		{"te: trailers", []string{"te", "trailers"}},
		{"names that concern one connection", []string{"te", "trailers", "trailer", "x-sum", "proxy-authorization", "Basic x", "proxy-authenticate", "y", "alt-svc", "h3=\":1\""}},
		{"content-length of the client", []string{"content-length", "0"}},
	} {
		r.run(tt.name, func(t *testing.T, r *rig) {
			req := r.request(append(slices.Clone(base), wiretest.Fields(tt.sent...)...))
			sameFields(t, without(req.Fields, "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"),
				append(slices.Clone(base), wiretest.Fields("te", "trailers")...))
		})
	}
}

// "The client's :authority is passed on unless header_up Host says otherwise"; :scheme is the next hop's.
func TestWireRequestAuthority(t *testing.T) {
	t.Run("passed on", func(t *testing.T) {
		r := newRig(t, rigOptions{})
		fields := r.client.Request(wirePath)
		fields[3].Value = "api.example.com:8443"
		if got := r.request(fields).Get(":authority"); got != "api.example.com:8443" {
			t.Errorf(":authority %q", got)
		}
	})
	// RFC 9113 section 8.3.1 and RFC 9110 section 4.2: neither an empty one nor one with a blank names a server.
	t.Run("none", func(t *testing.T) {
		r := newRig(t, rigOptions{})
		if got := r.request(without(r.client.Request(wirePath), ":authority")).Get(":authority"); got != r.ups[0].Addr() {
			t.Errorf(":authority %q, want the upstream's own", got)
		}
	})
	t.Run("none that can be sent", func(t *testing.T) {
		if onDirect(t) {
			return // there are no placeholders of requests
		}
		r := newRig(t, rigOptions{Block: "header_up Host {http.request.header.x-host}"})
		for sent, want := range map[string]string{"": r.ups[0].Addr(), "a b": r.ups[0].Addr(), "a:1": "a:1"} {
			if got := r.request(r.client.Request(wirePath, "x-host", sent)).Get(":authority"); got != want {
				t.Errorf(":authority %q of Host %q, want %q", got, sent, want)
			}
		}
	})
	t.Run("header_up Host", func(t *testing.T) {
		r := newRig(t, rigOptions{Block: "header_up Host backend.internal"})
		req := r.request(r.client.Request(wirePath))
		if got := req.Get(":authority"); got != "backend.internal" {
			t.Errorf(":authority %q", got)
		}
		if got := req.Get("x-forwarded-host"); got != r.H2C {
			t.Errorf("x-forwarded-host %q, want what the client asked for", got)
		}
		if wiretest.Values(req.Fields, "host") != nil {
			t.Errorf("a field host beside :authority: %v", req.Fields)
		}
	})
	t.Run("over TLS to a plaintext upstream", func(t *testing.T) {
		ca := wiretest.NewCA(t)
		var o rigOptions
		o.Caddy.CertFile, o.Caddy.KeyFile = ca.PairFiles(ca.ServerCert())
		r := newRig(t, o)
		r.client = wiretest.Dial(t, r.TLS, ca.ClientConfig())
		req := r.request(r.client.Request(wirePath))
		if got := req.Get(":scheme"); got != "http" {
			t.Errorf(":scheme %q, want http: the upstream is plaintext", got)
		}
		if got := req.Get("x-forwarded-proto"); got != "https" {
			t.Errorf("x-forwarded-proto %q, want https", got)
		}
	})
	t.Run("plaintext to a TLS upstream", func(t *testing.T) {
		ca := wiretest.NewCA(t)
		r := newRig(t, rigOptions{
			Scheme: "https://", Block: "tls_trust_pool file " + ca.File(), Up: wiretest.Options{TLS: ca.ServerConfig()},
		})
		fields := r.client.Request(wirePath)
		fields[3].Value = "api.example.com"
		req := r.request(fields)
		if got := req.Get(":scheme"); got != "https" {
			t.Errorf(":scheme %q, want https: the upstream speaks TLS", got)
		}
		if got := req.Get(":authority"); got != "api.example.com" {
			t.Errorf(":authority %q, want the client's, also to a TLS upstream", got)
		}
		if got := req.Get("x-forwarded-proto"); got != "http" {
			t.Errorf("x-forwarded-proto %q, want http", got)
		}
	})
}

// "X-Forwarded-For/Proto/Host and Via as reverse_proxy sets them, trusted proxies respected."
func TestWireForwarded(t *testing.T) {
	const forged = "203.0.113.7"
	for _, tt := range []struct {
		name, block      string
		trusted          []netip.Prefix
		sent             []string
		xff, proto, host string
	}{
		{name: "nothing sent", xff: "127.0.0.1", proto: "http"},
		// A client that nobody trusts cannot name itself.
		{name: "forged", sent: []string{"x-forwarded-for", forged, "x-forwarded-proto", "https", "x-forwarded-host", "evil.example"}, xff: "127.0.0.1", proto: "http"},
		{
			name: "trusted by the handler", block: "trusted_proxies 127.0.0.0/8",
			sent: []string{"x-forwarded-for", forged, "x-forwarded-proto", "https", "x-forwarded-host", "shop.example"},
			xff:  forged + ", 127.0.0.1", proto: "https", host: "shop.example",
		},
		{
			name: "trusted by the server", trusted: fromClients,
			sent: []string{"x-forwarded-for", forged, "x-forwarded-for", "10.0.0.1", "x-forwarded-proto", "https"},
			xff:  forged + ", 10.0.0.1, 127.0.0.1", proto: "https",
		},
		{name: "trusted are others", block: "trusted_proxies 192.0.2.0/24", sent: []string{"x-forwarded-for", forged}, xff: "127.0.0.1", proto: "http"},
		{name: "private ranges", block: "trusted_proxies private_ranges", sent: []string{"x-forwarded-for", forged}, xff: forged + ", 127.0.0.1", proto: "http"},
		{name: "deleted by header_up", block: "header_up -X-Forwarded-For", proto: "http"},
		{name: "set by header_up", block: "header_up X-Forwarded-For {remote_host}!", xff: "127.0.0.1!", proto: "http"},
	} {
		if onDirect(t) && strings.Contains(tt.block, "{") {
			continue // there are no placeholders of requests
		}
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, rigOptions{Block: tt.block, Trusted: tt.trusted})
			req := r.request(append(r.client.Request(wirePath), wiretest.Fields(tt.sent...)...))
			host := tt.host
			if host == "" {
				host = r.H2C
			}
			for _, want := range []struct{ name, value string }{
				{"x-forwarded-for", tt.xff}, {"x-forwarded-proto", tt.proto}, {"x-forwarded-host", host}, {"via", "2.0 Caddy"},
			} {
				got := strings.Join(wiretest.Values(req.Fields, want.name), " | ")
				if got != want.value {
					t.Errorf("%s: %q, want %q", want.name, got, want.value)
				}
			}
		})
	}
	// RFC 9110 section 7.6.3: a proxy appends itself to what is there.
	t.Run("via of others is kept", func(t *testing.T) {
		r := newRig(t, rigOptions{})
		req := r.request(append(r.client.Request(wirePath), wiretest.Fields("via", "1.1 edge", "via", "2.0 mid")...))
		if got := strings.Join(wiretest.Values(req.Fields, "via"), " | "); got != "1.1 edge, 2.0 mid, 2.0 Caddy" {
			t.Errorf("via: %q", got)
		}
	})
}

// RFC 9113 section 6.5.2: SETTINGS_MAX_HEADER_LIST_SIZE "informs a peer of the maximum field section size that the sender is
// prepared to accept". A call beyond it is not sent there: it goes to an upstream that accepts it, or is told why not.
func TestWireRequestTooLarge(t *testing.T) {
	r := newRig(t, rigOptions{Upstreams: 2, Block: "lb_policy first"})
	large := strings.Repeat("x", 5000)
	limit := func(p *peer, most uint32) {
		p.conn.WriteSettings(http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: most})
		p.conn.Barrier()
	}
	r.complete()
	limit(r.ups[0], 4096)
	elsewhere := r.open("x-large", large)
	elsewhere.client.WriteData(elsewhere.id, wiretest.Message(nil), true)
	elsewhere.take(1)
	elsewhere.answerOK()
	r.complete() // the first one is none the worse for it

	limit(r.ups[1], 2048)
	c := r.open("x-large", large)
	c.client.WriteData(c.id, wiretest.Message(nil), true)
	r.checkFailure(c.result(), failure{
		code: codes.ResourceExhausted, reason: "REQUEST_METADATA_TOO_LARGE", attempts: 2,
		says: []string{"the call's metadata is larger than the upstream accepts: 5", " bytes, the peer accepts 2048 (SETTINGS_MAX_HEADER_LIST_SIZE)"},
	})
	r.complete()
}

// header_up and header_down with reverse_proxy's words.
func TestWireHeaderOps(t *testing.T) {
	block := `
		header_up X-Set new
		header_up +X-Add two
		header_up -X-Gone
		header_up -X-Glob-*
		header_up X-Edit (\d+) <$1>
		header_down X-Set new
		header_down +X-Add two
		header_down -X-Gone
		header_down X-Edit (\d+) <$1>
	`
	if !onDirect(t) { // where there are no placeholders of requests
		block += `
		header_up X-Upstream {http.grpc_proxy.upstream.hostport}
		header_up X-Short {upstream_hostport}
		header_up X-Method {http.grpc_proxy.service}|{http.grpc_proxy.method}
		header_up X-Remote {remote_host}
		header_down X-Upstream {http.grpc_proxy.upstream.hostport}
		`
	}
	r := newRig(t, rigOptions{Block: block})
	addr := r.ups[0].Addr()
	in := []string{"x-set", "old", "x-add", "one", "x-gone", "1", "x-edit", "a1b22"}
	out := []string{"x-set", "new", "x-add", "one", "x-add", "two", "x-edit", "a<1>b<22>"}
	up := slices.Clone(out)
	if !onDirect(t) {
		out = append(out, "x-upstream", addr)
		up = append(up, "x-upstream", addr, "x-short", addr, "x-method", "test.Service|Method", "x-remote", "127.0.0.1")
	}

	r.run("request", func(t *testing.T, r *rig) {
		req := r.request(append(r.client.Request(wirePath), wiretest.Fields(append(slices.Clone(in), "x-glob-a", "1", "x-glob-b", "2")...)...))
		sameFields(t, without(req.Fields, "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"),
			append(r.client.Request(wirePath), wiretest.Fields(up...)...))
	})
	r.run("response head, and not trailers", func(t *testing.T, r *rig) {
		c := r.unary()
		c.head(in...)
		c.message("response")
		c.trailers(append([]string{"grpc-status", "0"}, in...)...)
		h := c.result()
		sameFields(t, h.Head, wiretest.Head(out...))
		sameFields(t, h.Trailers, wiretest.Fields(append([]string{"grpc-status", "0"}, in...)...))
	})
	r.run("Trailers-Only", func(t *testing.T, r *rig) {
		c := r.unary()
		c.up.WriteHeaders(c.sid, wiretest.Head(append([]string{"grpc-status", "7"}, in...)...), true)
		h := c.result()
		if h.Sequence() != "HEADERS+END_STREAM" {
			t.Errorf("frames %s", h.Sequence())
		}
		sameFields(t, h.Head, wiretest.Head(append([]string{"grpc-status", "7"}, out...)...))
	})
}
