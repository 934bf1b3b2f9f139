package grpcproxy_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	grpcproxy "github.com/caddygrpc/caddy-grpc-proxy"
)

// grpcRequest is a request as the matcher sees it: metadata are names and values in turn.
func grpcRequest(path string, metadata ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "http://localhost"+path, http.NoBody)
	r.Header.Set("Content-Type", "application/grpc")
	for i := 0; i < len(metadata); i += 2 {
		r.Header.Add(metadata[i], metadata[i+1])
	}
	repl := caddy.NewReplacer()
	repl.Set("test.role", "admin")
	return r.WithContext(context.WithValue(r.Context(), caddy.ReplacerCtxKey, repl))
}

func TestMatchGRPC(t *testing.T) {
	for _, tt := range []struct {
		name, matcher string
		matches, not  []*http.Request
	}{
		{
			"any gRPC call", "grpc",
			[]*http.Request{grpcRequest("/pkg.Svc/Do"), grpcRequest("/"), grpcRequest("/pkg.Svc/Do", "x", "y")},
			nil,
		},
		{
			"service", "grpc pkg.Svc",
			[]*http.Request{grpcRequest("/pkg.Svc/Do"), grpcRequest("/pkg.Svc/Other"), grpcRequest("//pkg.Svc/Do"), grpcRequest("/pkg.Svc//Do"), grpcRequest("/pkg.Svc/")},
			[]*http.Request{grpcRequest("/pkg.Svc2/Do"), grpcRequest("/pkg.Sv/Do"), grpcRequest("/PKG.SVC/Do"), grpcRequest("/a/pkg.Svc/Do"), grpcRequest("/pkg.Svc"), grpcRequest("/")},
		},
		{
			"several services, one by prefix", "grpc pkg.Svc other.*",
			[]*http.Request{grpcRequest("/pkg.Svc/Do"), grpcRequest("/other.A/Do"), grpcRequest("/other.b.C/Do")},
			[]*http.Request{grpcRequest("/other/Do"), grpcRequest("/another.A/Do")},
		},
		{
			"every service", "grpc *",
			[]*http.Request{grpcRequest("/pkg.Svc/Do")},
			[]*http.Request{grpcRequest("/nothing")},
		},
		{
			"method of a service", "grpc pkg.Svc/Do",
			[]*http.Request{grpcRequest("/pkg.Svc/Do"), grpcRequest("//pkg.Svc/Do"), grpcRequest("/pkg.Svc//Do")},
			[]*http.Request{grpcRequest("/pkg.Svc/Do2"), grpcRequest("/pkg.Svc/do"), grpcRequest("/pkg.Other/Do")},
		},
		{
			"with a leading slash, and all methods", "grpc /pkg.Svc/*",
			[]*http.Request{grpcRequest("/pkg.Svc/Do"), grpcRequest("/pkg.Svc/Other")},
			[]*http.Request{grpcRequest("/pkg.Svc2/Do")},
		},
		{
			"methods by prefix", "grpc pkg.Svc/Get*",
			[]*http.Request{grpcRequest("/pkg.Svc/Get"), grpcRequest("/pkg.Svc/GetAll")},
			[]*http.Request{grpcRequest("/pkg.Svc/Set"), grpcRequest("/pkg.Other/Get")},
		},
		{
			"a method, whatever the service", "grpc {\nmethod Do\n}",
			[]*http.Request{grpcRequest("/pkg.Svc/Do"), grpcRequest("/other/Do")},
			[]*http.Request{grpcRequest("/pkg.Svc/Other")},
		},
		{
			"services narrowed down by methods", "grpc {\nservice pkg.A pkg.B\nmethod Get* List\n}",
			[]*http.Request{grpcRequest("/pkg.A/GetX"), grpcRequest("/pkg.B/List")},
			[]*http.Request{grpcRequest("/pkg.A/Set"), grpcRequest("/pkg.C/GetX"), grpcRequest("/pkg.A/ListAll")},
		},
		{
			"a service, and a method of another", "grpc pkg.A pkg.B/Do",
			[]*http.Request{grpcRequest("/pkg.A/Any"), grpcRequest("/pkg.B/Do")},
			[]*http.Request{grpcRequest("/pkg.B/Other"), grpcRequest("/pkg.C/Do")},
		},
		{
			"metadata is there", "grpc {\nmetadata x-tenant\n}",
			[]*http.Request{grpcRequest("/s/m", "x-tenant", "a"), grpcRequest("/s/m", "x-tenant", "")},
			[]*http.Request{grpcRequest("/s/m"), grpcRequest("/s/m", "x-tenants", "a")},
		},
		{
			"metadata is absent", "grpc {\nmetadata !x-tenant\n}",
			[]*http.Request{grpcRequest("/s/m")},
			[]*http.Request{grpcRequest("/s/m", "x-tenant", "a"), grpcRequest("/s/m", "x-tenant", "")},
		},
		{
			"one value of several, in any place", "grpc {\nmetadata X-Tenant a b\n}",
			[]*http.Request{grpcRequest("/s/m", "x-tenant", "a"), grpcRequest("/s/m", "x-tenant", "z", "x-tenant", "b")},
			[]*http.Request{grpcRequest("/s/m", "x-tenant", "ab"), grpcRequest("/s/m", "x-tenant", "A"), grpcRequest("/s/m")},
		},
		{
			"values by prefix and suffix", "grpc {\nmetadata x-tenant eu-* *-test\n}",
			[]*http.Request{grpcRequest("/s/m", "x-tenant", "eu-1"), grpcRequest("/s/m", "x-tenant", "us-test")},
			[]*http.Request{grpcRequest("/s/m", "x-tenant", "us-1"), grpcRequest("/s/m", "x-tenant", "xeu-1")},
		},
		{
			"value by placeholder", "grpc {\nmetadata x-role {test.role}\n}",
			[]*http.Request{grpcRequest("/s/m", "x-role", "admin")},
			[]*http.Request{grpcRequest("/s/m", "x-role", "guest"), grpcRequest("/s/m", "x-role", "{test.role}")},
		},
		{
			"several keys: all of them", "grpc pkg.Svc {\nmetadata a 1\nmetadata b 2\nmetadata !c\n}",
			[]*http.Request{grpcRequest("/pkg.Svc/m", "a", "1", "b", "2")},
			[]*http.Request{grpcRequest("/pkg.Svc/m", "a", "1"), grpcRequest("/pkg.Svc/m", "a", "1", "b", "2", "c", ""), grpcRequest("/other/m", "a", "1", "b", "2")},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var m grpcproxy.MatchGRPC
			if err := m.UnmarshalCaddyfile(caddyfile.NewTestDispenser(tt.matcher)); err != nil {
				t.Fatal(err)
			}
			if err := m.Validate(); err != nil {
				t.Fatal(err)
			}
			for want, requests := range map[bool][]*http.Request{true: tt.matches, false: tt.not} {
				for _, r := range requests {
					got, err := m.MatchWithError(r)
					if got != want || err != nil {
						t.Errorf("%s %v: %v, %v; want %v", r.URL.Path, r.Header, got, err, want)
					}
				}
			}
		})
	}
}

// The content-type says what is gRPC: "exactly application/grpc, or followed by + or ;". And gRPC is always POST.
func TestMatchGRPCContentType(t *testing.T) {
	for _, tt := range []struct {
		method string
		types  []string
		want   bool
	}{
		{"POST", []string{"application/grpc"}, true},
		{"POST", []string{"application/grpc+proto"}, true},
		{"POST", []string{"application/grpc;x=y"}, true},
		{"POST", []string{"application/grpc-web"}, false},
		{"POST", []string{"application/grpc-web-text+proto"}, false},
		{"POST", []string{"application/json"}, false},
		{"POST", nil, false},
		{"POST", []string{"application/grpc", "application/grpc"}, false},
		{"GET", []string{"application/grpc"}, false},
		{"OPTIONS", []string{"application/grpc"}, false},
	} {
		r := grpcRequest("/pkg.Svc/Do")
		r.Method = tt.method
		r.Header["Content-Type"] = tt.types
		if got := new(grpcproxy.MatchGRPC).Match(r); got != tt.want {
			t.Errorf("%s with content-type %q: %v", tt.method, tt.types, got)
		}
	}
}

func TestMatchGRPCUnmarshal(t *testing.T) {
	var m grpcproxy.MatchGRPC
	err := m.UnmarshalCaddyfile(caddyfile.NewTestDispenser("grpc a.A /b.B/* c.C/Do {\nservice d.D\nmethod E f.F/G\nmetadata X-Key v w\nmetadata X-Key u\nmetadata y\nmetadata !Z\n}"))
	if err != nil {
		t.Fatal(err)
	}
	want := grpcproxy.MatchGRPC{
		Services: []string{"a.A", "b.B", "d.D"},
		Methods:  []string{"c.C/Do", "E", "f.F/G"},
		Metadata: map[string][]string{"x-key": {"v", "w", "u"}, "y": {"*"}, "z": {}},
	}
	if !reflect.DeepEqual(m, want) {
		t.Errorf("got %+v, want %+v", m, want)
	}
	for _, tt := range []struct{ matcher, says string }{
		{"grpc {\nservice\n}", "wrong argument count"},
		{"grpc {\nhost a\n}", `unrecognized word "host"`},
		{"grpc {\nmetadata !x v\n}", "takes no values"},
	} {
		err := new(grpcproxy.MatchGRPC).UnmarshalCaddyfile(caddyfile.NewTestDispenser(tt.matcher))
		if err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%q: %v, want %q", tt.matcher, err, tt.says)
		}
	}
	for _, bad := range []grpcproxy.MatchGRPC{
		{Services: []string{"/a.A"}}, {Services: []string{""}}, {Services: []string{"a.*.B"}}, {Methods: []string{"/a.A/Do"}}, {Methods: []string{"*Do"}},
	} {
		if bad.Validate() == nil {
			t.Errorf("%+v is valid", bad)
		}
	}
}
