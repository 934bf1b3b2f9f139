package proxy

import (
	"go/parser"
	"go/token"
	"os"
	"strconv"
	"strings"
	"testing"
)

// The core knows neither net/http nor Caddy. What it does not import itself its API cannot name either.
func TestImportsNeitherHTTPNorCaddy(t *testing.T) {
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, file := range files {
		if name := file.Name(); !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file.Name(), nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		seen++
		for _, spec := range f.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			for _, no := range []string{"net/http", "github.com/caddyserver/", "golang.org/x/net/", "google.golang.org/grpc"} {
				if strings.HasPrefix(path, no) {
					t.Errorf("%s imports %s", file.Name(), path)
				}
			}
		}
	}
	if seen < 10 {
		t.Fatalf("only %d files: this test looks in the wrong place", seen)
	}
}
