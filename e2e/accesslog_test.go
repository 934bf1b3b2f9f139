package e2e

import (
	"bytes"
	"encoding/json"
	"flag"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

var update = flag.Bool("update", false, "rewrite golden files")

// TestAccessLog: the access log's lines of a call that went well, of one that the upstream refused, and of one that no
// upstream took. They are what users build on; a change here belongs into the changelog.
func TestAccessLog(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	dead := proxytest.FreeAddress(t)
	p := proxytest.Start(t, proxytest.Options{
		Site:      "@dead header x-dead *\ngrpc_proxy @dead " + dead + "\ngrpc_proxy " + b.Addr(),
		AccessLog: true,
	})
	c := client(t, p.H2C, grpc.WithUserAgent("test"))
	for _, tc := range []struct {
		name string
		md   metadata.MD
		code codes.Code
	}{
		{"ok", nil, codes.OK},
		{"status", metadata.Pairs(backendtest.KeyStatus, "NOT_FOUND", backendtest.KeyMessage, "no such thing"), codes.NotFound},
		{"no_upstream", metadata.Pairs("x-dead", "1"), codes.Unavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := len(p.Log("http.log.access"))
			ctx := metadata.NewOutgoingContext(within(t, timeout), tc.md)
			if _, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{Payload: body(fromClient, 0, 100)}); status.Code(err) != tc.code {
				t.Fatal(err)
			}
			var entries []map[string]any
			eventually(t, "the call is in the access log", func() bool {
				entries = p.Log("http.log.access")
				return len(entries) > before
			})
			if tc.name == "no_upstream" {
				entries[before]["bytes_read"] = 0.0 // how much of the request the proxy had read by then is chance
			}
			got := masked(t, entries[before], map[string]string{p.H2C: "PROXY", b.Addr(): "UPSTREAM", dead: "DEAD"})
			file := filepath.Join("testdata", "accesslog_"+tc.name+".json")
			if *update {
				if err := os.MkdirAll("testdata", 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, got, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("the access log has\n%s\nwant (%s)\n%s", got, file, want)
			}
		})
	}
}

// masked takes out of a log entry what differs from run to run.
func masked(t *testing.T, entry map[string]any, names map[string]string) []byte {
	t.Helper()
	mask(entry)
	raw, err := json.MarshalIndent(entry, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw) + "\n"
	for addr, name := range names {
		text = strings.ReplaceAll(text, addr, name)
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			t.Fatal(err)
		}
		text = strings.ReplaceAll(text, `"`+port+`"`, `"PORT"`)
	}
	return []byte(text)
}

func mask(v any) {
	m, ok := v.(map[string]any)
	if !ok {
		return
	}
	for key, value := range m {
		switch key {
		case "ts", "duration", "grpc_latency", "grpc_first_byte":
			if n, ok := value.(float64); ok && n > 0 {
				m[key] = "TIME"
			}
		case "remote_port":
			m[key] = "PORT"
		case "Grpc-Timeout":
			m[key] = "TIME"
		default:
			mask(value)
		}
	}
}
