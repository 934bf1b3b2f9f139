package discovery

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/dnstest"
)

func init() { caddy.RegisterModule(new(pluginSource)) }

// pluginSource is a source of reverse_proxy as a plugin would have it.
type pluginSource struct {
	Name string `json:"name,omitempty"`
}

// plugins are what the test lets sources do, by name.
var plugins = map[string]func(*http.Request) ([]string, error){}

// resets counts how often sources were told to forget.
var resets atomic.Int32

func (*pluginSource) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: upstreamsNamespace + "test_plugin", New: func() caddy.Module { return new(pluginSource) }}
}

func (s *pluginSource) GetUpstreams(r *http.Request) ([]*reverseproxy.Upstream, error) {
	dials, err := plugins[s.Name](r)
	list := make([]*reverseproxy.Upstream, len(dials))
	for i, d := range dials {
		list[i] = &reverseproxy.Upstream{Dial: d}
	}
	return list, err
}

func (*pluginSource) ResetCache(*http.Request) error {
	resets.Add(1)
	return nil
}

var _ reverseproxy.CachingUpstreamSource = (*pluginSource)(nil)

// plugin is a source that does what the test says.
func plugin(t *testing.T, f func(*http.Request) ([]string, error)) *ReverseProxy {
	t.Helper()
	plugins[t.Name()] = f
	return &ReverseProxy{UpstreamsRaw: fmt.Appendf(nil, `{"source": "test_plugin", "name": %q}`, t.Name())}
}

// TestReverseProxyDNS: Caddy's own sources, against a real DNS server.
func TestReverseProxyDNS(t *testing.T) {
	s := dnstest.New(t)
	s.Set(
		t, "svc.test. 1 IN A 10.0.0.1", "svc.test. 1 IN A 10.0.0.2",
		"_grpc._tcp.test. 1 IN SRV 1 10 50051 svc.test.", "_grpc._tcp.test. 1 IN SRV 2 10 50052 svc.test.",
	)
	resolver := fmt.Sprintf(`"refresh": "100ms", "resolver": {"addresses": [%q]}`, s.Addr)
	a := &ReverseProxy{UpstreamsRaw: []byte(`{"source": "a", "name": "svc.test.", "port": "50051", "versions": {"ipv4": true}, ` + resolver + `}`)}
	r := watch(t, a)
	waitFor(t, func() bool { list, _ := r.last(); return len(list) == 2 })
	list, _ := r.last()
	if got := text(list); got != "10.0.0.1:50051 10.0.0.2:50051" && got != "10.0.0.2:50051 10.0.0.1:50051" || list[0].Origin != "reverse_proxy/a" {
		t.Errorf("got %s from %s", got, list[0].Origin)
	}
	s.Set(t, "svc.test. 1 IN A 10.0.0.3", "_grpc._tcp.test. 1 IN SRV 1 10 50051 svc.test.", "_grpc._tcp.test. 1 IN SRV 2 10 50052 svc.test.")
	r.awaitList(t, "10.0.0.3:50051")

	multi := `{"source": "multi", "sources": [{"source": "srv", "service": "grpc", "proto": "tcp", "name": "test.", ` + resolver + `}]}`
	r = watch(t, &ReverseProxy{UpstreamsRaw: []byte(multi)})
	r.awaitList(t, "svc.test.:50051", "svc.test.:50052")
}

func TestReverseProxyPlugin(t *testing.T) {
	var (
		step    atomic.Int32
		request atomic.Pointer[http.Request]
	)
	src := plugin(t, func(r *http.Request) ([]string, error) {
		request.Store(r)
		repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		caddyhttp.SetVar(r.Context(), "x", "y")
		switch step.Load() {
		case 0:
			return []string{"tcp4/10.0.0.1:1", "unix//run/app.sock", "[::1]:1" + repl.ReplaceAll("{http.request.header.none}", "")}, nil
		case 1:
			panic("oh no")
		}
		return []string{"10.0.0.9:1"}, nil
	})
	r := watch(t, src)
	r.awaitList(t, "10.0.0.1:1", "unix//run/app.sock", "[::1]:1")
	step.Store(1)
	r.awaitError(t, "reverse_proxy/test_plugin: panic: oh no")
	step.Store(2)
	r.awaitList(t, "10.0.0.9:1")
	if got := request.Load(); got.Method != "POST" || got.Header == nil || got.Body == nil || got.URL == nil {
		t.Errorf("asked with %+v", got)
	}
}

func TestReverseProxyErrors(t *testing.T) {
	var (
		dials  []string
		broken error
	)
	src := plugin(t, func(*http.Request) ([]string, error) { return dials, broken })
	if err := provision(t, src); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		dials []string
		err   error
		want  string
	}{
		{nil, errors.New("broken"), "reverse_proxy/test_plugin: broken"},
		{[]string{"a:1", "{http.request.host}:1"}, nil, "placeholder that is not known"},
		{[]string{"h2c://10.0.0.1:1"}, nil, `"h2c://10.0.0.1:1" is not that of one socket`},
		{[]string{"10.0.0.1:1-2"}, nil, `"10.0.0.1:1-2" is not that of one socket`},
		{make([]string, maxEndpoints+1), nil, "has 65537 upstreams; at most 65536 are allowed"},
	} {
		dials, broken = c.dials, c.err
		if list, err := src.ask(request(t.Context()), false); err == nil || !strings.Contains(err.Error(), c.want) || list != nil {
			t.Errorf("got %v, error %v; want %q", list, err, c.want)
		}
	}
}

func TestReverseProxyRefresh(t *testing.T) {
	src := plugin(t, func(*http.Request) ([]string, error) { return []string{"a:1"}, nil })
	r := watch(t, src)
	r.awaitList(t, "a:1")
	before := resets.Load()
	src.Refresh()
	waitFor(t, func() bool { return resets.Load() > before })
}

func TestReverseProxyConfig(t *testing.T) {
	refused(t, new(ReverseProxy), "upstreams is missing")
	refused(t, &ReverseProxy{UpstreamsRaw: []byte(`{"source": "nobody"}`)}, "nobody")
	runCaddyfile(t, []caddyfileCase{
		{input: "reverse_proxy a svc.test 1 {\n refresh 5s\n}", json: `{"upstreams":{"name":"svc.test","port":"1","refresh":5000000000,"source":"a"}}`},
		{input: "reverse_proxy multi {\n srv _grpc._tcp.test\n}", json: `{"upstreams":{"source":"multi","sources":[{"name":"_grpc._tcp.test","source":"srv"}]}}`},
		{input: "reverse_proxy", err: "wrong argument count"},
		{input: "reverse_proxy nobody", err: "http.reverse_proxy.upstreams.nobody"},
		{input: "reverse_proxy a svc 1 2", err: "wrong argument count"},
	})
}
