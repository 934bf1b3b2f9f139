package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// proxy is one way to run a proxy in front of the backends.
type proxy struct {
	// version tells what is measured, "" if it is not installed.
	version func(b *bench) string
	// command writes a configuration and returns the command that runs it.
	command func(b *bench, addr string) (*exec.Cmd, error)
	// workers: the work is done by child processes.
	workers bool
}

var proxies = map[string]proxy{
	"grpc_proxy":    {version: caddyVersion, command: caddy(now, grpcProxy)},
	"before":        {version: beforeVersion, command: caddy(before, grpcProxy)},
	"relay":         {version: caddyVersion, command: caddy(now, grpcProxy, relay)},
	"hop":           {version: caddyVersion, command: caddy(now, "encode gzip\n\t"+grpcProxy, relay)},
	"encode":        {version: caddyVersion, command: caddy(now, "encode gzip\n\t"+grpcProxy)},
	"reverse_proxy": {version: caddyVersion, command: caddy(now, "reverse_proxy %s {\n\t\tlb_policy round_robin\n\t}%.0s")},
	"noop":          {version: caddyVersion, command: caddy(now, "respond 200%.0s%.0s")},
	"nginx":         {version: debian("nginx", "-v"), command: nginx, workers: true},
	"haproxy":       {version: debian("haproxy", "-v"), command: haproxy},
	"core":          {version: coreVersion, command: core},
}

// relay is what stands in the servers' options for clients to be served directly, or, with encode in front, over the hop.
const relay = "\t\tlistener_wrappers {\n\t\t\tgrpc_relay\n\t\t}\n"

const grpcProxy = "grpc_proxy %s {\n\t\tlb_policy round_robin\n%s\t}"

// The two builds of Caddy: the one to measure and, to compare with, an earlier one.
func now(b *bench) string    { return b.caddy }
func before(b *bench) string { return b.before }

func caddyVersion(b *bench) string { return debian(b.caddy, "version")(b) }

func beforeVersion(b *bench) string {
	if b.before == "" {
		return ""
	}
	return debian(b.before, "version")(b)
}

func debian(name, flag string) func(*bench) string {
	return func(*bench) string {
		out, err := exec.Command(name, flag).CombinedOutput()
		if err != nil {
			return ""
		}
		line, _, _ := strings.Cut(string(out), "\n")
		return line
	}
}

func (b *bench) file(name, text string) (string, error) {
	path := filepath.Join(b.dir, name)
	return path, os.WriteFile(path, []byte(text), 0o600)
}

func caddy(binary func(*bench) string, directive string, options ...string) func(b *bench, addr string) (*exec.Cmd, error) {
	return func(b *bench, addr string) (*exec.Cmd, error) {
		to := strings.Join(b.backends, " ")
		if strings.HasPrefix(directive, "reverse_proxy") {
			to = "h2c://" + strings.Join(b.backends, " h2c://")
		}
		log := ""
		if b.accessLog {
			log = "\tlog {\n\t\toutput file /dev/null\n\t}\n"
		}
		site, cert := "http://"+addr, ""
		if b.tls {
			site, cert = "https://"+addr, fmt.Sprintf("\ttls %[1]s/cert.pem %[1]s/key.pem\n", b.dir)
		}
		path, err := b.file("Caddyfile", fmt.Sprintf(
			"{\n\tadmin %s\n\tpersist_config off\n\tauto_https off\n\tlog default {\n\t\toutput discard\n\t}\n\tservers {\n\t\tprotocols h1 h2 h2c\n%s\t}\n}\n%s {\n%s%s\t%s\n}\n",
			b.admin, strings.Join(options, ""), site, log, cert, fmt.Sprintf(directive, to, b.block)))
		if err != nil {
			return nil, err
		}
		cmd := exec.Command(binary(b), "run", "--config", path, "--adapter", "caddyfile")
		cmd.Env = append(os.Environ(), "HOME="+b.dir, "XDG_DATA_HOME="+b.dir, "XDG_CONFIG_HOME="+b.dir)
		return cmd, nil
	}
}

func nginx(b *bench, addr string) (*exec.Cmd, error) {
	var servers strings.Builder
	for _, a := range b.backends {
		servers.WriteString("server " + a + ";")
	}
	listen, cert := addr, ""
	if b.tls {
		listen, cert = addr+" ssl", fmt.Sprintf("ssl_certificate %[1]s/cert.pem; ssl_certificate_key %[1]s/key.pem;", b.dir)
	}
	path, err := b.file("nginx.conf", fmt.Sprintf(`daemon off; pid %[1]s/nginx.pid; error_log /dev/null; worker_processes 2; worker_rlimit_nofile 65536;
events { worker_connections 30000; }
http {
	access_log off; keepalive_requests 1000000000;
	http2_max_concurrent_streams 1000; large_client_header_buffers 4 16k;
	client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
	upstream u { %[3]s keepalive 512; keepalive_requests 1000000000; }
	server { listen %[2]s http2; %[4]s location / { grpc_pass grpc://u; grpc_read_timeout 1h; grpc_send_timeout 1h; client_body_timeout 1h; } }
}
`, b.dir, listen, servers.String(), cert))
	if err != nil {
		return nil, err
	}
	return exec.Command("nginx", "-c", path, "-e", "/dev/null"), nil
}

func haproxy(b *bench, addr string) (*exec.Cmd, error) {
	var servers strings.Builder
	for i, a := range b.backends {
		fmt.Fprintf(&servers, "\tserver s%d %s proto h2\n", i, a)
	}
	bind := addr + " proto h2"
	if b.tls {
		bind = fmt.Sprintf("%s ssl crt %s/both.pem alpn h2", addr, b.dir)
	}
	path, err := b.file("haproxy.cfg", fmt.Sprintf(`global
	nbthread 2
	tune.h2.max-concurrent-streams 1000
defaults
	mode http
	timeout connect 5s
	timeout client 1h
	timeout server 1h
	http-reuse always
frontend f
	bind %s
	default_backend b
backend b
	balance roundrobin
%s`, bind, servers.String()))
	if err != nil {
		return nil, err
	}
	return exec.Command("haproxy", "-db", "-f", path), nil
}

func coreVersion(b *bench) string {
	if b.core == "" {
		return ""
	}
	return "bench/core/server"
}

func core(b *bench, addr string) (*exec.Cmd, error) {
	cmd := exec.Command(b.core, append([]string{addr}, b.backends...)...)
	if b.tls {
		cmd.Env = append(os.Environ(), "CERT="+filepath.Join(b.dir, "cert.pem"), "KEY="+filepath.Join(b.dir, "key.pem"))
	}
	return cmd, nil
}

// startProxy runs the proxy and waits until it serves.
func (b *bench) startProxy(p proxy) (*exec.Cmd, string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, "", err
	}
	addr := l.Addr().String()
	l.Close()
	cmd, err := p.command(b, addr)
	if err != nil {
		return nil, "", err
	}
	var out strings.Builder
	cmd.Stderr = &out
	if err := b.spawn(cmd); err != nil {
		return nil, "", err
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if nc, err := net.Dial("tcp", addr); err == nil {
			nc.Close()
			return cmd, addr, nil
		}
	}
	b.end(cmd)
	return nil, "", fmt.Errorf("%w: %s", errNotReady, out.String())
}
