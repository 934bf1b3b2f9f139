package grpcproxy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	grpcproxy "github.com/caddygrpc/caddy-grpc-proxy"
)

// FuzzUnmarshalCaddyfile: the parser never panics, and what it accepts is JSON that means the same after a round trip and
// that provisions or is refused with an error, leaving nothing behind.
func FuzzUnmarshalCaddyfile(f *testing.F) {
	files, err := filepath.Glob("testdata/*.caddyfiletest")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		input, _, _ := strings.Cut(string(raw), "\n----------\n")
		if i := strings.Index(input, "grpc_proxy"); i >= 0 {
			f.Add(strings.TrimSuffix(strings.TrimRight(input[i:], "\n"), "}")) // without the site's brace
		}
	}
	// What a fuzzer may not do: read any file or the environment, and make the test's machine dial or write.
	outside := []string{"tls_trust_pool", "tls_client_auth", "{env.", "{file.", "{$"}
	f.Fuzz(func(t *testing.T, input string) {
		for _, word := range outside {
			if strings.Contains(input, word) {
				return
			}
		}
		h := new(grpcproxy.Handler)
		if h.UnmarshalCaddyfile(caddyfile.NewTestDispenser(input)) != nil {
			return
		}
		raw, err := json.Marshal(h)
		if err != nil {
			t.Fatalf("accepted, but has no JSON: %v", err)
		}
		again := new(grpcproxy.Handler)
		if err := caddy.StrictUnmarshalJSON(raw, again); err != nil {
			t.Fatalf("its JSON is not accepted: %v\n%s", err, raw)
		}
		if second, err := json.Marshal(again); err != nil || !bytes.Equal(raw, second) {
			t.Fatalf("its JSON changes when read and written again (%v):\n%s\n%s", err, raw, second)
		}
		ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
		defer cancel() // cleans the module up
		if _, err := ctx.LoadModuleByID("http.handlers.grpc_proxy", caddyconfig.JSON(again, nil)); err != nil && err.Error() == "" {
			t.Fatal("refused without a word")
		}
	})
}
