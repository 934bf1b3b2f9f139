package grpcproxy_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

var update = flag.Bool("update", false, "write what the parser and the handler say into testdata")

// goldenEnv is what the golden files may refer to.
var goldenEnv = map[string]string{
	"GRPC_BACKEND":      "backend.example.com:50051",
	"GRPC_BACKEND_HOST": "backend.example.com",
	"GRPC_BACKEND_H2C":  "h2c://backend.example.com:50051",
	"GRPC_EMPTY":        "",
}

// TestGoldenCaddyfile is the contract with users: what each Caddyfile in testdata means as JSON, and with which words it is
// refused. The format is Caddy's .caddyfiletest: a Caddyfile, a line of ten dashes, and the JSON. Files whose name begins
// with err_ hold the error's whole text instead, be it the parser's or, where the JSON is made, that of provisioning.
//
// A changed JSON is a change of the public interface: it needs a line in the CHANGELOG.
func TestGoldenCaddyfile(t *testing.T) {
	for key, value := range goldenEnv {
		t.Setenv(key, value)
	}
	runGolden(t, "testdata/*.caddyfiletest", func(t *testing.T, input string) (string, error) {
		raw, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(input+"\n"), map[string]any{"filename": "Caddyfile"})
		if err != nil {
			return "", err
		}
		for _, w := range warnings {
			t.Errorf("%s", w)
		}
		return string(raw), validateJSON(raw)
	})
}

// TestGoldenJSON holds the texts with which JSON is refused that no Caddyfile can produce, and JSON of other forms than the
// Caddyfile's. A file is the JSON of one handler or matcher, ten dashes, and the error's whole text or the JSON.
func TestGoldenJSON(t *testing.T) {
	runGolden(t, "testdata/*.jsontest", func(_ *testing.T, input string) (string, error) {
		route := `{"handle": [` + input + `]}`
		if strings.Contains(input, `"match":`) {
			route = input
		}
		raw := `{"apps": {"http": {"servers": {"srv0": {"listen": [":8080"], "routes": [` + route + `]}}}}}`
		return input, validateJSON([]byte(raw))
	})
}

func runGolden(t *testing.T, pattern string, run func(t *testing.T, input string) (string, error)) {
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("no file matches %s (%v)", pattern, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
		t.Run(name, func(t *testing.T) {
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			input, want, _ := strings.Cut(string(raw), "\n----------\n")
			got, err := run(t, input)
			wantErr := strings.HasPrefix(name, "err_")
			switch {
			case err == nil && wantErr:
				t.Fatal("accepted; want an error")
			case err != nil && !wantErr:
				t.Fatalf("refused: %v", err)
			case err != nil:
				got = err.Error()
			default:
				got = indented(t, got)
			}
			if *update {
				if err := os.WriteFile(file, []byte(input+"\n----------\n"+got+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != strings.TrimSuffix(want, "\n") {
				t.Errorf("got:\n%s\nwant:\n%s\n(if the change is meant: go test -run TestGolden -update . and a line in CHANGELOG.md)", got, want)
			}
		})
	}
}

// validateJSON provisions a configuration as `caddy validate` does: nothing listens and nothing is dialled.
func validateJSON(raw []byte) error {
	var cfg caddy.Config
	if err := caddy.StrictUnmarshalJSON(raw, &cfg); err != nil {
		return err
	}
	if cfg.Logging == nil { // what Caddy says about starting and stopping would drown the test's own words
		cfg.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{
			"default": {BaseLog: caddy.BaseLog{WriterRaw: json.RawMessage(`{"output":"discard"}`)}},
		}}
	}
	return caddy.Validate(&cfg)
}

func indented(t *testing.T, s string) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Indent(&b, []byte(s), "", "\t"); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestOptionsRefuseWrongArguments: every option with one value is refused without one and with two; every duration and
// number is checked; and every flag is refused with a value. In a second line each changes what the first has set.
func TestOptionsRefuseWrongArguments(t *testing.T) {
	const (
		noValue  = "wrong argument count or unexpected line ending after "
		duration = "is not a duration"
		positive = "is not positive"
		number   = "is not a positive whole number"
	)
	options := map[string]struct{ good, bad, text string }{
		"lb_retries":           {"3", "many", number},
		"lb_try_duration":      {"3s", "soon", duration},
		"lb_try_interval":      {"3s", "soon", duration},
		"max_timeout":          {"3s", "30", duration},
		"stream_timeout":       {"3s", "-1s", positive},
		"stream_idle_timeout":  {"3s", "0s", positive},
		"stream_close_delay":   {"3s", "soon", duration},
		"exit_timeout":         {"3s", "-1s", positive},
		"stream_memory_limit":  {"64MiB", "2TiB", "is not a size up to 1TiB"},
		"tls_server_name":      {"name", "", ""},
		"tls_timeout":          {"3s", "soon", duration},
		"tls_renegotiation":    {"once", "twice", "is none of never, once, freely"},
		"dial_timeout":         {"3s", "soon", duration},
		"dial_fallback_delay":  {"3s", "on", duration},
		"local_address":        {"127.0.0.1", "", ""},
		"max_conns":            {"4", "0", number},
		"max_conns_per_host":   {"4", "-1", number},
		"max_streams_per_conn": {"4", "all", number},
		"max_conn_age":         {"3s", "-1s", positive},
		"max_response_header":  {"64KiB", "big", "is not a size up to 1GiB"},
		"queue_size":           {"4", "4.5", number},
		"keepalive":            {"3s", "on", duration},
		"keepalive_interval":   {"3s", "on", duration},
	}
	adapt := func(lines ...string) (string, error) {
		input := "http://localhost\ngrpc_proxy localhost:50051 {\n\t" + strings.Join(lines, "\n\t") + "\n}\n"
		raw, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(input), nil)
		return string(raw), err
	}
	refused := func(t *testing.T, text string, lines ...string) {
		t.Helper()
		_, err := adapt(lines...)
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%q: got error %v; want one with %q", lines, err, text)
		}
	}
	lastWins := func(t *testing.T, first, last string) {
		t.Helper()
		want, err := adapt(last)
		if err != nil {
			t.Error(err)
			return
		}
		if got, err := adapt(first, last); err != nil || got != want {
			t.Errorf("%q, then %q: %s (%v), want %s", first, last, got, err, want)
		}
	}
	for word, o := range options {
		refused(t, noValue+"'"+word+"'", word)
		refused(t, noValue+"'"+o.good+"'", word+" "+o.good+" "+o.good)
		other := strings.NewReplacer("3", "7", "4", "7", "127", "77", "once", "never", "name", "name7").Replace(o.good)
		if other == o.good {
			t.Errorf("%s has no other good value than %s", word, other)
		}
		lastWins(t, word+" "+o.good, word+" "+other)
		if o.bad != "" {
			refused(t, word+": \""+o.bad+"\"", word+" "+o.bad)
			refused(t, o.text, word+" "+o.bad)
		}
	}
	for _, word := range []string{"expose_upstream", "verbose_logs", "tls_insecure_skip_verify"} {
		refused(t, noValue+"'yes'", word+" yes")
		lastWins(t, word, word)
	}
	refused(t, noValue+"'yes'", "tls yes")
}
