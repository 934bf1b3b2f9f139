package grpcproxy_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	ourModule   = "github.com/caddygrpc/caddy-grpc-proxy"
	caddyModule = "github.com/caddyserver/caddy/v2"
	http2Module = "golang.org/x/net/http2"
	grpcModule  = "google.golang.org/grpc"
)

// mayImport is the direction of imports: towards the leaves only. Names without a dot in the first part are our own
// packages, others are prefixes of import paths; the standard library is open to all. Test files are free.
//
// golang.org/x/net/http2 belongs to h2 and to the raw peers of tests; google.golang.org/grpc is linked into no user's
// Caddy through us, so only tests and our own binary, which carries the demo, have it.
var mayImport = map[string][]string{
	// Leaves.
	"grpcwire": {"google.golang.org/protobuf/encoding/protowire"},
	"h2":       {http2Module, "golang.org/x/sys"},
	"upstream": {caddyModule},
	// On the leaves.
	"call":      {"grpcwire"},
	"rpc":       {"grpcwire", "h2"},
	"orca":      {"upstream", "call", "grpcwire", "h2", "rpc", "transport", "google.golang.org/protobuf/encoding/protowire", "go.uber.org/zap"},
	"selection": {"upstream", "call", "grpcwire", "orca", caddyModule, "github.com/cespare/xxhash/v2", "github.com/dustin/go-humanize", "go.uber.org/zap"},
	"discovery": {
		"upstream", caddyModule, "go.uber.org/zap", "github.com/miekg/dns", "go.yaml.in/yaml",
	},
	"healthcheck": {
		"upstream", "call", "grpcwire", "h2", "rpc", "transport", caddyModule, "go.uber.org/zap", "google.golang.org/protobuf/encoding/protowire",
	},
	"transport": {"upstream", "call", "grpcwire", "h2", caddyModule, "go.uber.org/zap", "golang.org/x/sys", "github.com/pires/go-proxyproto"},
	// What holds them together.
	"cluster": {"upstream", "call", "selection", "transport", "discovery", "healthcheck", "orca", caddyModule, "go.uber.org/zap"},
	// The core. It knows neither net/http nor Caddy: see TestCoreImports.
	"proxy":          {"cluster", "upstream", "call", "grpcwire", "h2", "selection", "transport", "go.uber.org/zap"},
	"inbound/web":    {"proxy", "call", "grpcwire", "h2", caddyModule, "go.uber.org/zap"},
	"inbound/direct": {"proxy", "call", "grpcwire", "h2"},
	"inbound/hop":    {"h2"},
	"inbound/listen": {"inbound/direct", "inbound/hop", "h2", "go.uber.org/zap"},
	"inbound/route":  {"inbound/direct", caddyModule},
	"": {
		"proxy", "inbound/web", "inbound/direct", "inbound/listen", "inbound/route", "cluster", "discovery", "healthcheck", "orca", "upstream", "call", "grpcwire", "h2", "selection", "transport", caddyModule, "go.uber.org/zap",
		"github.com/dustin/go-humanize", "github.com/spf13/cobra", "cel.dev/cel-go",
	},
	"cmd/caddy": {"", caddyModule, grpcModule, "golang.org/x/term"},
	// For tests.
	"selection/selectiontest": {"selection", "upstream", "call", "grpcwire"},
	"internal/wiretest":       {http2Module},
	"internal/dnstest":        {"github.com/miekg/dns"},
	"internal/proxytest":      {"", caddyModule},
	"internal/backendtest":    {"grpcwire", grpcModule, "google.golang.org/genproto", "google.golang.org/protobuf"},
	"e2e":                     {"", "call", "discovery", "selection", "transport", "upstream", "grpcwire", "internal/backendtest", "internal/proxytest", "internal/wiretest", caddyModule, grpcModule},
	"bench":                   {"", "grpcwire", "h2", "internal/backendtest", "internal/wiretest", caddyModule, http2Module, grpcModule},
	"bench/core/server":       {"proxy", "inbound/direct", "cluster", "selection", "healthcheck", "transport", "upstream", "call", "h2", caddyModule, "go.uber.org/zap"},
	"bench/policies":          {grpcModule},
	"bench/ejection":          {grpcModule},
}

func TestImports(t *testing.T) {
	for dir, imports := range importsOf(t) {
		allowed, ok := mayImport[dir]
		if !ok {
			t.Errorf("package %q is not in the table of this test: say there what it may import", dir)
			continue
		}
		for _, path := range imports {
			first, _, _ := strings.Cut(path, "/")
			own, isOwn := strings.CutPrefix(path+"/", ourModule+"/")
			own = strings.TrimSuffix(own, "/")
			switch {
			case isOwn && slices.Contains(allowed, own):
			case !isOwn && !strings.Contains(first, "."): // the standard library
			case !isOwn && slices.ContainsFunc(allowed, func(p string) bool { return strings.Contains(p, ".") && below(path, p) }):
			default:
				t.Errorf("package %q imports %s, which it may not: see the table of this test", dir, path)
			}
		}
	}
}

// TestCoreImports: the core carries calls of any inbound, with a request or without.
func TestCoreImports(t *testing.T) {
	for _, path := range importsOf(t)["proxy"] {
		if path == "net/http" || below(path, caddyModule) {
			t.Errorf("package proxy imports %s", path)
		}
	}
}

// TestLeavesAreLeaves holds the table to its own rule, so that an entry added in haste cannot turn it around.
func TestLeavesAreLeaves(t *testing.T) {
	for _, leaf := range []string{"grpcwire", "h2", "upstream"} {
		for _, p := range mayImport[leaf] {
			if !strings.Contains(p, ".") {
				t.Errorf("%s is a leaf, but the table allows it to import %s", leaf, p)
			}
		}
	}
	for dir, allowed := range mayImport {
		for _, p := range allowed {
			if below(p, http2Module) && !slices.Contains([]string{"h2", "internal/wiretest", "bench"}, dir) {
				t.Errorf("the table allows %s to import %s, which belongs to h2", dir, p)
			}
			if below(p, grpcModule) && !slices.Contains([]string{"cmd/caddy", "internal/backendtest", "e2e", "bench", "bench/policies", "bench/ejection"}, dir) {
				t.Errorf("the table allows %s to import %s, which users would link", dir, p)
			}
			if slices.Contains(mayImport[p], dir) {
				t.Errorf("the table allows %s and %s to import each other", dir, p)
			}
		}
	}
}

func below(path, prefix string) bool {
	return path == prefix || strings.HasPrefix(path, prefix+"/")
}

// importsOf lists what each of our packages imports outside its tests, for every operating system: it reads the files,
// since `go list` leaves out those of other systems.
func importsOf(t *testing.T) map[string][]string {
	t.Helper()
	list := make(map[string][]string)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch name := filepath.Base(path); {
		case err != nil:
			return err
		case d.IsDir() && (name == "testdata" || len(name) > 1 && strings.HasPrefix(name, ".")):
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(name, ".go"):
			return nil
		}
		dir := strings.TrimPrefix(filepath.ToSlash(filepath.Dir(path)), ".")
		if _, ok := list[dir]; !ok {
			list[dir] = nil
		}
		if strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range f.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if !slices.Contains(list[dir], imported) {
				list[dir] = append(list[dir], imported)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(list) < 8 || len(list[""]) == 0 {
		t.Fatalf("found packages %v only; this test looks in the wrong place", slices.Collect(maps.Keys(list)))
	}
	return list
}
