package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// withRelay are the servers' options with grpc_relay.
const withRelay = "listener_wrappers {\n\tgrpc_relay\n}"

// relayWays are the ways of a call behind grpc_relay, by the global options that lead there.
var relayWays = []struct{ name, global string }{
	{"direct", ""},
	{"hop", "metrics\n"}, // so that no call is direct
}

// relayed is a client of a Caddy with grpc_relay.
type relayed struct {
	testgrpc.TestServiceClient
	dials atomic.Int64
}

// dialRelay makes a client that counts how often it connects.
func dialRelay(t *testing.T, addr string, creds credentials.TransportCredentials, opts ...grpc.DialOption) *relayed {
	t.Helper()
	c := new(relayed)
	cc := dial(t, addr, creds, append(opts, grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		c.dials.Add(1)
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}))...)
	c.TestServiceClient = testgrpc.NewTestServiceClient(cc)
	return c
}

// callsOf makes unary calls, one after the other, until it is stopped.
type callsOf struct {
	by    map[string]*atomic.Int64 // answers by the backend's name
	calls atomic.Int64
}

// run makes calls until stop is closed. A call that fails fails the test.
func (c *callsOf) run(t *testing.T, client testgrpc.TestServiceClient, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		var head metadata.MD
		if _, err := client.EmptyCall(t.Context(), &testgrpc.Empty{}, grpc.Header(&head)); err != nil {
			t.Errorf("a call failed: %v", err)
			return
		}
		c.calls.Add(1)
		if name := head.Get(backendtest.KeyBackend); len(name) == 1 && c.by[name[0]] != nil {
			c.by[name[0]].Add(1)
		}
	}
}

// openStream opens a stream that has had an answer.
func openStream(t *testing.T, c testgrpc.TestServiceClient) testgrpc.TestService_FullDuplexCallClient {
	t.Helper()
	s, err := c.FullDuplexCall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := pingPong(s, 100); err != nil {
		t.Fatal(err)
	}
	return s
}

// endStream ends a stream in order.
func endStream(t *testing.T, s testgrpc.TestService_FullDuplexCallClient) {
	t.Helper()
	if err := pingPong(s, 100); err != nil {
		t.Errorf("the stream has suffered: %v", err)
		return
	}
	if err := s.CloseSend(); err != nil {
		t.Error(err)
	}
	if _, err := s.Recv(); err == nil || err.Error() != "EOF" {
		t.Errorf("the stream ended with %v, want EOF", err)
	}
}

// rely runs a test for both ways, with and without TLS.
func rely(t *testing.T, test func(t *testing.T, o proxytest.Options, to func(*proxytest.Proxy) string, creds credentials.TransportCredentials)) {
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	for _, way := range relayWays {
		o := proxytest.Options{Servers: withRelay, Global: way.global, CertFile: cert, KeyFile: key}
		t.Run(way.name+"/plaintext", func(t *testing.T) {
			wiretest.CheckLeaks(t)
			test(t, o, func(p *proxytest.Proxy) string { return p.H2C }, nil)
		})
		t.Run(way.name+"/tls", func(t *testing.T) {
			wiretest.CheckLeaks(t)
			test(t, o, func(p *proxytest.Proxy) string { return p.TLS }, tlsTo("localhost", ca))
		})
	}
}

// TestRelayReload: 20 reloads under load of 20 clients: no call fails, no stream notices, each client connects once, and after each
// reload the new configuration has all calls.
func TestRelayReload(t *testing.T) {
	rely(t, func(t *testing.T, o proxytest.Options, to func(*proxytest.Proxy) string, creds credentials.TransportCredentials) {
		const clients = 20
		reloads := 20
		if testing.Short() {
			reloads = 5
		}
		backends := []*backendtest.Backend{
			backendtest.Start(t, backendtest.Options{Name: "a", Delay: 20 * time.Millisecond}), // calls are under way all the time
			backendtest.Start(t, backendtest.Options{Name: "b", Delay: 20 * time.Millisecond}),
		}
		o.Site = "grpc_proxy " + backends[0].Addr()
		p := proxytest.Start(t, o)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		defer func() { wg.Wait() }()
		end := sync.OnceFunc(func() { close(stop) })
		defer end()
		all := make([]*relayed, clients)
		streams := make([]testgrpc.TestService_FullDuplexCallClient, clients)
		load := make([]callsOf, clients)
		for i := range all {
			all[i] = dialRelay(t, to(p), creds)
			streams[i] = openStream(t, all[i])
			load[i].by = map[string]*atomic.Int64{"a": new(atomic.Int64), "b": new(atomic.Int64)}
			wg.Go(func() { load[i].run(t, all[i], stop) })
		}
		for i := 1; i <= reloads && !t.Failed(); i++ {
			to := backends[i%2]
			if err := p.Load(fmt.Sprintf("grpc_proxy %s {\n\theader_up X-Generation %d\n}", to.Addr(), i)); err != nil {
				t.Fatalf("reload %d: %v", i, err)
			}
			var before [clients]int64
			for j := range load {
				before[j] = load[j].by[to.Name()].Load()
			}
			for j := range load {
				eventually(t, "the new configuration has a client's calls", func() bool {
					return t.Failed() || load[j].by[to.Name()].Load() >= before[j]+2
				})
			}
			if got, want := to.Last().Metadata.Get("x-generation"), fmt.Sprint(i); len(got) != 1 || got[0] != want {
				t.Errorf("the upstream saw the generation %v, want %s", got, want)
			}
			if err := pingPong(streams[i%clients], 1000); err != nil {
				t.Fatalf("a stream after reload %d: %v", i, err)
			}
		}
		end()
		wg.Wait()
		calls := int64(0)
		for i, c := range all {
			endStream(t, streams[i])
			if n := c.dials.Load(); n != 1 {
				t.Errorf("client %d has connected %d times", i, n)
			}
			calls += load[i].calls.Load()
		}
		t.Logf("%d reloads, %d calls", reloads, calls)
	})
}

// TestRelayFailedReload: configurations that do not start change nothing.
func TestRelayFailedReload(t *testing.T) {
	rely(t, func(t *testing.T, o proxytest.Options, to func(*proxytest.Proxy) string, creds credentials.TransportCredentials) {
		b := backendtest.Start(t, backendtest.Options{Name: "right"})
		wrong := backendtest.Start(t, backendtest.Options{Name: "wrong"})
		o.Site = "grpc_proxy " + b.Addr()
		p := proxytest.Start(t, o)
		c := dialRelay(t, to(p), creds)
		s := openStream(t, c)
		l, used := listen(t)
		defer l.Close()
		other := "grpc_proxy " + wrong.Addr()
		for range 3 {
			for _, tc := range []struct{ text, want string }{
				{p.Caddyfile(other) + "http://" + used + " {\n}\n", "address already in use"},
				{p.Caddyfile(other + " {\n\ttls_trust_pool file /does/not/exist.pem\n}"), "exist.pem"},
			} {
				if err := loadText(tc.text); err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("error %v, want one of %s", err, tc.want)
				}
				if name, _ := asked(t, c); name != "right" {
					t.Fatalf("answered by %q", name)
				}
			}
		}
		endStream(t, s)
		if n := c.dials.Load(); n != 1 {
			t.Errorf("the client has connected %d times", n)
		}
		if n := wrong.Calls().Total(); n != 0 {
			t.Errorf("a configuration that has not started has served %d calls", n)
		}
	})
}

// loadText loads a Caddyfile, even if it is the one that runs.
func loadText(text string) error {
	raw, err := proxytest.Adapt(text)
	if err != nil {
		return err
	}
	return caddy.Load(raw, true)
}

// TestRelayRemoved: a reload takes grpc_relay, or the port, away: clients leave, and no call that has begun fails.
func TestRelayRemoved(t *testing.T) {
	t.Run("wrapper", func(t *testing.T) {
		rely(t, func(t *testing.T, o proxytest.Options, to func(*proxytest.Proxy) string, creds credentials.TransportCredentials) {
			b := backendtest.Start(t, backendtest.Options{})
			o.Site = "grpc_proxy " + b.Addr()
			p := proxytest.Start(t, o)
			// A dial that the kernel had queued at a listener which Caddy then closes is reset.
			c := dialRelay(t, to(p), creds, grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
			s := openStream(t, c)
			stop := make(chan struct{})
			var load callsOf
			var wg sync.WaitGroup
			wg.Go(func() { load.run(t, c, stop) })
			if err := loadText(strings.ReplaceAll(p.Caddyfile(o.Site), "grpc_relay\n", "http_redirect\n")); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the client connects anew", func() bool { return c.dials.Load() > 1 })
			before := load.calls.Load()
			eventually(t, "calls go on", func() bool { return t.Failed() || load.calls.Load() > before+1 })
			close(stop)
			wg.Wait()
			endStream(t, s)
		})
	})
	t.Run("port", func(t *testing.T) {
		rely(t, func(t *testing.T, o proxytest.Options, to func(*proxytest.Proxy) string, creds credentials.TransportCredentials) {
			b := backendtest.Start(t, backendtest.Options{})
			o.Site = "grpc_proxy " + b.Addr()
			p := proxytest.Start(t, o)
			c := dialRelay(t, to(p), creds)
			s := openStream(t, c)
			text := p.Caddyfile(o.Site)
			for _, addr := range []string{p.H2C, p.TLS} {
				_, port, _ := net.SplitHostPort(addr)
				_, free, _ := net.SplitHostPort(proxytest.FreeAddress(t))
				text = strings.ReplaceAll(text, ":"+port, ":"+free)
			}
			if err := loadText(text); err != nil {
				t.Fatal(err)
			}
			eventually(t, "no call goes any more", func() bool {
				_, err := c.EmptyCall(within(t, timeout), &testgrpc.Empty{})
				return status.Code(err) == codes.Unavailable
			})
			endStream(t, s)
		})
	})
}

// TestRelayTerms: clients stay over a reload, unless it changes on what terms they have connected.
func TestRelayTerms(t *testing.T) {
	ca, clients, others := wiretest.NewCA(t), wiretest.NewCA(t), wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	trusted := clients.File()
	const clientAuth = "client_auth {\n\tmode require_and_verify\n\ttrust_pool file %s\n}"
	auth := fmt.Sprintf(clientAuth, trusted)
	for _, tc := range []struct {
		name     string
		tls      string // before
		old, new string // what is replaced, and by what
		trusted  string // what the file of trusted authorities has afterwards
		stays    bool
	}{
		{name: "other_site", old: "grpc_proxy", new: "header_up X-A b\n\tgrpc_proxy", stays: true},
		{name: "nothing", old: "grpc_proxy", new: "grpc_proxy", stays: true},
		{name: "client_auth", old: "protocols tls1.2", new: auth + "\n\tprotocols tls1.2"},
		{name: "tls_versions", old: "protocols tls1.2", new: "protocols tls1.3"},
		{name: "strict_sni", old: "grpc_relay\n\t\t}", new: "grpc_relay\n\t\t}\nstrict_sni_host on"},
		{name: "max_header_size", old: "grpc_relay\n\t\t}", new: "grpc_relay\n\t\t}\nmax_header_size 64KB"},
		{name: "idle", old: "grpc_relay\n\t\t}", new: "grpc_relay\n\t\t}\ntimeouts {\n\tidle 1h\n}"},
		{name: "protocols", old: "protocols h1 h2 h2c h3", new: "protocols h1"},
		{name: "same_authorities", tls: auth, old: "grpc_proxy", new: "grpc_proxy", stays: true},
		{name: "other_authorities", tls: auth, old: "grpc_proxy", new: "grpc_proxy", trusted: string(others.PEM())},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			writeText(t, trusted, string(clients.PEM()))
			b := backendtest.Start(t, backendtest.Options{})
			p := proxytest.Start(t, proxytest.Options{
				Site: "@none path /none\nrespond @none none\n\tgrpc_proxy " + b.Addr(), Servers: withRelay,
				CertFile: cert, KeyFile: key, TLS: "protocols tls1.2 tls1.3\n" + tc.tls,
			})
			cfg := ca.ClientConfig(clients.ClientCert("alice"))
			cfg.ServerName = "localhost"
			c := wiretest.Dial(t, p.TLS, cfg, wiretest.Options{NoPingAck: true})
			call := func() *wiretest.Half {
				id := c.Open(wiretest.Request("localhost", kinds[0].path()), false)
				c.WriteData(id, wiretest.Message(nil), true)
				return c.Collect(id)
			}
			if h := call(); wiretest.Get(h.Trailers, "grpc-status") != "0" {
				t.Fatalf("%v", h)
			}
			running := c.Open(wiretest.Request("localhost", "/grpc.testing.TestService/FullDuplexCall"), false)
			eventually(t, "the upstream has the stream", func() bool { return b.Calls().Of("FullDuplexCall") == 1 })
			text := p.Caddyfile("@none path /none\nrespond @none none\n\tgrpc_proxy " + b.Addr())
			changed := strings.Replace(text, tc.old, tc.new, 1)
			if tc.name == "other_site" {
				changed = strings.Replace(text, "respond @none none", "respond @none other", 2)
			}
			if tc.trusted != "" {
				writeText(t, trusted, tc.trusted)
			}
			if err := loadText(changed); err != nil {
				t.Fatal(err)
			}
			if tc.stays {
				if h := call(); wiretest.Get(h.Trailers, "grpc-status") != "0" {
					t.Fatalf("%v", h)
				}
			} else {
				c.ExpectGoAway()
				if h := call(); h.ResetCode != http2.ErrCodeRefusedStream {
					t.Errorf("%v, want REFUSED_STREAM", h)
				}
			}
			// What had begun goes on.
			c.WriteData(running, nil, true)
			if h := c.Collect(running); wiretest.Get(append(h.Head, h.Trailers...), "grpc-status") != "0" {
				t.Errorf("the stream ended with %v", h)
			}
			if tc.stays {
				for _, f := range c.Untaken(0) {
					if f.Type == http2.FrameGoAway {
						t.Errorf("%v", f)
					}
				}
			}
		})
	}
}

func writeText(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestRelayClientAuth: who has connected before a client's certificate was demanded must show one.
func TestRelayClientAuth(t *testing.T) {
	wiretest.CheckLeaks(t)
	ca, clients := wiretest.NewCA(t), wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	b := backendtest.Start(t, backendtest.Options{})
	o := proxytest.Options{Site: "grpc_proxy " + b.Addr(), Servers: withRelay, CertFile: cert, KeyFile: key, TLS: "protocols tls1.2 tls1.3"}
	p := proxytest.Start(t, o)
	stranger, alice := dialRelay(t, p.TLS, tlsTo("localhost", ca)), dialRelay(t, p.TLS, tlsTo("localhost", ca, clients.ClientCert("alice")))
	for _, c := range []*relayed{stranger, alice} {
		asked(t, c)
	}
	if err := loadText(strings.Replace(p.Caddyfile(o.Site), o.TLS, "client_auth {\n\tmode require_and_verify\n\ttrust_pool file "+clients.File()+"\n}", 1)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the one without is not served any more", func() bool {
		_, err := stranger.EmptyCall(within(t, timeout), &testgrpc.Empty{})
		return status.Code(err) == codes.Unavailable
	})
	eventually(t, "the other one connects anew, and is served", func() bool {
		_, err := alice.EmptyCall(within(t, timeout), &testgrpc.Empty{})
		return err == nil && alice.dials.Load() > 1
	})
	before := b.Calls().Total()
	if _, err := stranger.EmptyCall(within(t, timeout), &testgrpc.Empty{}); status.Code(err) != codes.Unavailable {
		t.Errorf("error %v, want UNAVAILABLE", err)
	}
	if b.Calls().Total() != before {
		t.Error("the upstream was called")
	}
}

// TestRelayRefused: configurations that cannot work are refused, with the reason.
func TestRelayRefused(t *testing.T) {
	for _, tc := range []struct{ name, wrappers, want string }{
		{"good", "grpc_relay", ""},
		{"before_tls", "grpc_relay\ntls", "grpc_relay stands before tls in listener_wrappers, where connections are still encrypted: write it behind tls"},
		{"behind_tls", "proxy_protocol\ntls\ngrpc_relay", ""},
		{"twice", "grpc_relay\ngrpc_relay", "grpc_relay stands twice in listener_wrappers: write it once"},
		{"option", "grpc_relay {\n\tfast\n}", `grpc_relay has no option "fast"`},
		{"argument", "grpc_relay fast", "wrong argument count"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			addr := proxytest.FreeAddress(t)
			err := validate("{\n\tadmin off\n\tservers {\n\t\tlistener_wrappers {\n" + tc.wrappers + "\n\t\t}\n\t}\n}\nhttp://" + addr + " {\n\trespond hello\n}\n")
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if nc, err := new(net.Dialer).DialContext(t.Context(), "tcp", addr); err == nil {
				nc.Close()
				t.Error("somebody listens")
			}
		})
	}
	t.Run("elsewhere", func(t *testing.T) {
		raw := `{"apps": {"http": {"servers": {"s": {"listen": ["127.0.0.1:0"], "listener_wrappers": [{"wrapper": "grpc_relay", "x": 1}]}}}}}`
		if err := validateJSON([]byte(raw)); err == nil || !strings.Contains(err.Error(), "unknown field") {
			t.Errorf("error %v, want one of an unknown field", err)
		}
	})
}

// validate is `caddy validate`.
func validate(text string) error {
	raw, err := proxytest.Adapt(text)
	if err != nil {
		return err
	}
	return validateJSON(raw)
}

func validateJSON(raw []byte) error {
	var cfg caddy.Config
	if err := json.Unmarshal(raw, &cfg); err != nil {
		return err
	}
	return caddy.Validate(&cfg)
}

// TestRelaySettings: clients are told the same limits as without grpc_relay, but for windows.
func TestRelaySettings(t *testing.T) {
	settings := func(t *testing.T, servers string) map[http2.SettingID]uint32 {
		p := proxytest.Start(t, proxytest.Options{Site: "respond hello", Servers: servers})
		got := make(map[http2.SettingID]uint32)
		for _, s := range wiretest.Dial(t, p.H2C, nil).ExpectSettings().Settings {
			got[s.ID] = s.Val
		}
		return got
	}
	for _, more := range []string{"", "max_header_size 128KB\n"} {
		var with, without map[http2.SettingID]uint32
		t.Run("stock", func(t *testing.T) { without = settings(t, more) })
		t.Run("relay", func(t *testing.T) { with = settings(t, more+withRelay) })
		for _, id := range []http2.SettingID{http2.SettingMaxConcurrentStreams, http2.SettingMaxHeaderListSize} {
			if with[id] != without[id] {
				t.Errorf("%v is %d, without grpc_relay %d", id, with[id], without[id])
			}
		}
	}
}

// TestRelayHeaderSize: a request with a larger head than the server takes is answered as without grpc_relay.
func TestRelayHeaderSize(t *testing.T) {
	for _, servers := range []string{"", withRelay} {
		p := proxytest.Start(t, proxytest.Options{Site: "respond hello", Servers: servers})
		c := wiretest.Dial(t, p.H2C, nil)
		fields := wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a.example")
		for range 10 {
			fields = append(fields, hpack.HeaderField{Name: "x-large", Value: strings.Repeat("x", 2<<10)})
		}
		if h := c.Collect(c.Open(fields, true)); h.Get(":status") != "431" {
			t.Errorf("with %q: %v, want 431", servers, h)
		}
		if err := caddy.Stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRelayTLSIdentity: handlers, and upstreams, see of the client what they see without grpc_relay.
func TestRelayTLSIdentity(t *testing.T) {
	ca, clients := wiretest.NewCA(t), wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert("localhost", "a.example"))
	cfg := ca.ClientConfig(clients.ClientCert("alice"))
	cfg.ServerName = "localhost"
	ask := func(t *testing.T, servers string) (got []string) {
		b := backendtest.Start(t, backendtest.Options{})
		p := proxytest.Start(t, proxytest.Options{
			Site: "@grpc header content-type application/grpc*\nhandle @grpc {\n\tgrpc_proxy " + b.Addr() + "\n}\n" +
				"respond \"{http.request.tls.client.subject} {http.request.tls.server_name} {http.request.tls.proto} {http.request.tls.version} " +
				"{http.request.tls.resumed} {http.request.remote.host} {http.request.local.port} {client_ip} {scheme} {host}\"",
			Servers: servers + "\ntrusted_proxies static 127.0.0.1", CertFile: cert, KeyFile: key,
			TLS: "client_auth {\n\tmode require_and_verify\n\ttrust_pool file " + clients.File() + "\n}",
		})
		for _, protocols := range [][]string{{"h2"}, {"http/1.1"}} {
			for _, host := range []string{"localhost", "LOCALHOST", "a.example"} {
				cfg := cfg.Clone()
				cfg.NextProtos = protocols
				a := fetch(t, p, p.TLS, cfg, webRequest{path: "/", host: host, fields: []string{"X-Forwarded-For", "192.0.2.7", "X-Forwarded-Proto", "http"}})
				got = append(got, a.String())
			}
		}
		cc := dial(t, p.TLS, credentials.NewTLS(cfg))
		ctx := metadata.AppendToOutgoingContext(within(t, timeout), "x-forwarded-for", "192.0.2.7")
		if _, err := testgrpc.NewTestServiceClient(cc).EmptyCall(ctx, &testgrpc.Empty{}); err != nil {
			t.Fatal(err)
		}
		md := b.Last().Metadata
		return append(got, fmt.Sprint(md["x-forwarded-for"], md["x-forwarded-proto"], md["via"], md["x-forwarded-host"]))
	}
	var with, without []string
	t.Run("stock", func(t *testing.T) { without = ask(t, "") })
	t.Run("relay", func(t *testing.T) { with = ask(t, withRelay) })
	if len(with) != len(without) {
		t.Fatalf("%d answers, without grpc_relay %d", len(with), len(without))
	}
	for i := range with {
		if with[i] != without[i] {
			t.Errorf("%s\nwithout grpc_relay\n%s", with[i], without[i])
		}
	}
	if all := strings.Join(without, "\n"); !strings.Contains(all, "CN=alice") || !strings.Contains(all, "192.0.2.7") || !strings.Contains(all, fmt.Sprint(http.StatusMisdirectedRequest)) {
		t.Errorf("the test shows nothing: %s", all)
	}
}

// TestRelayFailedHandshake: a handshake that fails is the server's, and harms nobody.
func TestRelayFailedHandshake(t *testing.T) {
	wiretest.CheckLeaks(t)
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	p := proxytest.Start(t, proxytest.Options{Site: "respond hello", Servers: withRelay, CertFile: cert, KeyFile: key})
	old := &tls.Config{RootCAs: ca.Pool, ServerName: "localhost", MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
	if nc, err := tls.Dial("tcp", p.TLS, old); err == nil {
		nc.Close()
		t.Error("TLS 1.1 is served")
	}
	if a := fetch(t, p, p.TLS, ca.ClientConfig(), webRequest{path: "/", host: "localhost"}); a.status != http.StatusOK {
		t.Errorf("%v", a)
	}
	eventually(t, "the failure is in the log, as without grpc_relay", func() bool {
		for _, e := range p.Log("http.stdlib") {
			if msg, _ := e["msg"].(string); strings.Contains(msg, "TLS handshake error") {
				return true
			}
		}
		return false
	})
}
