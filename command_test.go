package grpcproxy

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
)

// flags parses a command line of caddy grpc-proxy.
func flags(t *testing.T, args ...string) caddycmd.Flags {
	t.Helper()
	cmd := new(cobra.Command)
	caddycmd.Commands()["grpc-proxy"].CobraFunc(cmd)
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	return caddycmd.Flags{FlagSet: cmd.Flags()}
}

func TestCommandConfig(t *testing.T) {
	for _, tc := range []struct {
		args string
		want []string // pieces of the JSON
	}{
		{"--from http://:8080 --to localhost:1,localhost:2", []string{
			`"listen":[":8080"]`, `"dial":"localhost:1"`, `"dial":"localhost:2"`, `"policy":"least_request"`, `"protocols":["h1","h2c"]`, `"automatic_https":{"disable":true}`,
		}},
		{"--from :8080 --to localhost:1 --policy round_robin", []string{`"listen":[":8080"]`, `"policy":"round_robin"`}},
		{"--from h2c://:8080 --to localhost:1", []string{`"listen":[":8080"]`, `"protocols":["h1","h2c"]`, `"automatic_https":{"disable":true}`}},
		{"--from HTTP://:8080 --to localhost:1", []string{`"listen":[":8080"]`, `"protocols":["h1","h2c"]`, `"automatic_https":{"disable":true}`}},
		{"--from a.test --to https://b:1 --insecure --internal-certs --disable-redirects --access-log --debug", []string{
			`"listen":[":443"]`, `"host":["a.test"]`, `"insecure_skip_verify":true`, `"module":"internal"`, `"disable_redirects":true`, `"logs":{}`, `"level":"DEBUG"`,
		}},
		{"--to localhost:8000-8001 -H Up:1 -d Down:2", []string{`"Up":["1"]`, `"Down":["2"]`, `"dial":"localhost:8000-8001"`}},
	} {
		t.Run(tc.args, func(t *testing.T) {
			cfg, err := commandConfig(flags(t, strings.Fields(tc.args)...))
			if err != nil {
				t.Fatal(err)
			}
			raw, err := json.Marshal(cfg)
			if err != nil {
				t.Fatal(err)
			}
			for _, piece := range tc.want {
				if !strings.Contains(string(raw), piece) {
					t.Errorf("%s is not in\n%s", piece, raw)
				}
			}
			if err := caddy.Validate(cfg); err != nil {
				t.Errorf("the configuration is not valid: %v", err)
			}
		})
	}
}

func TestCommandErrors(t *testing.T) {
	for args, want := range map[string]string{
		"":                              "--to is required",
		"--to localhost":                "has no port",
		"--to h2c://a:1 --insecure":     "plaintext",
		"--to a:1 --policy nope":        "available: ",
		"--to a:1 --header-up nope":     `--header-up "nope" is not of the form`,
		"--to a:1 --header-down nope":   `--header-down "nope"`,
		"--to a:1 --from http://a/path": "paths are not allowed",
		"--to a:1 --from ftp://:8080":   "unsupported scheme ftp://; use http:// or h2c:// (plaintext), https:// (TLS), or none",
		"--to a:1 b:2":                  `unknown argument "b:2": the command takes flags only; for several upstreams, repeat --to`,
	} {
		_, err := commandConfig(flags(t, strings.Fields(args)...))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one containing %q", args, err, want)
		}
	}
}
