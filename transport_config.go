package grpcproxy

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Transport says how the upstreams are reached. They always speak HTTP/2: in plaintext with prior knowledge (h2c), or
// over TLS.
type Transport struct {
	// The name of the transport, where a configuration of `reverse_proxy` has it. It can only be `http`, and changes
	// nothing.
	Protocol string `json:"protocol,omitempty"`

	// The versions of HTTP, where a configuration of `reverse_proxy` has them. They can only be `h2c` and `2`, and change
	// nothing: the upstreams' scheme and `tls` say which it is.
	Versions []string `json:"versions,omitempty"`

	// TLS to the upstreams. An `https://` or `grpcs://` upstream turns it on with these settings or, without any, with
	// the system's trust store. The server name defaults to the upstream's host.
	TLS *reverseproxy.TLSConfig `json:"tls,omitempty"`

	// How long making a connection may take, up to the upstream's first HTTP/2 frame. Default: `3s`.
	DialTimeout caddy.Duration `json:"dial_timeout,omitempty"`

	// How long the first address family (IPv6) is tried before the other joins in (RFC 8305). A negative value turns
	// that off. Default: `300ms`.
	FallbackDelay caddy.Duration `json:"dial_fallback_delay,omitempty"`

	// The local IP address to dial from, with or without a port. Default: any.
	LocalAddress string `json:"local_address,omitempty"`

	// The DNS servers that resolve the upstreams' names. Default: the system's.
	Resolver *Resolver `json:"resolver,omitempty"`

	// Keepalive of the connections to the upstreams.
	KeepAlive *KeepAlive `json:"keep_alive,omitempty"`

	// The version, `v1` or `v2`, of the PROXY protocol header that tells an upstream the client's address. Each client's
	// RPCs then travel on connections of their own. Default: none is sent.
	ProxyProtocol string `json:"proxy_protocol,omitempty"`

	// How many connections to each upstream are made when the configuration starts and kept from then on. Handlers that reach an
	// upstream in the same way share its connections; if they say different numbers, the largest is kept. Default: 0; the
	// first is made by the first RPC.
	MinConns int `json:"min_conns,omitempty"`

	// How many connections one upstream may have; a further one is opened before the others' streams are used up. If handlers
	// that share the upstream's connections say different numbers, the largest holds for all of them, and the log says so.
	// Default: 10.
	MaxConns int `json:"max_conns,omitempty"`

	// How many streams one connection carries at a time, below the upstream's own limit
	// (SETTINGS_MAX_CONCURRENT_STREAMS). Default: the upstream's limit.
	MaxStreamsPerConn int `json:"max_streams_per_conn,omitempty"`

	// How many RPCs may wait for a stream of one upstream when all are taken, those with the earliest deadlines first. With 0
	// none waits. Those that wait for a connection to be made do not count. If handlers that share the upstream's connections say
	// different numbers, the largest holds for all of them. Default: 1024.
	QueueSize *int `json:"queue_size,omitempty"`

	// The gRPC status for RPCs beyond that: `UNAVAILABLE`, which clients may retry, or `RESOURCE_EXHAUSTED`. Default:
	// `UNAVAILABLE`.
	QueueFullStatus string `json:"queue_full_status,omitempty"`

	// Retires a connection after so long (±10 %); its streams finish. Default: never.
	MaxConnAge caddy.Duration `json:"max_conn_age,omitempty"`

	// The largest metadata, in bytes, that an upstream's answer may carry, headers and trailers each. Default: 1 MiB.
	MaxResponseHeaderSize int64 `json:"max_response_header_size,omitempty"`

	files *tlsFiles
}

// Resolver names DNS servers.
type Resolver struct {
	// `host:port` of each; the port defaults to 53. Placeholders are resolved when the configuration is loaded. One is
	// chosen at random for each look-up.
	Addresses []string `json:"addresses,omitempty"`
}

// KeepAlive tells dead connections from quiet ones.
type KeepAlive struct {
	// How long nothing may be heard from an upstream, with streams open, before it is sent a PING. Stock gRPC servers
	// close connections that ping a quiet stream more often than every 5 minutes, so lower it only if theirs is lowered
	// too. A negative value turns PINGs off. Default: `5m`.
	Interval caddy.Duration `json:"interval,omitempty"`

	// How long the answer to a PING, or the acknowledgement of sent data, may take. Default: `20s`.
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// Send PINGs on connections without streams as well. Default: false.
	PermitWithoutStreams bool `json:"permit_without_streams,omitempty"`

	// Closes a connection that had no stream for so long. A negative value turns that off. Default: `5m`.
	IdleTimeout caddy.Duration `json:"idle_timeout,omitempty"`
}

// config turns the settings into the transport's own.
func (t *Transport) config(ctx caddy.Context, scheme upstream.Scheme) (transport.Config, error) {
	cfg := transport.Config{
		DialTimeout:       time.Duration(t.DialTimeout),
		FallbackDelay:     time.Duration(t.FallbackDelay),
		MinConns:          t.MinConns,
		MaxConns:          t.MaxConns,
		MaxStreamsPerConn: uint32(min(max(t.MaxStreamsPerConn, 0), math.MaxInt32)),
		MaxAge:            time.Duration(t.MaxConnAge),
		MaxHeaderListSize: uint32(min(max(t.MaxResponseHeaderSize, 0), math.MaxInt32)),
	}
	if n := t.QueueSize; n != nil {
		cfg.QueueSize = cmp.Or(*n, -1) // transport's 0 is the default
	}
	if k := t.KeepAlive; k != nil {
		cfg.PingInterval = time.Duration(k.Interval)
		cfg.PingTimeout = time.Duration(k.Timeout)
		cfg.PingWithoutStreams = k.PermitWithoutStreams
		cfg.IdleTimeout = time.Duration(k.IdleTimeout)
	}
	switch t.ProxyProtocol {
	case "":
	case "v1":
		cfg.ProxyProtocol = 1
	case "v2":
		cfg.ProxyProtocol = 2
	default:
		return cfg, fmt.Errorf("proxy_protocol %q is none of v1, v2", t.ProxyProtocol)
	}
	var err error
	if cfg.LocalAddr, err = parseLocalAddress(t.LocalAddress); err != nil {
		return cfg, err
	}
	if cfg.Resolver, err = t.Resolver.resolver(); err != nil {
		return cfg, err
	}
	if t.TLS == nil && scheme == upstream.SchemeTLS {
		t.TLS = new(reverseproxy.TLSConfig)
	}
	settings := *t
	// What does not make connections different does not keep them apart: see transport.Endpoint.Use.
	settings.Protocol, settings.Versions, settings.QueueFullStatus = "", nil, ""
	settings.MinConns, settings.MaxConns, settings.QueueSize = 0, 0, nil
	raw, err := json.Marshal(settings) // before the CA module is loaded, which takes its configuration away
	if err != nil {
		return cfg, err
	}
	if t.TLS != nil {
		if scheme == upstream.SchemePlain {
			return cfg, fmt.Errorf("tls is configured, but the upstreams are plaintext (h2c://); write https://, or remove the tls settings")
		}
		cfg.TLSTimeout = time.Duration(t.TLS.HandshakeTimeout)
		if t.files, err = newTLSFiles(ctx, t.TLS); err != nil {
			return cfg, fmt.Errorf("tls: %w", err)
		}
		if cfg.TLS, err = t.TLS.MakeTLSClientConfig(ctx); err != nil {
			return cfg, fmt.Errorf("tls: %w", err)
		}
		if cfg.TLS == nil {
			cfg.TLS = new(tls.Config)
		}
		if t.files != nil {
			t.files.cur = cfg.TLS
			cfg.CurrentTLS = t.files.current
		}
	}
	cfg.Identity = identities.of(raw, cfg.TLS)
	return cfg, nil
}

func (t *Transport) dialTimeout() time.Duration {
	return cmp.Or(time.Duration(t.DialTimeout), transport.DefaultDialTimeout)
}

// plainPort tells whether the endpoint's port is excepted from TLS.
func (t *Transport) plainPort(e *upstream.Endpoint) bool {
	if t.TLS == nil || len(t.TLS.ExceptPorts) == 0 || e.Network == "unix" {
		return false
	}
	_, port, err := net.SplitHostPort(e.Address)
	return err == nil && slices.Contains(t.TLS.ExceptPorts, port)
}

func (t *Transport) validate() error {
	if t.Protocol != "" && t.Protocol != "http" {
		return fmt.Errorf("transport.protocol %q cannot carry gRPC; write http, or leave it out", t.Protocol)
	}
	for _, v := range t.Versions {
		if v != "h2c" && v != "2" {
			return fmt.Errorf("transport.versions has %q; gRPC needs HTTP/2: write h2c (plaintext) or 2 (TLS), or leave it out", v)
		}
	}
	for _, n := range []struct {
		name  string
		value int64
	}{
		{"min_conns", int64(t.MinConns)},
		{"max_conns", int64(t.MaxConns)},
		{"max_streams_per_conn", int64(t.MaxStreamsPerConn)},
		{"queue_size", int64(orZero(t.QueueSize))},
		{"max_response_header_size", t.MaxResponseHeaderSize},
		{"dial_timeout", int64(t.DialTimeout)},
		{"max_conn_age", int64(t.MaxConnAge)},
	} {
		if n.value < 0 {
			return fmt.Errorf("transport.%s must not be negative (leave it out for the default)", n.name)
		}
	}
	most := t.MaxConns
	if most == 0 {
		most = transport.DefaultMaxConns
	}
	if t.MinConns > most {
		return fmt.Errorf("transport.min_conns is %d, above max_conns, which is %d", t.MinConns, most)
	}
	if t.MinConns > 0 && t.ProxyProtocol != "" {
		return errors.New("transport.min_conns does not go with proxy_protocol: a connection cannot be made before its client is known")
	}
	if _, err := t.queueFull(); err != nil {
		return err
	}
	if k := t.KeepAlive; k != nil {
		if err := k.validate(); err != nil {
			return fmt.Errorf("transport.keep_alive.%w", err)
		}
	}
	return nil
}

func orZero(n *int) int {
	if n == nil {
		return 0
	}
	return *n
}

func (k *KeepAlive) validate() error {
	if k.Interval > 0 && time.Duration(k.Interval) < time.Second {
		return fmt.Errorf("interval is %v; the shortest is 1s, and stock gRPC servers tolerate no less than 5m", time.Duration(k.Interval))
	}
	if k.Timeout < 0 {
		return fmt.Errorf("timeout is %v; it must not be negative", time.Duration(k.Timeout))
	}
	return nil
}

// queueFull is the status for calls that find the queue full.
func (t *Transport) queueFull() (grpcwire.Code, error) {
	if t.QueueFullStatus == "" {
		return grpcwire.Unavailable, nil
	}
	switch code, _ := grpcwire.ParseCode(t.QueueFullStatus); code {
	case grpcwire.Unavailable, grpcwire.ResourceExhausted:
		return code, nil
	}
	return 0, fmt.Errorf("transport.queue_full_status %q is none of UNAVAILABLE, RESOURCE_EXHAUSTED", t.QueueFullStatus)
}

func parseLocalAddress(s string) (net.Addr, error) {
	if s == "" {
		return nil, nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = s, "0"
	}
	ip := net.ParseIP(host)
	n, perr := strconv.ParseUint(port, 10, 16)
	if ip == nil || perr != nil {
		return nil, fmt.Errorf("local_address %q is not an IP address of this machine, with or without a port", s)
	}
	return &net.TCPAddr{IP: ip, Port: int(n)}, nil
}

func (r *Resolver) resolver() (*net.Resolver, error) {
	if r == nil || len(r.Addresses) == 0 {
		return nil, nil
	}
	addrs := make([]string, len(r.Addresses))
	for i, a := range r.Addresses {
		resolved, err := upstream.Resolve(a)
		if err != nil {
			return nil, fmt.Errorf("resolver address %w", err)
		}
		na, err := caddy.ParseNetworkAddressWithDefaults(resolved, "udp", 53)
		if err != nil || na.PortRangeSize() != 1 || na.Host == "" || hasPlaceholder(na.Host) {
			return nil, fmt.Errorf("resolver address %q is not host:port of one DNS server", a)
		}
		addrs[i] = na.JoinHostPort(0)
	}
	return &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, addrs[rand.IntN(len(addrs))]) //nolint:gosec // spreading load
		},
	}, nil
}

// identities gives equal transports the same name and different ones different names, by what the settings led to: a
// certificate or CA file that changed on disk makes another transport, though the configuration reads the same.
var identities identityList

type identityList struct {
	mu   sync.Mutex
	next int
	list []identity
}

type identity struct {
	name string
	raw  []byte
	tls  *tls.Config
}

// maxIdentities bounds the list; a forgotten transport merely dials anew at the next reload.
const maxIdentities = 256

func (l *identityList) of(raw []byte, cfg *tls.Config) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range l.list {
		if bytes.Equal(id.raw, raw) && sameTLS(id.tls, cfg) {
			return id.name
		}
	}
	l.next++
	id := identity{name: strconv.Itoa(l.next), raw: raw, tls: cfg}
	if len(l.list) >= maxIdentities {
		l.list = slices.Delete(l.list, 0, 1)
	}
	l.list = append(l.list, id)
	return id.name
}

func sameTLS(a, b *tls.Config) bool {
	if a == nil || b == nil {
		return a == b
	}
	if !sameCertificates(a, b) || (a.RootCAs == nil) != (b.RootCAs == nil) {
		return false
	}
	return a.RootCAs == nil || a.RootCAs.Equal(b.RootCAs)
}

func sameCertificates(a, b *tls.Config) bool {
	return slices.EqualFunc(a.Certificates, b.Certificates, func(a, b tls.Certificate) bool {
		return slices.EqualFunc(a.Certificate, b.Certificate, bytes.Equal)
	})
}
