package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// alpn is HTTP/2's name in TLS ALPN (RFC 9113 section 3.2).
const alpn = "h2"

// dial makes one connection and waits for the peer's first SETTINGS, so that an upstream that does not speak HTTP/2 is
// found out while nothing has been sent yet, and the peer's limit of streams is known before the first call.
func (e *Endpoint) dial(ctx context.Context, c *conn) *Error {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.DialTimeout)
	defer cancel()

	dial := e.cfg.Dial
	if dial == nil {
		d := net.Dialer{
			FallbackDelay: e.cfg.FallbackDelay,
			LocalAddr:     e.cfg.LocalAddr,
			Resolver:      e.cfg.Resolver,
			KeepAlive:     -1, // TCP_USER_TIMEOUT and PING do this job
		}
		dial = d.DialContext
	}
	nc, err := dial(ctx, e.addr.Network, e.addr.Dial)
	if err != nil {
		terr := e.dialError(KindDial, err)
		terr.unreached = true
		return terr
	}
	setUserTimeout(nc, e.cfg.PingTimeout)
	if err := e.writeProxyHeader(nc); err != nil {
		nc.Close()
		return e.dialError(KindDial, fmt.Errorf("sending the PROXY protocol header: %w", err))
	}

	if e.cfg.TLS != nil {
		tc, terr := e.handshake(ctx, nc)
		if terr != nil {
			nc.Close()
			return terr
		}
		nc = tc
	}

	c.Conn = h2.Client(nc, e.connConfig(c))
	silence := time.NewTimer(silentAfter)
	defer silence.Stop()
	for {
		select {
		case <-silence.C:
			e.silent(c)
			continue
		case <-c.Ready():
		case <-c.Done():
		case <-ctx.Done():
			c.Close(h2.NoError, "no HTTP/2 SETTINGS from the upstream")
			return e.dialError(KindDial, fmt.Errorf("no HTTP/2 SETTINGS from the upstream: %w", context.Cause(ctx)))
		}
		if herr := c.Err(); herr != nil {
			return e.settingsError(herr)
		}
		return nil
	}
}

func (e *Endpoint) handshake(ctx context.Context, nc net.Conn) (net.Conn, *Error) {
	if t := e.cfg.TLSTimeout; t > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, t)
		defer cancel()
	}
	tc := tls.Client(nc, e.clientTLS())
	if err := tc.HandshakeContext(ctx); err != nil {
		// RFC 7301 section 3.2: no_application_protocol.
		if alert, ok := tlsAlert(err); ok && alert == "no application protocol" {
			return nil, e.dialError(KindALPN, errNoH2)
		}
		if rec := new(tls.RecordHeaderError); errors.As(err, rec) {
			return nil, e.dialError(KindTLS, errors.New("the upstream does not speak TLS on this port (use h2c:// for plaintext)"))
		}
		return nil, e.dialError(KindTLS, err)
	}
	if p := tc.ConnectionState().NegotiatedProtocol; p != alpn {
		tc.Close()
		return nil, e.dialError(KindALPN, errNoH2)
	}
	return tc, nil
}

var errNoH2 = errors.New("the upstream's TLS did not agree on HTTP/2 (ALPN h2); gRPC needs it: enable h2 there, or use h2c:// if the port is plaintext")

// settingsError explains a connection that ended before its first SETTINGS.
func (e *Endpoint) settingsError(herr *h2.Error) *Error {
	if herr.Kind == h2.KindNotHTTP2 {
		said := herr.Debug // quoted already, or a sentence
		if strings.HasPrefix(said, `"`) {
			said = "it answered " + said
		}
		return e.dialError(KindNotHTTP2, fmt.Errorf("the upstream does not speak HTTP/2 (%s); for TLS write https://, and gRPC needs HTTP/2 there", said))
	}
	if _, ok := tlsAlert(herr); ok {
		// In TLS 1.3 the client's handshake is over before the server has judged the client's certificate.
		return e.dialError(KindTLS, herr.Err)
	}
	hint := ""
	if e.cfg.TLS == nil {
		hint = " (does it expect TLS? then write https://)"
	}
	return e.dialError(KindDial, fmt.Errorf("the upstream closed the new connection before speaking HTTP/2%s: %s", hint, Cause(herr)))
}

func (e *Endpoint) dialError(kind Kind, err error) *Error {
	return &Error{Kind: kind, Unprocessed: true, Endpoint: e.addr.String(), Err: err}
}

// jitter returns d × [1-f, 1+f].
func jitter(d time.Duration, f float64) time.Duration {
	return time.Duration(float64(d) * (1 - f + 2*f*randFloat()))
}
