package healthcheck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

func init() { caddy.RegisterModule(new(HTTP)) }

// HTTP asks an upstream by an HTTP request, for servers whose health endpoint is HTTP, often on a port of its own
// (`port`). TLS is used where the RPCs use it, with the same settings.
type HTTP struct {
	// The path, with a query if need be. Default: `/`.
	URI string `json:"uri,omitempty"`

	// The method. Default: `GET`, or `POST` with a body.
	Method string `json:"method,omitempty"`

	// The request's body. Default: none.
	Body string `json:"body,omitempty"`

	// The request's header fields. `Host` is allowed. Global placeholders are resolved when the configuration is loaded.
	Headers http.Header `json:"headers,omitempty"`

	// The status that is good: a number, or a class such as 2 for all of 200 to 299. Default: `2`.
	ExpectStatus int `json:"expect_status,omitempty"`

	// A regular expression that must match in the first 64 KiB of the response's body. Default: none.
	ExpectBody string `json:"expect_body,omitempty"`

	// Follow up to 10 redirects, to wherever they lead. Otherwise a redirect is judged by its status. Default: false.
	FollowRedirects bool `json:"follow_redirects,omitempty"`

	// The HTTP version: `1.1`, or `2` (with prior knowledge where there is no TLS). Default: `2` on the port of the
	// RPCs, which speaks nothing else, and `1.1` on another.
	Version string `json:"version,omitempty"`

	expect *regexp.Regexp
	header http.Header
}

// CaddyModule returns the Caddy module information.
func (*HTTP) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "http", New: func() caddy.Module { return new(HTTP) }}
}

// UnmarshalCaddyfile reads the check from the Caddyfile:
//
//	health_check http
//
// Its options are words of grpc_proxy's own block: health_uri, health_method and so on.
func (*HTTP) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return parseAlone(d) }

// maxBody is how much of a response is read.
const maxBody = 64 << 10

// Provision checks the settings and fills in the defaults.
func (h *HTTP) Provision(caddy.Context) error {
	if h.URI == "" {
		h.URI = "/"
	}
	if u, err := url.ParseRequestURI(h.URI); err != nil || !strings.HasPrefix(h.URI, "/") || u.Host != "" {
		return fmt.Errorf("health check http: uri %q is not a path; write it as /healthz, and use port for another port", h.URI)
	}
	if h.Method == "" {
		h.Method = http.MethodGet
		if h.Body != "" {
			h.Method = http.MethodPost
		}
	}
	h.Method = strings.ToUpper(h.Method)
	if strings.Trim(h.Method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-") != "" {
		return fmt.Errorf("health check http: method %q is none", h.Method)
	}
	defaultTo(&h.ExpectStatus, 2)
	if s := h.ExpectStatus; (s < 1 || s > 5) && (s < 100 || s > 599) {
		return fmt.Errorf("health check http: expect_status is %d; write a status such as 200, or its first digit for all of a class", s)
	}
	switch h.Version {
	case "", "1.1", "2":
	default:
		return fmt.Errorf("health check http: version %q is none of 1.1, 2", h.Version)
	}
	if h.ExpectBody != "" {
		var err error
		if h.expect, err = regexp.Compile(h.ExpectBody); err != nil {
			return fmt.Errorf("health check http: expect_body: %w", err)
		}
	}
	repl := caddy.NewReplacer()
	h.header = make(http.Header)
	for name, values := range h.Headers {
		for _, v := range values {
			h.header.Add(repl.ReplaceKnown(name, ""), repl.ReplaceKnown(v, ""))
		}
	}
	return nil
}

// Probe implements [Prober].
func (h *HTTP) Probe(ctx context.Context, t *Target) Verdict {
	req, err := http.NewRequestWithContext(ctx, h.Method, t.Scheme()+"://"+t.HostPort()+h.URI, bytes.NewReader([]byte(h.Body)))
	if err != nil {
		return Verdict{NoAnswer, err.Error()}
	}
	req.Header = h.header.Clone()
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
		req.Header.Del("Host")
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", DefaultUserAgent)
	}
	rt := h.transport(t)
	defer rt.CloseIdleConnections()
	client := &http.Client{Transport: rt, CheckRedirect: func(_ *http.Request, via []*http.Request) error {
		if !h.FollowRedirects {
			return http.ErrUseLastResponse
		}
		if len(via) >= 10 {
			return errors.New("10 redirects")
		}
		return nil
	}}
	resp, err := client.Do(req)
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err
		}
		if _, ok := errors.AsType[connectError](err); !ok {
			err = errors.New(transport.Cause(err))
		}
		return noAnswer(ctx, t, err)
	}
	defer resp.Body.Close()
	if s := h.ExpectStatus; resp.StatusCode != s && resp.StatusCode/100 != s {
		return Verdict{NotServing, "the health check was answered with HTTP status " + strconv.Itoa(resp.StatusCode)}
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return noAnswer(ctx, t, fmt.Errorf("reading the answer to the health check: %w", err))
	}
	if h.expect != nil && !h.expect.Match(body) {
		return Verdict{NotServing, "the answer to the health check does not match " + strconv.Quote(h.ExpectBody)}
	}
	return Verdict{Answer: Serving}
}

// transport makes the way to the target, for one probe: a connection that is made anew proves more than one that is kept.
func (h *HTTP) transport(t *Target) *http.Transport {
	target := t.HostPort()
	if _, _, err := net.SplitHostPort(target); err != nil {
		target = net.JoinHostPort(target, map[string]string{"http": "80", "https": "443"}[t.Scheme()])
	}
	rt := &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if addr == target {
				return dial(ctx, t)
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		},
		DisableCompression: true,
		Protocols:          new(http.Protocols),
	}
	two := h.Version == "2" || h.Version == "" && t.conns != nil && t.conns.calls != nil
	switch {
	case !two:
		rt.Protocols.SetHTTP1(true)
		rt.DisableKeepAlives = true
	case t.Transport.TLS != nil:
		rt.Protocols.SetHTTP2(true)
	default:
		rt.Protocols.SetUnencryptedHTTP2(true)
	}
	if c := t.Transport.NowTLS(); c != nil {
		rt.TLSClientConfig = c.Clone()
		rt.TLSClientConfig.NextProtos = nil
		if rt.TLSClientConfig.ServerName == "" {
			rt.TLSClientConfig.ServerName = t.Host()
		}
	}
	return rt
}

var (
	_ Prober                = (*HTTP)(nil)
	_ caddy.Provisioner     = (*HTTP)(nil)
	_ caddyfile.Unmarshaler = (*HTTP)(nil)
)
