package grpcproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "grpc-proxy",
		Usage: `--to <addr>... [--from <addr>] [--policy <name>] [--insecure] [--internal-certs] [--disable-redirects] [--header-up "Field: value"] [--header-down "Field: value"] [--access-log] [--debug]`,
		Short: "A quick gRPC load balancer",
		Long: `
Balances gRPC calls from the --from address over the --to addresses, call by
call. Repeat --to, or separate addresses by commas.

An upstream is host:port or h2c://host:port (plaintext), https://host:port
(TLS), or unix//path/to/socket.

If --from has a host name, it is served over HTTPS with a certificate that
Caddy obtains (--internal-certs: from its own local authority). Write
http://:8080, say, for plaintext HTTP/2.`,
		CobraFunc: func(cmd *cobra.Command) {
			f := cmd.Flags()
			f.StringP("from", "f", "localhost", "Address to receive calls on")
			f.StringSliceP("to", "t", nil, "Upstream address(es)")
			f.StringP("policy", "p", defaultPolicy, "Selection policy")
			f.BoolP("insecure", "", false, "Do not verify the upstreams' certificates (DISABLES SECURITY)")
			f.BoolP("disable-redirects", "r", false, "Do not listen on the HTTP port for redirects to HTTPS")
			f.BoolP("internal-certs", "i", false, "Use Caddy's local authority for certificates")
			f.StringArrayP("header-up", "H", nil, `Set request metadata for the upstream ("Field: value")`)
			f.StringArrayP("header-down", "d", nil, `Set response metadata for the client ("Field: value")`)
			f.BoolP("access-log", "", false, "Write an access log")
			f.BoolP("debug", "v", false, "Log verbosely")
			cmd.RunE = caddycmd.WrapCommandFuncForCobra(cmdProxy)
			cmd.AddCommand(routesCommand())
		},
	})
}

// cmdProxy runs a proxy until the process is told to stop.
func cmdProxy(fl caddycmd.Flags) (int, error) {
	caddy.TrapSignals()
	cfg, err := commandConfig(fl)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	if err := caddy.Run(cfg); err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	to, _ := fl.GetStringSlice("to")
	caddy.Log().Info("gRPC proxy running", zap.String("from", fl.String("from")), zap.Strings("to", to), zap.String("policy", fl.String("policy")))
	select {}
}

// commandConfig builds the configuration that the flags stand for.
func commandConfig(fl caddycmd.Flags) (*caddy.Config, error) {
	if fl.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q: the command takes flags only; for several upstreams, repeat --to or separate them by commas", fl.Arg(0))
	}
	from, err := commandFrom(fl.String("from"))
	if err != nil {
		return nil, err
	}
	handler, err := commandHandler(fl)
	if err != nil {
		return nil, err
	}
	route := caddyhttp.Route{HandlersRaw: []json.RawMessage{caddyconfig.JSONModuleObject(handler, "handler", "grpc_proxy", nil)}}
	if from.Host != "" {
		route.MatcherSetsRaw = []caddy.ModuleMap{{"host": caddyconfig.JSON(caddyhttp.MatchHost{from.Host}, nil)}}
	}
	server := &caddyhttp.Server{
		Routes: caddyhttp.RouteList{route}, Listen: []string{":" + from.Port},
		ListenerWrappersRaw: []json.RawMessage{json.RawMessage(`{"wrapper":"grpc_relay"}`)},
	}
	if fl.Bool("access-log") {
		server.Logs = new(caddyhttp.ServerLogConfig)
	}
	if from.Scheme == "http" {
		server.Protocols = []string{"h1", "h2c"}
		server.AutoHTTPS = &caddyhttp.AutoHTTPSConfig{Disabled: true}
	} else if fl.Bool("disable-redirects") {
		server.AutoHTTPS = &caddyhttp.AutoHTTPSConfig{DisableRedir: true}
	}
	apps := caddy.ModuleMap{
		"http": caddyconfig.JSON(caddyhttp.App{Servers: map[string]*caddyhttp.Server{"grpc_proxy": server}}, nil),
	}
	if fl.Bool("internal-certs") && from.Host != "" {
		apps["tls"] = caddyconfig.JSON(caddytls.TLS{Automation: &caddytls.AutomationConfig{
			Policies: []*caddytls.AutomationPolicy{{
				SubjectsRaw: []string{from.Host},
				IssuersRaw:  []json.RawMessage{json.RawMessage(`{"module":"internal"}`)},
			}},
		}}, nil)
	}
	persist := false
	cfg := &caddy.Config{
		Admin:   &caddy.AdminConfig{Disabled: true, Config: &caddy.ConfigSettings{Persist: &persist}},
		AppsRaw: apps,
	}
	if fl.Bool("debug") {
		cfg.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{
			"default": {BaseLog: caddy.BaseLog{Level: zap.DebugLevel.CapitalString()}},
		}}
	}
	return cfg, nil
}

// commandFrom completes the address to listen on.
func commandFrom(from string) (httpcaddyfile.Address, error) {
	httpPort, httpsPort := strconv.Itoa(caddyhttp.DefaultHTTPPort), strconv.Itoa(caddyhttp.DefaultHTTPSPort)
	addr, err := httpcaddyfile.ParseAddress(from)
	if err != nil {
		return addr, fmt.Errorf("--from %s: %w", from, err)
	}
	if addr.Path != "" {
		return addr, fmt.Errorf("--from %s: paths are not allowed", from)
	}
	switch addr.Scheme = strings.ToLower(addr.Scheme); addr.Scheme {
	case "http", "https":
	case "h2c":
		addr.Scheme = "http"
	case "":
		addr.Scheme = "https"
		if addr.Port == httpPort || addr.Host == "" {
			addr.Scheme = "http"
		}
	default:
		return addr, fmt.Errorf("--from %s: unsupported scheme %s://; use http:// or h2c:// (plaintext), https:// (TLS), or none", from, addr.Scheme)
	}
	if addr.Port == "" {
		addr.Port = httpsPort
		if addr.Scheme == "http" {
			addr.Port = httpPort
		}
	}
	return addr, nil
}

// commandHandler builds the handler that the flags stand for.
func commandHandler(fl caddycmd.Flags) (*Handler, error) {
	to, err := fl.GetStringSlice("to")
	if err != nil {
		return nil, err
	}
	if len(to) == 0 {
		return nil, errors.New("--to is required: the address of an upstream, such as localhost:50051")
	}
	h := &Handler{LoadBalancing: &LoadBalancing{
		SelectionPolicyRaw: caddyconfig.JSON(map[string]string{"policy": fl.String("policy")}, nil),
	}}
	if _, err := caddy.GetModule("http.grpc_proxy.selection_policies." + fl.String("policy")); err != nil {
		return nil, fmt.Errorf("--policy %s: there is no such policy; available: %s", fl.String("policy"), modulesBelow("http.grpc_proxy.selection_policies"))
	}
	for _, addr := range to {
		scheme, err := checkUpstream(addr)
		if err != nil {
			return nil, fmt.Errorf("--to: %w", err)
		}
		if fl.Bool("insecure") && scheme != upstream.SchemeTLS {
			return nil, fmt.Errorf("--insecure is for TLS upstreams, but %s is plaintext; write https://", addr)
		}
		h.Upstreams = append(h.Upstreams, &Upstream{Dial: addr})
	}
	if fl.Bool("insecure") {
		h.Transport = &Transport{TLS: &reverseproxy.TLSConfig{InsecureSkipVerify: true}}
	}
	up, err := commandMetadata(fl, "header-up")
	if err != nil {
		return nil, err
	}
	down, err := commandMetadata(fl, "header-down")
	if err != nil {
		return nil, err
	}
	if up != nil || down != nil {
		h.Headers = new(headers.Handler)
		if up != nil {
			h.Headers.Request = &headers.HeaderOps{Set: up}
		}
		if down != nil {
			h.Headers.Response = &headers.RespHeaderOps{HeaderOps: &headers.HeaderOps{Set: down}}
		}
	}
	return h, nil
}

func commandMetadata(fl caddycmd.Flags, name string) (http.Header, error) {
	list, err := fl.GetStringArray(name)
	if err != nil || len(list) == 0 {
		return nil, err
	}
	h := make(http.Header)
	for _, item := range list {
		key, value, ok := strings.Cut(item, ":")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok || key == "" || value == "" {
			return nil, fmt.Errorf("--%s %q is not of the form \"Field: value\"", name, item)
		}
		h.Set(key, value)
	}
	return h, nil
}
