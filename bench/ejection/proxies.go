package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// proxy is a proxy in front of two backends. All are to take a backend out for 30 s after 5 failures, and to hold an answer
// for missing after 100 ms.
type proxy struct {
	name    string
	version []string
	// config is the text of a configuration that makes the proxy listen on addr. dir is its own.
	config  func(dir, addr, one, other string) string
	command func(dir, config string) *exec.Cmd
}

func proxies(caddy string) []proxy {
	return []proxy{
		{"nginx", []string{"nginx", "-v"}, nginxConfig, func(_, config string) *exec.Cmd {
			return exec.Command("nginx", "-c", config, "-e", "stderr")
		}},
		{"HAProxy", []string{"haproxy", "-v"}, haproxyConfig(""), haproxyCommand},
		// A failure that is repeated elsewhere is not observed, so which is better depends.
		{"HAProxy, retry-on", []string{"haproxy", "-v"}, haproxyConfig(haproxyRetries), haproxyCommand},
		{"reverse_proxy", []string{caddy, "version"}, caddyConfig(reverseProxy), caddyCommand(caddy)},
		{"grpc_proxy", []string{caddy, "version"}, caddyConfig(grpcProxy), caddyCommand(caddy)},
	}
}

// nginxConfig: a zone makes the workers count together. Calls are POST, which nginx repeats with non_idempotent only.
func nginxConfig(dir, addr, one, other string) string {
	return fmt.Sprintf(`daemon off;
pid %[1]s/nginx.pid;
worker_processes 2;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/b;
	proxy_temp_path       %[1]s/p;
	fastcgi_temp_path     %[1]s/f;
	uwsgi_temp_path       %[1]s/u;
	scgi_temp_path        %[1]s/s;
	upstream u {
		zone u 64k;
		server %[3]s max_fails=5 fail_timeout=30s;
		server %[4]s max_fails=5 fail_timeout=30s;
		keepalive 16;
	}
	server {
		listen %[2]s http2;
		location / {
			grpc_pass grpc://u;
			grpc_read_timeout   100ms;
			grpc_next_upstream  error timeout invalid_header http_500 http_502 http_503 http_504 non_idempotent;
		}
	}
}
`, dir, addr, one, other)
}

func haproxyCommand(_, config string) *exec.Cmd { return exec.Command("haproxy", "-db", "-f", config) }

const haproxyRetries = `	retries 3
	retry-on all-retryable-errors
	option redispatch 1
`

// haproxyConfig: observe wants check. The checks are connections, which all backends take, so their interval is how long a
// server is down.
func haproxyConfig(retries string) func(dir, addr, one, other string) string {
	return func(_, addr, one, other string) string {
		return fmt.Sprintf(`defaults
	mode http
	timeout connect 3s
	timeout client  1h
	timeout server  100ms
frontend f
	bind %s proto h2
	default_backend b
backend b
	balance roundrobin
%s	default-server proto h2 check inter 30s fall 1 rise 1 observe layer7 error-limit 5 on-error mark-down
	server one %s
	server other %s
`, addr, retries, one, other)
	}
}

func caddyCommand(caddy string) func(dir, config string) *exec.Cmd {
	return func(dir, config string) *exec.Cmd {
		cmd := exec.Command(caddy, "run", "--config", config, "--adapter", "caddyfile")
		cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
		return cmd
	}
}

const (
	grpcProxy = `grpc_proxy %s %s {
		lb_policy round_robin
		outlier_detection
		deadline_failure_after 100ms
	}`
	reverseProxy = `reverse_proxy h2c://%s h2c://%s {
		lb_policy round_robin
		lb_retries 3
		fail_duration 30s
		max_fails 5
		unhealthy_status 5xx
		transport http {
			response_header_timeout 100ms
		}
	}`
)

func caddyConfig(directive string) func(dir, addr, one, other string) string {
	return func(_, addr, one, other string) string {
		return fmt.Sprintf(`{
	admin off
	persist_config off
	auto_https off
	servers {
		protocols h1 h2c
	}
}

http://%s {
	%s
}
`, addr, fmt.Sprintf(directive, one, other))
	}
}

// start runs the proxy and returns once it listens.
func (p proxy) start(verbose bool, one, other string) (addr string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	addr = l.Addr().String()
	_ = l.Close()
	dir, err := os.MkdirTemp("", "grpc_proxy-ejection-")
	if err != nil {
		return "", nil, err
	}
	config, text := filepath.Join(dir, "config"), p.config(dir, addr, one, other)
	if verbose {
		fmt.Printf("\n# %s\n%s\n", p.name, text)
	}
	var log strings.Builder
	cmd := p.command(dir, config)
	cmd.Stdout, cmd.Stderr = &log, &log
	err = os.WriteFile(config, []byte(text), 0o600)
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		_ = os.RemoveAll(dir)
		return "", nil, err
	}
	stop = func() {
		// Not Kill: nginx's workers would outlive their master.
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if nc, err := net.Dial("tcp", addr); err == nil {
			_ = nc.Close()
			return addr, stop, nil
		}
	}
	stop()
	return "", nil, errors.New("it does not listen: " + log.String())
}
