package grpcwire

import (
	"strings"
	"testing"
)

var contentKinds = []struct {
	in   string
	want Kind
}{
	{"application/grpc", GRPC},
	{"application/grpc+proto", GRPC},
	{"application/grpc+json", GRPC},
	{"application/grpc+", GRPC},
	{"application/grpc;charset=utf-8", GRPC},
	{"application/grpc;", GRPC},
	{"Application/GRPC", GRPC},
	{"APPLICATION/GRPC+Proto", GRPC},
	{"application/grpc+web", GRPC}, // A format with an odd name, not gRPC-Web.
	{"application/grpc-web", GRPCWeb},
	{"application/grpc-web+proto", GRPCWeb},
	{"application/grpc-web;x=y", GRPCWeb},
	{"Application/Grpc-Web", GRPCWeb},
	{"application/grpc-web-text", GRPCWebText},
	{"application/grpc-web-text+proto", GRPCWebText},
	{"application/grpc-WEB-Text;x", GRPCWebText},
	{"", NotGRPC},
	{"application/grp", NotGRPC},
	{"application/grpcd", NotGRPC},
	{"application/grpc-", NotGRPC},
	{"application/grpc-we", NotGRPC},
	{"application/grpc-webx", NotGRPC},
	{"application/grpc-web-", NotGRPC},
	{"application/grpc-web-texts", NotGRPC},
	{"application/grpc ", NotGRPC},
	{"application/grpc ;x", NotGRPC},
	{"application/grpc,application/grpc", NotGRPC},
	{" application/grpc", NotGRPC},
	{"application/json", NotGRPC},
	{"application/x-grpc", NotGRPC},
	{"application/grp\u212a", NotGRPC}, // Nothing of Unicode folds into the name.
}

func TestContentKind(t *testing.T) {
	for _, tt := range contentKinds {
		if got := ContentKind(tt.in); got != tt.want {
			t.Errorf("ContentKind(%q) = %v, want %v", tt.in, got, tt.want)
		}
	}
	for k, want := range map[Kind]string{
		NotGRPC: "other", GRPC: "grpc", GRPCWeb: "grpc-web", GRPCWebText: "grpc-web-text", 9: "other",
	} {
		if k.String() != want {
			t.Errorf("%d: %q, want %q", k, k, want)
		}
	}
}

func FuzzContentKind(f *testing.F) {
	for _, tt := range contentKinds {
		f.Add(tt.in)
	}
	f.Fuzz(func(t *testing.T, s string) {
		// The same by another road: cut at the first + or ; and compare whole names.
		want := NotGRPC
		name := s
		if i := strings.IndexAny(s, "+;"); i >= 0 {
			name = s[:i]
		}
		switch asciiLower(name) {
		case "application/grpc":
			want = GRPC
		case "application/grpc-web":
			want = GRPCWeb
		case "application/grpc-web-text":
			want = GRPCWebText
		}
		if got := ContentKind(s); got != want {
			t.Errorf("ContentKind(%q) = %v, want %v", s, got, want)
		}
	})
}

func asciiLower(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c | 0x20
		}
	}
	return string(b)
}

func TestSplitMethod(t *testing.T) {
	tests := []struct {
		path, service, method string
		ok                    bool
	}{
		{"/grpc.testing.TestService/UnaryCall", "grpc.testing.TestService", "UnaryCall", true},
		{"/s/m", "s", "m", true},
		{"/prefix/pkg.Svc/Method", "prefix/pkg.Svc", "Method", true},
		{"/s//m", "s", "m", true},
		{"//pkg.Svc/Method", "pkg.Svc", "Method", true},
		{"///pkg.Svc///Method", "pkg.Svc", "Method", true},
		{"", "", "", false},
		{"/", "", "", false},
		{"//", "", "", true},
		{"//m", "", "m", true},
		{"/s/", "s", "", true},
		{"/m", "", "", false},
		{"s/m", "", "", false},
		{"*", "", "", false},
		{"http://h/s/m", "", "", false},
	}
	for _, tt := range tests {
		service, method, ok := SplitMethod(tt.path)
		if service != tt.service || method != tt.method || ok != tt.ok {
			t.Errorf("SplitMethod(%q) = %q, %q, %v", tt.path, service, method, ok)
		}
	}
}

func BenchmarkContentKind(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if ContentKind("application/grpc+proto") != GRPC {
			b.Fatal("not gRPC")
		}
	}
}

func BenchmarkSplitMethod(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, _, ok := SplitMethod("/grpc.testing.TestService/UnaryCall"); !ok {
			b.Fatal("not split")
		}
	}
}
