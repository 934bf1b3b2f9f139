package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func TestCaddyfile(t *testing.T) {
	for _, dir := range []string{"/tmp/grpc-demo-1", "/tmp/with space/grpc-demo-1"} {
		s := site{TLSPort: 8443, H2CPort: 8080, Policy: "round_robin", Dir: dir, Backends: []*backend{{port: 4001}, {port: 4002}}}
		text, config, err := caddyfileOf(s)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(text, caddyfile.Format(text)) {
			t.Errorf("not formatted:\n%s", text)
		}
		want := "https://localhost:8443, http://localhost:8080 {\n\tgrpc_proxy 127.0.0.1:4001 127.0.0.1:4002 {\n\t\tlb_policy round_robin\n\t}\n}\n"
		if !strings.HasSuffix(string(text), want) {
			t.Errorf("got\n%s\nwithout\n%s", text, want)
		}
		// What keeps the demo to itself.
		for _, want := range []string{
			`"disabled":true`, `"persist":false`, `"root":"` + dir + `/storage"`, `"filename":"` + dir + `/caddy.log"`,
			`"install_trust":false`, `"disable_redirects":true`, `"127.0.0.1:8443"`, `"127.0.0.1:8080"`, `"module":"internal"`,
			`"127.0.0.1:4001"`, `"127.0.0.1:4002"`, `"policy":"round_robin"`,
		} {
			if !strings.Contains(string(config), want) {
				t.Errorf("no %s in %s", want, config)
			}
		}
	}
}

func TestCaddyfileError(t *testing.T) {
	_, _, err := caddyfileOf(site{Policy: "}", Dir: "/tmp"})
	if err == nil || !strings.HasPrefix(err.Error(), "adapting the Caddyfile: ") {
		t.Errorf("got %v", err)
	}
}

// With the widest ports, nothing on the first screen wraps at 80 columns. The Caddyfile may, if paths are long.
func TestIntroductionWidth(t *testing.T) {
	s := site{TLSPort: 65535, H2CPort: 65534, Policy: "least_request", Dir: "/tmp/grpc-demo-4294967295"}
	for range 3 {
		s.Backends = append(s.Backends, &backend{name: "b1", port: 65535, delay: 25 * time.Millisecond})
	}
	text, _, err := caddyfileOf(s)
	if err != nil {
		t.Fatal(err)
	}
	lines := introduction(defaults(), s, text)
	v := view{report: newStats(s.Backends).report(), dials: 1, open: 200, elapsed: 100 * time.Hour}
	v.report.all.calls = 999_999
	lines = append(lines, block(defaults(), s, v)...)
	lines = append(lines, plainLine(s, v))
	for _, line := range append(lines, summary(s, v, time.Second, nil)...) {
		if n := utf8.RuneCountInString(line); n > columns || strings.ContainsAny(line, "\t\n") {
			t.Errorf("%d characters: %q", n, line)
		}
	}
	if n := len(block(defaults(), s, v)); n > 23 {
		t.Errorf("the block has %d lines, more than a terminal of 24", n)
	}
}

// An error that Caddy logs is shown, live, in plain lines and at the end.
func TestErrorsAreShown(t *testing.T) {
	v := view{errors: 2, last: "http: something broke"}
	v.report = newStats(nil).report()
	for name, lines := range map[string][]string{
		"block": block(defaults(), site{}, v), "summary": summary(site{}, v, time.Second, nil),
	} {
		if !strings.Contains(strings.Join(lines, "\n"), "Caddy logged 2 errors, the last: http: something broke") {
			t.Errorf("%s does not show it: %q", name, lines)
		}
	}
}

func TestSummaryClaimsNothingAfterAFailure(t *testing.T) {
	v := view{report: newStats(nil).report()}
	if text := strings.Join(summary(site{}, v, time.Second, errBroken), "\n"); strings.Contains(text, "Nothing is left") {
		t.Errorf("got %s", text)
	}
}
