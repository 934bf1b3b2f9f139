// Package proxytest runs a whole Caddy with grpc_proxy in the test's process, on free ports of the loopback interface.
//
// Caddy's running configuration is the process's, so tests that use this package do not run in parallel.
package proxytest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	// The modules that configurations of tests are made of.
	_ "github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/standard"
	_ "github.com/caddyserver/caddy/v2/modules/caddytls/standardstek"
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"
	_ "github.com/caddyserver/caddy/v2/modules/logging"

	_ "github.com/caddygrpc/caddy-grpc-proxy"
)

// Options say what to run. Site is the only one that is always needed.
type Options struct {
	// Site is what stands inside the site block.
	Site string
	// Global is added to the global options.
	Global string
	// Servers is added to the servers' options.
	Servers string
	// CertFile and KeyFile, if set, open a TLS port (HTTP/2 and HTTP/3) besides the plaintext one.
	CertFile, KeyFile string
	// TLS is added to the TLS port's tls block.
	TLS string
	// AccessLog turns access logs on; Proxy.AccessLog reads them.
	AccessLog bool
}

// Proxy is the running Caddy.
type Proxy struct {
	// H2C and TLS are the addresses of the plaintext and the TLS port, host:port. HTTP/3 is at the TLS port's number.
	H2C, TLS string

	t       testing.TB
	opts    Options
	dir     string
	logFile string
}

// Start runs Caddy with the options and stops it at the end of the test.
func Start(t testing.TB, opts Options) *Proxy {
	t.Helper()
	p := &Proxy{t: t, opts: opts, dir: t.TempDir()}
	p.logFile = filepath.Join(p.dir, "caddy.log")
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Errorf("stopping Caddy: %v", err)
		}
	})
	for again := 10; ; again-- {
		p.H2C = freeAddress(t)
		if opts.CertFile != "" {
			p.TLS = freeAddress(t)
		}
		err := p.Load(opts.Site)
		if err == nil {
			return p
		}
		// A port that was free may be another program's by now.
		if again == 0 || !errors.Is(err, syscall.EADDRINUSE) && !strings.Contains(err.Error(), "address already in use") {
			t.Fatalf("starting Caddy: %v\n%s", err, p.Caddyfile(opts.Site))
		}
	}
}

// Load replaces the running configuration by one with another site block, and waits until the listeners of the old one
// are gone.
func (p *Proxy) Load(site string) error {
	raw, err := Adapt(p.Caddyfile(site))
	if err != nil {
		return err
	}
	if err := caddy.Load(raw, true); err != nil {
		return err
	}
	settle(p.H2C, p.TLS)
	return nil
}

// Reload loads the running configuration anew.
func (p *Proxy) Reload() error { return p.Load(p.opts.Site) }

// Caddyfile is the whole configuration around a site block.
func (p *Proxy) Caddyfile(site string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "{\n\tadmin off\n\tpersist_config off\n\tstorage file_system %s\n\tskip_install_trust\n\tauto_https disable_redirects\n\tdefault_bind 127.0.0.1\n", p.dir)
	fmt.Fprintf(&b, "\tlog default {\n\t\toutput file %s {\n\t\t\troll_disabled\n\t\t}\n\t\tformat json\n\t\tlevel DEBUG\n\t}\n", p.logFile)
	fmt.Fprintf(&b, "\tservers {\n\t\tprotocols h1 h2 h2c h3\n%s\t}\n%s}\n", indent(p.opts.Servers, 2), indent(p.opts.Global, 1))
	body := indent(site, 1)
	if p.opts.AccessLog {
		body = "\tlog\n" + body
	}
	_, port, _ := net.SplitHostPort(p.H2C)
	fmt.Fprintf(&b, "http://:%s {\n%s}\n", port, body)
	if p.TLS != "" {
		_, port, _ := net.SplitHostPort(p.TLS)
		fmt.Fprintf(&b, "https://:%s {\n\ttls %s %s {\n%s\t}\n%s}\n", port, p.opts.CertFile, p.opts.KeyFile, indent(p.opts.TLS, 2), body)
	}
	return b.String()
}

// Log returns the lines of Caddy's log so far, decoded; only those of the named logger (a prefix) if one is given.
func (p *Proxy) Log(logger string) []map[string]any {
	p.t.Helper()
	raw, err := os.ReadFile(p.logFile)
	if err != nil {
		p.t.Fatal(err)
	}
	var out []map[string]any
	for line := range strings.Lines(string(raw)) {
		var m map[string]any
		if json.Unmarshal([]byte(line), &m) != nil {
			continue // being written
		}
		if name, _ := m["logger"].(string); strings.HasPrefix(name, logger) {
			out = append(out, m)
		}
	}
	return out
}

// Adapt turns a Caddyfile into JSON.
func Adapt(file string) ([]byte, error) {
	raw, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(file), map[string]any{"filename": "Caddyfile"})
	return raw, err
}

func indent(s string, n int) string {
	if s == "" {
		return ""
	}
	var b strings.Builder
	for line := range strings.Lines(strings.TrimRight(s, "\n") + "\n") {
		b.WriteString(strings.Repeat("\t", n) + line)
	}
	return b.String()
}

// freeAddress finds a port that is free for TCP and UDP.
func freeAddress(t testing.TB) string {
	t.Helper()
	for range 50 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		u, err := net.ListenPacket("udp", addr)
		l.Close()
		if err == nil {
			u.Close()
			return addr
		}
	}
	t.Fatal("no port is free for both TCP and UDP")
	return ""
}

// FreeAddress finds an address nobody listens on.
func FreeAddress(t testing.TB) string { return freeAddress(t) }

// Main prepares the process for Caddy and runs the tests: nothing may be written to the user's home.
func Main(m *testing.M) {
	dir, err := os.MkdirTemp("", "grpc_proxy-test-")
	if err != nil {
		panic(err)
	}
	for _, name := range []string{"XDG_CONFIG_HOME", "XDG_DATA_HOME", "HOME"} {
		os.Setenv(name, dir)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}
