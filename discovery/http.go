package discovery

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/caddyserver/caddy/v2/modules/caddytls"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(HTTP)) }

const (
	defaultHTTPRefresh = 10 * time.Second
	defaultHTTPTimeout = 5 * time.Second
)

// HTTP asks a web server for the endpoints, again and again. The answer is a list in JSON whose entries have the fields of
// `static`, with status 200:
//
//	[{"address": "10.0.0.1:50051", "weight": 2}, {"address": "10.0.0.2:50051"}]
//
// If the server sends an ETag or Last-Modified, it is asked for what is new only, and may answer 304. Redirects are not
// followed, since the request may carry secrets. While the server cannot be reached or its answer is malformed, the last
// list stays in force.
type HTTP struct {
	// The URL, `http://` or `https://`. Placeholders are resolved when the configuration is loaded. Required.
	URL string `json:"url,omitempty"`

	// How often to ask. Each wait is shortened by up to a tenth at random. The server is also asked when a connection to
	// an endpoint was lost. Default: `10s`.
	Interval caddy.Duration `json:"refresh,omitempty"`

	// How long the whole answer may take. Default: `5s`.
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// Header fields of the request, such as `Authorization`. Placeholders in the values are resolved when the configuration
	// is loaded; `{file.*}` keeps secrets out of it. Default: none but Go's own.
	Headers http.Header `json:"headers,omitempty"`

	// TLS to the server. Default: the system's trust store.
	TLS *reverseproxy.TLSConfig `json:"tls,omitempty"`

	request *http.Request
	tls     *tls.Config
	asked   refreshes
}

// CaddyModule returns the Caddy module information.
func (*HTTP) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "http", New: func() caddy.Module { return new(HTTP) }}
}

// UnmarshalCaddyfile reads the source from the Caddyfile:
//
//	dynamic http <url> {
//	    refresh         <duration>
//	    timeout         <duration>
//	    header          <field> <value>
//	    tls_server_name <name>
//	    tls_trust_pool  <module> { ... }
//	    tls_client_auth <automate_name> | <cert_file> <key_file>
//	    tls_curves      <curves...>
//	    tls_renegotiation never|once|freely
//	    tls_insecure_skip_verify
//	}
func (h *HTTP) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	w := words{d}
	d.Next() // The source's name.
	if err := w.text(&h.URL); err != nil {
		return err
	}
	for d.NextBlock(0) {
		var err error
		switch d.Val() {
		case "refresh":
			err = w.duration(&h.Interval)
		case "timeout":
			err = w.duration(&h.Timeout)
		case "header":
			args := d.RemainingArgs()
			if len(args) != 2 {
				return d.ArgErr()
			}
			if h.Headers == nil {
				h.Headers = make(http.Header)
			}
			h.Headers.Add(args[0], args[1])
		default:
			if !strings.HasPrefix(d.Val(), "tls_") {
				return d.Errf("unrecognized subdirective %q; expected refresh, timeout, header, or a word of TLS", d.Val())
			}
			if h.TLS == nil {
				h.TLS = new(reverseproxy.TLSConfig)
			}
			err = w.tls(h.TLS)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// tls reads a word about TLS; they are those of the handler's transport.
func (w words) tls(t *reverseproxy.TLSConfig) error {
	switch word := w.Val(); word {
	case "tls_server_name":
		return w.text(&t.ServerName)
	case "tls_insecure_skip_verify":
		return w.flag(&t.InsecureSkipVerify)
	case "tls_renegotiation":
		return w.text(&t.Renegotiation)
	case "tls_curves":
		args := w.RemainingArgs()
		if len(args) == 0 {
			return w.ArgErr()
		}
		t.Curves = append(t.Curves, args...)
		return nil
	case "tls_client_auth":
		args := w.RemainingArgs()
		switch {
		case t.ClientCertificateAutomate != "" || t.ClientCertificateFile != "":
			return w.Errf("tls_client_auth is given twice")
		case len(args) == 1:
			t.ClientCertificateAutomate = args[0]
		case len(args) == 2:
			t.ClientCertificateFile, t.ClientCertificateKeyFile = args[0], args[1]
		default:
			return w.ArgErr()
		}
		return nil
	case "tls_trust_pool":
		if !w.NextArg() {
			return w.ArgErr()
		}
		if t.CARaw != nil {
			return w.Errf("tls_trust_pool is given twice")
		}
		name := w.Val()
		id := "tls.ca_pool.source." + name
		m, err := caddyfile.UnmarshalModule(w.Dispenser, id)
		if err != nil {
			return err
		}
		ca, ok := m.(caddytls.CA)
		if !ok {
			return w.Errf("module %s is not a source of CA certificates", id)
		}
		t.CARaw = caddyconfig.JSONModuleObject(ca, "provider", name, nil)
		return nil
	default:
		return w.Errf("unrecognized subdirective %q; expected tls_server_name, tls_trust_pool, tls_client_auth, tls_curves, tls_renegotiation or tls_insecure_skip_verify", word)
	}
}

// Provision implements caddy.Provisioner.
func (h *HTTP) Provision(ctx caddy.Context) (err error) {
	h.asked = newRefreshes()
	if h.Interval == 0 {
		h.Interval = caddy.Duration(defaultHTTPRefresh)
	}
	if h.Timeout == 0 {
		h.Timeout = caddy.Duration(defaultHTTPTimeout)
	}
	if err := checkRefresh(h.Interval); err != nil {
		return err
	}
	if h.Timeout < 0 {
		return fmt.Errorf("timeout is %v; it must be positive", time.Duration(h.Timeout))
	}
	if h.request, err = h.makeRequest(); err != nil {
		return err
	}
	if h.TLS == nil {
		return nil
	}
	if h.request.URL.Scheme != "https" {
		return fmt.Errorf("tls is configured, but url %q is plaintext; write https://", h.URL)
	}
	if h.tls, err = h.TLS.MakeTLSClientConfig(ctx); err != nil {
		return fmt.Errorf("tls: %w", err)
	}
	return nil
}

func (h *HTTP) makeRequest() (*http.Request, error) {
	if h.URL == "" {
		return nil, errors.New("url is missing; write the URL of the list of endpoints, such as https://example.com/endpoints.json")
	}
	raw, err := upstream.Resolve(h.URL)
	if err != nil {
		return nil, fmt.Errorf("url %w", err)
	}
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.ContainsAny(u.Host, "{}") {
		return nil, fmt.Errorf("url %q is none that can be asked; write http://host/path or https://host/path", h.URL)
	}
	repl := caddy.NewReplacer()
	request := &http.Request{Method: http.MethodGet, URL: u, Host: u.Host, Header: make(http.Header)}
	request.Header.Set("Accept", "application/json")
	for name, values := range h.Headers {
		if name == "" || strings.ContainsAny(name, " \t\r\n:{}") {
			return nil, fmt.Errorf("headers: %q is not the name of a header field", name)
		}
		list := make([]string, len(values))
		for i, v := range values {
			list[i] = strings.TrimSpace(repl.ReplaceKnown(v, "")) // A file's last line ends with a line feed.
			if strings.ContainsAny(list[i], "\r\n\x00") {
				return nil, fmt.Errorf("headers: the value of %s has a line break", name)
			}
		}
		request.Header[http.CanonicalHeaderKey(name)] = list
	}
	if host := request.Header.Get("Host"); host != "" {
		request.Host = host
		request.Header.Del("Host")
	}
	return request, nil
}

// Watch implements [Source].
func (h *HTTP) Watch(ctx context.Context, sink Sink) {
	a := h.answers()
	defer a.client.CloseIdleConnections()
	poll(ctx, sink, h.asked, a.look)
}

// answers makes the client.
func (h *HTTP) answers() *httpAnswers {
	transport := http.DefaultTransport.(*http.Transport).Clone() //nolint:forcetypeassert // the standard library's
	if h.tls != nil {
		transport.TLSClientConfig = h.tls
	}
	return &httpAnswers{refresh: time.Duration(h.Interval), request: h.request, client: &http.Client{
		Transport: transport, Timeout: time.Duration(h.Timeout),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Refresh implements [Refresher].
func (h *HTTP) Refresh() { h.asked.ask() }

// httpAnswers remembers the last answer, and by what to ask whether there is a newer one.
type httpAnswers struct {
	client       *http.Client
	request      *http.Request
	refresh      time.Duration
	list         []upstream.Endpoint
	etag         string
	lastModified string
}

func (a *httpAnswers) look(ctx context.Context, r *reporter) (time.Duration, error) {
	request := a.request.Clone(ctx)
	if a.etag != "" {
		request.Header.Set("If-None-Match", a.etag)
	}
	if a.lastModified != "" {
		request.Header.Set("If-Modified-Since", a.lastModified)
	}
	response, err := a.client.Do(request)
	if err != nil {
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err // The error around it has the whole URL.
		}
		return 0, fmt.Errorf("asking %s: %w", a.origin(), err)
	}
	defer response.Body.Close()
	where := a.origin()
	switch {
	case response.StatusCode == http.StatusNotModified && (a.etag != "" || a.lastModified != ""):
		r.update(a.list)
		return a.refresh, nil
	case response.StatusCode != http.StatusOK:
		return 0, fmt.Errorf("%s answered with status %s; want 200", where, response.Status)
	}
	raw, err := io.ReadAll(io.LimitReader(response.Body, maxListSize+1))
	if err != nil {
		return 0, fmt.Errorf("reading the answer of %s: %w", where, err)
	}
	if len(raw) > maxListSize {
		return 0, fmt.Errorf("the answer of %s is larger than %d MiB", where, maxListSize>>20)
	}
	list, err := parseList(raw, where, false)
	if err != nil {
		return 0, fmt.Errorf("the answer of %s: %w", where, err)
	}
	// Only what was understood is worth asking for changes of.
	a.list, a.etag, a.lastModified = list, response.Header.Get("ETag"), response.Header.Get("Last-Modified")
	r.update(list)
	return a.refresh, nil
}

// origin is the URL without what may be secret.
func (a *httpAnswers) origin() string {
	u := *a.request.URL
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return u.String()
}

var (
	_ Refresher             = (*HTTP)(nil)
	_ caddy.Provisioner     = (*HTTP)(nil)
	_ caddyfile.Unmarshaler = (*HTTP)(nil)
)
