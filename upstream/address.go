package upstream

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// maxExpanded bounds what one address with a port range may expand to.
const maxExpanded = 4096

// Scheme says how an upstream is spoken to.
type Scheme string

const (
	// SchemeNone: the address had no scheme; plaintext HTTP/2 unless TLS is configured.
	SchemeNone Scheme = ""
	// SchemePlain is plaintext HTTP/2 with prior knowledge: h2c://, http://, grpc://.
	SchemePlain Scheme = "h2c"
	// SchemeTLS is HTTP/2 over TLS: https://, grpcs://.
	SchemeTLS Scheme = "https"
)

// Address is where an upstream is dialled.
type Address struct {
	// Network is tcp or unix.
	Network string
	// Dial is host:port, or the socket's path.
	Dial string
}

// String is the form that Parse reads again.
func (a Address) String() string {
	if a.Network == "unix" {
		return "unix/" + a.Dial
	}
	return a.Dial
}

// Key tells addresses apart.
func (a Address) Key() string { return a.Network + "/" + a.Dial }

// Host is the host part without port and brackets; empty for a unix socket.
func (a Address) Host() string {
	if a.Network == "unix" {
		return ""
	}
	h, _, _ := net.SplitHostPort(a.Dial)
	return h
}

// Resolve puts in the values of the placeholders that are known when the configuration is loaded, such as {env.*}. One
// without a value is an error: {env.HOST}:50051 would become :50051, which is this machine.
func Resolve(s string) (string, error) {
	out, err := caddy.NewReplacer().ReplaceOrErr(s, true, false)
	if err != nil {
		return "", fmt.Errorf("%q: %w; give it a value", s, err)
	}
	return out, nil
}

// Parse reads an upstream address as a user writes it:
//
//	host:port   :port   host:8000-8003   [::1]:port   unix//run/app.sock   unix+h2c//run/app.sock
//	h2c://host:port   http://host:port   grpc://host:port   https://host[:port]   grpcs://host:port
//
// A port range gives several addresses. ":port" means this machine. Placeholders must have been resolved.
func Parse(s string) ([]Address, Scheme, error) {
	if s == "" {
		return nil, "", errors.New("the upstream address is empty; write host:port, such as localhost:50051")
	}
	if strings.ContainsAny(s, "{}") {
		return nil, "", fmt.Errorf("upstream address %q contains a placeholder that is not known when the configuration is loaded; use {env.*}, {file.*} or {$VAR}", s)
	}
	if strings.ContainsAny(s, " \t\r\n") {
		return nil, "", fmt.Errorf("upstream address %q contains white space", s)
	}
	if strings.Contains(s, ",") && !strings.Contains(s, "unix") {
		return nil, "", fmt.Errorf("upstream address %q contains a comma; separate addresses by blanks (in JSON each has its own entry)", s)
	}
	scheme := SchemeNone
	rest := s
	if name, after, ok := strings.Cut(s, "://"); ok {
		var err error
		if rest, scheme, err = cutScheme(s, strings.ToLower(name), after); err != nil {
			return nil, "", err
		}
	}
	if path, ok := strings.CutPrefix(rest, "unix/"); ok {
		return unixAddress(s, path, scheme)
	}
	if path, ok := strings.CutPrefix(rest, "unix+h2c/"); ok {
		return unixAddress(s, path, SchemePlain)
	}
	if network, after, ok := strings.Cut(rest, "/"); ok {
		switch network {
		case "tcp", "tcp4", "tcp6":
			rest = after
		default:
			return nil, "", fmt.Errorf("upstream address %q: network %q is not supported; write host:port or unix//path/to/socket", s, network)
		}
	}
	addrs, err := expand(s, rest)
	return addrs, scheme, err
}

// cutScheme returns what follows the scheme as host:port, and what the scheme means.
func cutScheme(s, name, after string) (rest string, scheme Scheme, err error) {
	switch name {
	case "h2c", "http", "grpc":
		scheme = SchemePlain
	case "https", "grpcs":
		scheme = SchemeTLS
	case "dns":
		return "", "", fmt.Errorf("upstream address %q: a dns: target stands for several addresses; write host:port", s)
	case "xds":
		return "", "", fmt.Errorf("upstream address %q: xDS is not supported; write the upstreams' addresses, host:port", s)
	case "ws", "wss":
		return "", "", fmt.Errorf("upstream address %q: gRPC does not travel over WebSocket; write h2c:// or https://", s)
	case "unix":
		return "", "", fmt.Errorf("upstream address %q: write unix//path/to/socket (two slashes for an absolute path, no colon)", s)
	case "h3", "quic":
		return "", "", fmt.Errorf("upstream address %q: upstreams are reached by HTTP/2; write h2c:// or https://", s)
	default:
		return "", "", fmt.Errorf("upstream address %q: unsupported scheme %s://; use h2c:// (plaintext), https:// (TLS), or none", s, name)
	}
	if strings.HasPrefix(after, "unix/") || strings.HasPrefix(after, "unix+h2c/") {
		return after, scheme, nil
	}
	after = strings.TrimSuffix(after, "/")
	if i := strings.IndexAny(after, "/?#@"); i >= 0 {
		return "", "", fmt.Errorf("upstream address %q: only scheme, host and port are allowed; remove %q", s, after[i:])
	}
	if u, perr := url.Parse("//" + after); perr == nil && u.Port() == "" && !strings.HasSuffix(after, ":") {
		if name != "https" {
			return "", "", noPort(s, name+"://", after)
		}
		return net.JoinHostPort(u.Hostname(), "443"), scheme, nil
	}
	_, port, perr := net.SplitHostPort(after)
	switch {
	case perr != nil:
	case scheme == SchemePlain && port == "443":
		return "", "", fmt.Errorf("upstream address %q: scheme %s:// (plaintext) conflicts with port 443 (the HTTPS port); write https://", s, name)
	case scheme == SchemeTLS && port == "80":
		return "", "", fmt.Errorf("upstream address %q: scheme %s:// (TLS) conflicts with port 80 (the HTTP port); write h2c://", s, name)
	}
	return after, scheme, nil
}

func noPort(s, scheme, host string) error {
	if _, err := strconv.ParseUint(host, 10, 16); err == nil {
		return fmt.Errorf("upstream address %q is a port without a host; write %slocalhost:%s, say", s, scheme, host)
	}
	return fmt.Errorf("upstream address %q has no port; write %s%s:50051, say", s, scheme, host)
}

func unixAddress(s, path string, scheme Scheme) ([]Address, Scheme, error) {
	if path == "" {
		return nil, "", fmt.Errorf("upstream address %q names no socket; write unix//path/to/socket", s)
	}
	return []Address{{Network: "unix", Dial: path}}, scheme, nil
}

// expand resolves host:port or host:from-to into single addresses.
func expand(s, rest string) ([]Address, error) {
	if _, _, err := net.SplitHostPort(rest); err != nil {
		if _, ierr := netip.ParseAddr(rest); ierr == nil && strings.Contains(rest, ":") {
			return nil, fmt.Errorf("upstream address %q: write an IPv6 address in brackets and with a port, [%s]:50051", s, rest)
		}
		if strings.Contains(err.Error(), "missing port") {
			return nil, noPort(s, "", rest)
		}
		return nil, fmt.Errorf("upstream address %q: %w", s, err)
	}
	na, err := caddy.ParseNetworkAddress(rest)
	if err != nil {
		return nil, fmt.Errorf("upstream address %q: %w", s, err)
	}
	if na.StartPort == 0 {
		return nil, fmt.Errorf("upstream address %q: port 0 cannot be dialled", s)
	}
	if n := na.PortRangeSize(); n > maxExpanded {
		return nil, fmt.Errorf("upstream address %q stands for %d ports; at most %d are allowed", s, n, maxExpanded)
	}
	out := make([]Address, 0, na.PortRangeSize())
	for port := na.StartPort; port <= na.EndPort; port++ {
		host := na.Host
		if host == "" {
			host = "localhost"
		}
		out = append(out, Address{Network: "tcp", Dial: net.JoinHostPort(host, strconv.FormatUint(uint64(port), 10))})
	}
	return out, nil
}
