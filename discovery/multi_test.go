package discovery

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/dnstest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// The test's own source, as a plugin's would be. What it says is what the test tells it to.
func init() { caddy.RegisterModule(new(scripted)) }

type scripted struct {
	// What it does when it is watched: panic.
	Panic bool `json:"panic,omitempty"`
}

func (*scripted) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "test_scripted", New: func() caddy.Module { return new(scripted) }}
}

func (s *scripted) Watch(ctx context.Context, _ Sink) {
	if s.Panic {
		panic("oh no")
	}
	<-ctx.Done()
}

func multiOf(t *testing.T, sources ...any) *Multi {
	t.Helper()
	m := new(Multi)
	for _, s := range sources {
		m.SourcesRaw = append(m.SourcesRaw, mustJSON(t, s))
	}
	return m
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

type object = map[string]any

func TestMulti(t *testing.T) {
	s := dnstest.New(t)
	s.SetNegative(1)
	path := filepath.Join(t.TempDir(), "endpoints.json")
	put(t, path, `[{"address": "file:1", "weight": 3}]`)
	m := multiOf(
		t,
		object{"source": "static", "endpoints": []Entry{{Address: "static:1", Priority: 1}}},
		object{"source": "a", "name": "svc.test.", "port": "1", "resolver": Resolver{Addresses: []string{s.Addr}}},
		object{"source": "multi", "sources": []any{object{"source": "file", "path": path, "refresh": "100ms"}}},
	)
	r := watch(t, m)
	r.awaitList(t, "static:1,p=1", "file:1,w=3")
	r.awaitError(t, "a (source 2 of 3): DNS has no name svc.test.")
	s.Set(t, "svc.test. 3600 IN A 10.0.0.1")
	r.awaitList(t, "static:1,p=1", "10.0.0.1:1,name=svc.test", "file:1,w=3")
	// What fails keeps its endpoints, while others change.
	put(t, path, "[")
	r.awaitError(t, "multi (source 3 of 3): file (source 1 of 1): "+path+": line 1: the list breaks off")
	s.Set(t, "svc.test. 3600 IN A 10.0.0.2")
	m.Refresh()
	r.awaitList(t, "static:1,p=1", "10.0.0.2:1,name=svc.test", "file:1,w=3")
	put(t, path, "[]")
	r.awaitList(t, "static:1,p=1", "10.0.0.2:1,name=svc.test")
}

// TestMultiReload: what a member had found stays in force until the same member of the next configuration has found out.
func TestMultiReload(t *testing.T) {
	s := dnstest.New(t)
	s.Set(t, "svc.test. 3600 IN A 10.0.0.1")
	path := filepath.Join(t.TempDir(), "endpoints.json")
	put(t, path, `[{"address": "file:1"}]`)
	sources := []any{
		object{"source": "file", "path": path, "refresh": "100ms"},
		object{"source": "a", "name": "svc.test.", "port": "1", "resolver": Resolver{Addresses: []string{s.Addr}}},
	}
	first := multiOf(t, sources...)
	r := watch(t, first)
	r.awaitList(t, "file:1", "10.0.0.1:1,name=svc.test")

	s.SetMood(dnstest.Silent)
	put(t, path, `[{"address": "file:2"}]`)
	second := multiOf(t, sources...)
	r = watch(t, second)
	r.awaitList(t, "file:2", "10.0.0.1:1,name=svc.test")
	if updates, _ := r.count(); updates != 1 {
		t.Errorf("%d updates; the first list is the whole one", updates)
	}
	// When nobody needs it any more, it is forgotten.
	if n, ok := memories.References(string(mustJSON(t, sources[1]))); !ok || n != 2 {
		t.Errorf("%d references", n)
	}
	for _, m := range []*Multi{first, second, second} { // Twice, as after a failed start.
		if err := m.Cleanup(); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := memories.References(string(mustJSON(t, sources[1]))); ok {
		t.Error("the list is kept though nobody needs it")
	}
}

// TestMultiNothingYet: that there are no endpoints is said only when every member was heard.
func TestMultiNothingYet(t *testing.T) {
	sink := newRecorder()
	j := &joined{sink: sink, lists: make([][]upstream.Endpoint, 3), heard: make([]bool, 3)}
	member := func(i int) *joinedMember { return &joinedMember{joined: j, i: i, name: "x", last: new(memory)} }
	expect := func(updates, errs int) {
		t.Helper()
		if u, e := sink.count(); u != updates || e != errs {
			t.Errorf("%d updates, %d errors; want %d, %d", u, e, updates, errs)
		}
	}
	broken := errors.New("broken")
	member(0).Fail(broken)
	expect(0, 1)
	member(1).Update(nil)
	expect(0, 1)
	member(2).Fail(broken)
	expect(1, 2)
	member(2).Fail(broken)
	expect(1, 3)
	list := []upstream.Endpoint{{Network: "tcp", Address: "a:1"}}
	member(2).Update(list)
	list[0].Address = "changed" // Sinks do not keep the slice.
	member(1).Update([]upstream.Endpoint{{Network: "tcp", Address: "b:1"}})
	expect(3, 3)
	sink.awaitList(t, "b:1", "a:1")
	member(1).Fail(broken)
	member(1).Update(nil)
	member(2).Update(nil)
	expect(5, 4)
	sink.awaitList(t)
}

func TestMultiPanic(t *testing.T) {
	r := watch(t, multiOf(t, object{"source": "test_scripted", "panic": true}, object{"source": "static", "endpoints": []Entry{{Address: "a:1"}}}))
	r.awaitError(t, "test_scripted (source 1 of 2): panic: oh no")
	r.awaitList(t, "a:1")
}

func TestMultiConfig(t *testing.T) {
	refused(t, new(Multi), "sources is empty")
	refused(t, multiOf(t, object{"source": "nobody"}), "nobody")
	refused(t, multiOf(t, object{"source": "a", "name": "a"}), "port is missing")
	runCaddyfile(t, []caddyfileCase{
		{input: `multi {
			static a:1
			a svc.test 1 {
				refresh 5s
			}
			multi {
				file /run/list
			}
		}`, json: `{"sources":[{"endpoints":[{"address":"a:1"}],"source":"static"},` +
			`{"name":"svc.test","port":"1","refresh":5000000000,"source":"a"},` +
			`{"source":"multi","sources":[{"path":"/run/list","source":"file"}]}]}`},
		{input: "multi a", err: "wrong argument count"},
		{input: "multi {\n nobody\n}", err: `there is no source of upstreams "nobody"; available: a, file, http, multi, reverse_proxy, srv, static`},
		{input: "multi {\n a svc 1 2\n}", err: "wrong argument count"},
	})
	if _, err := fromCaddyfile(t, "multi {\n test_scripted\n}"); err == nil || !strings.Contains(err.Error(), "is not a Caddyfile unmarshaler") {
		t.Errorf("got %v", err)
	}
}
