package grpcproxy

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The command tells the way of each grpc_proxy's calls, and why it is not direct.
func TestRoutesCommand(t *testing.T) {
	const relay = "servers :1 {\nlistener_wrappers {\ngrpc_relay\n}\n}\n"
	for _, tt := range []struct {
		name, file string
		want       []string // a line's fields, in order
	}{
		{"direct", "{\n" + relay + "}\nhttp://a:1 {\ngrpc_proxy b:1\n}", []string{"srv0 :1 a * direct"}},
		{"without the wrapper", "http://a:1 {\ngrpc_proxy b:1\n}", []string{"srv0 :1 a * handler the server has no listener wrapper grpc_relay"}},
		{"hop", "{\n" + relay + "}\nhttp://a:1 {\nencode gzip\ngrpc_proxy b:1\n}", []string{"srv0 :1 a * hop the handler encode needs a request"}},
		{
			"paths", "{\n" + relay + "}\nhttp://:1 {\n@u grpc u.* v.S/M\ngrpc_proxy @u b:1\ngrpc_proxy /p.S/* b:2\n}",
			[]string{"srv0 :1 * /u.*/* /v.S/M direct", "srv0 :1 * /p.s/* direct"},
		},
		{"none", "http://:1 {\nrespond 200\n}", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "Caddyfile")
			if err := os.WriteFile(file, []byte(tt.file), 0o600); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			if err := printRoutes(&out, file, "caddyfile"); err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
			if len(lines) != len(tt.want)+1 || !strings.HasPrefix(lines[0], "SERVER") {
				t.Fatalf("%s", out.String())
			}
			for i, want := range tt.want {
				if got := strings.Join(strings.Fields(lines[i+1]), " "); got != want {
					t.Errorf("%q, want %q", got, want)
				}
			}
		})
	}
	if err := printRoutes(os.Stdout, filepath.Join(t.TempDir(), "none"), "caddyfile"); err == nil {
		t.Error("a file that is not there has routes")
	}
}
