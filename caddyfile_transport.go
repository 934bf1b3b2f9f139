package grpcproxy

import (
	"strconv"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"github.com/dustin/go-humanize"
)

// transportBlock reads `transport http { ... }`, reverse_proxy's place for these words.
func (p *parser) transportBlock() error {
	name, err := p.single()
	if err != nil {
		return err
	}
	if name != "http" {
		return p.Errf("transport %q cannot carry gRPC; write transport http, or its words without a block", name)
	}
	p.transport()
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		known, err := p.transportWord()
		if err != nil {
			return err
		}
		if !known {
			return p.Errf("unrecognized transport subdirective %q", p.Val())
		}
	}
	return nil
}

func (p *parser) transport() *Transport {
	if p.h.Transport == nil {
		p.h.Transport = new(Transport)
	}
	return p.h.Transport
}

func (p *parser) keepAlive() *KeepAlive {
	t := p.transport()
	if t.KeepAlive == nil {
		t.KeepAlive = new(KeepAlive)
	}
	return t.KeepAlive
}

// transportWord reads a word about connections. known is false if it is none.
func (p *parser) transportWord() (known bool, err error) {
	if known, err := p.tlsWord(); known {
		return true, err
	}
	switch word := p.Val(); word {
	case "dial_timeout":
		return true, p.duration(&p.transport().DialTimeout)
	case "dial_fallback_delay":
		return true, p.durationOrOff(&p.transport().FallbackDelay)
	case "local_address":
		return true, p.text(&p.transport().LocalAddress)
	case "resolvers":
		return true, p.resolvers()
	case "max_conns", "max_conns_per_host":
		return true, p.integer(&p.transport().MaxConns)
	case "max_streams_per_conn":
		return true, p.integer(&p.transport().MaxStreamsPerConn)
	case "min_conns":
		return true, p.integer(&p.transport().MinConns)
	case "queue_size":
		return true, p.queueSize()
	case "queue_full_status":
		return true, p.queueFullStatus()
	case "proxy_protocol":
		return true, p.proxyProtocol()
	case "max_conn_age":
		return true, p.duration(&p.transport().MaxConnAge)
	case "max_response_header":
		return true, p.size(&p.transport().MaxResponseHeaderSize)
	case "keepalive":
		return true, p.keepaliveWord()
	case "keepalive_interval":
		return true, p.keepaliveInterval("keepalive_")
	case "keepalive_idle_conns", "keepalive_idle_conns_per_host", "read_buffer", "write_buffer", "compression":
		p.noEffect("its upstream connections are HTTP/2 streams over a few connections")
		return true, nil
	case "versions":
		return true, p.versions()
	case "read_timeout", "write_timeout", "response_header_timeout", "expect_continue_timeout":
		return true, p.Errf("%s would cut streams; use max_timeout, stream_timeout or stream_idle_timeout", word)
	case "forward_proxy_url", "network_proxy":
		return true, p.Errf("%s is not available in grpc_proxy; connections to upstreams are made directly", word)
	case "tls_trusted_ca_certs":
		return true, p.Errf("tls_trusted_ca_certs is gone; write tls_trust_pool file <paths...>")
	}
	return false, nil
}

func (p *parser) keepaliveWord() error {
	k := p.keepAlive()
	if p.CountRemainingArgs() > 0 {
		return p.durationOrOff(&k.IdleTimeout)
	}
	empty := true
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		var err error
		empty = false
		switch p.Val() {
		case "interval":
			err = p.keepaliveInterval("keepalive ")
		case "timeout":
			err = p.duration(&k.Timeout)
		case "idle_timeout":
			err = p.durationOrOff(&k.IdleTimeout)
		case "permit_without_streams":
			err = p.flag(&k.PermitWithoutStreams)
		default:
			err = p.Errf("unrecognized keepalive subdirective %q; expected interval, timeout, idle_timeout or permit_without_streams", p.Val())
		}
		if err != nil {
			return err
		}
	}
	if empty {
		return p.ArgErr()
	}
	return nil
}

// keepaliveInterval reads either spelling of the interval of PINGs.
func (p *parser) keepaliveInterval(prefix string) error {
	k := p.keepAlive()
	if err := p.durationOrOff(&k.Interval); err != nil {
		return err
	}
	if err := k.validate(); err != nil {
		return p.Errf("%s%w", prefix, err)
	}
	return nil
}

// queueSize reads a number that may be 0.
func (p *parser) queueSize() error {
	t := p.transport()
	name, arg, err := p.one()
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(arg)
	if err != nil || n < 0 {
		return p.Errf("%s: %q is not a positive whole number, or 0 to let no call wait; leave the line out for the default", name, arg)
	}
	t.QueueSize = &n
	return nil
}

func (p *parser) queueFullStatus() error {
	t := p.transport()
	if err := p.text(&t.QueueFullStatus); err != nil {
		return err
	}
	if _, err := t.queueFull(); err != nil {
		return p.WrapErr(err)
	}
	return nil
}

func (p *parser) proxyProtocol() error {
	t := p.transport()
	if err := p.text(&t.ProxyProtocol); err != nil {
		return err
	}
	if v := t.ProxyProtocol; v != "v1" && v != "v2" {
		return p.Errf("proxy_protocol: %q is none of v1, v2", v)
	}
	return nil
}

func (p *parser) resolvers() error {
	args := p.RemainingArgs()
	if len(args) == 0 {
		return p.ArgErr()
	}
	t := p.transport()
	if t.Resolver == nil {
		t.Resolver = new(Resolver)
	}
	t.Resolver.Addresses = append(t.Resolver.Addresses, args...)
	return nil
}

func (p *parser) versions() error {
	args := p.RemainingArgs()
	if len(args) == 0 {
		return p.ArgErr()
	}
	for _, v := range args {
		switch v {
		case "h2c", "2":
		default:
			return p.Errf("versions %s: gRPC needs HTTP/2; write h2c (plaintext) or 2 (TLS), or leave the line out", v)
		}
	}
	return nil
}

// tls returns the TLS settings, making them if there are none.
func (p *parser) tls() *reverseproxy.TLSConfig {
	t := p.transport()
	if t.TLS == nil {
		t.TLS = new(reverseproxy.TLSConfig)
	}
	return t.TLS
}

func (p *parser) tlsWord() (known bool, err error) {
	switch word := p.Val(); word {
	case "tls":
		if p.NextArg() {
			return true, p.ArgErr()
		}
		p.tls()
		return true, nil
	case "tls_server_name":
		return true, p.text(&p.tls().ServerName)
	case "tls_insecure_skip_verify":
		return true, p.flag(&p.tls().InsecureSkipVerify)
	case "tls_timeout":
		return true, p.duration(&p.tls().HandshakeTimeout)
	case "tls_renegotiation":
		if err := p.text(&p.tls().Renegotiation); err != nil {
			return true, err
		}
		switch v := p.tls().Renegotiation; v {
		case "never", "once", "freely":
			return true, nil
		default:
			return true, p.Errf("tls_renegotiation: %q is none of never, once, freely", v)
		}
	case "tls_client_auth":
		return true, p.clientAuth()
	case "tls_trust_pool":
		return true, p.trustPool()
	case "tls_curves", "tls_except_ports":
		args := p.RemainingArgs()
		if len(args) == 0 {
			return true, p.ArgErr()
		}
		if word == "tls_curves" {
			p.tls().Curves = append(p.tls().Curves, args...)
		} else {
			p.tls().ExceptPorts = append(p.tls().ExceptPorts, args...)
		}
		return true, nil
	}
	return false, nil
}

func (p *parser) clientAuth() error {
	t := p.tls()
	t.ClientCertificateAutomate, t.ClientCertificateFile, t.ClientCertificateKeyFile = "", "", ""
	switch args := p.RemainingArgs(); len(args) {
	case 1:
		t.ClientCertificateAutomate = args[0]
	case 2:
		t.ClientCertificateFile, t.ClientCertificateKeyFile = args[0], args[1]
	default:
		return p.ArgErr()
	}
	return nil
}

func (p *parser) trustPool() error {
	if !p.NextArg() {
		return p.ArgErr()
	}
	name := p.Val()
	t := p.tls()
	if t.CARaw != nil {
		return p.twice("tls_trust_pool")
	}
	id := "tls.ca_pool.source." + name
	mod, err := caddyfile.UnmarshalModule(p.Dispenser, id)
	if err != nil {
		return err
	}
	ca, ok := mod.(caddytls.CA)
	if !ok {
		return p.Errf("module %s is not a source of CA certificates", id)
	}
	t.CARaw = caddyconfig.JSONModuleObject(ca, "provider", name, nil)
	return nil
}

func (p *parser) text(v *string) error {
	_, arg, err := p.one()
	if err != nil {
		return err
	}
	*v = arg
	return nil
}

func (p *parser) size(v *int64) error { return p.sizeUpTo(v, 1<<30, "1GiB", "64KiB") }

func (p *parser) sizeUpTo(v *int64, most uint64, text, example string) error {
	name, arg, err := p.one()
	if err != nil {
		return err
	}
	n, err := humanize.ParseBytes(arg)
	if err != nil || n == 0 || n > most {
		return p.Errf("%s: %q is not a size up to %s; write %s, say", name, arg, text, example)
	}
	*v = int64(n)
	return nil
}
