package discovery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(ReverseProxy)) }

const (
	// upstreamsNamespace is where reverse_proxy's sources are.
	upstreamsNamespace = "http.reverse_proxy.upstreams."
	// upstreamsRefresh is how often such a source is asked. reverse_proxy asks it for every request, so it must be cheap.
	upstreamsRefresh = time.Second
	// upstreamsTimeout bounds how long it may take.
	upstreamsTimeout = 30 * time.Second
)

// ReverseProxy finds endpoints by any source of dynamic upstreams that `reverse_proxy` can use, such as those of Caddy
// plugins (modules `http.reverse_proxy.upstreams.*`).
//
// The source is asked every second, and not for a request: placeholders of requests are empty to it. It gives addresses
// alone, so all endpoints have the same weight, priority and locality. Where there is a source of our own, as for DNS, it
// does more.
type ReverseProxy struct {
	// The source of `reverse_proxy`. Required.
	UpstreamsRaw json.RawMessage `json:"upstreams,omitempty" caddy:"namespace=http.reverse_proxy.upstreams inline_key=source"`

	source reverseproxy.UpstreamSource
	origin string
	asked  refreshes
	lost   atomic.Bool // Whether a connection was lost since the source was asked.
}

// CaddyModule returns the Caddy module information.
func (*ReverseProxy) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "reverse_proxy", New: func() caddy.Module { return new(ReverseProxy) }}
}

// UnmarshalCaddyfile reads the source from the Caddyfile:
//
//	dynamic reverse_proxy <source> [<options...>]
func (p *ReverseProxy) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // The source's name.
	if !d.NextArg() {
		return d.ArgErr()
	}
	name := d.Val()
	mod, err := caddyfile.UnmarshalModule(d, upstreamsNamespace+name)
	if err != nil {
		return err
	}
	source, ok := mod.(reverseproxy.UpstreamSource)
	if !ok {
		return d.Errf("module %s%s is not a source of upstreams", upstreamsNamespace, name)
	}
	p.UpstreamsRaw = caddyconfig.JSONModuleObject(source, "source", name, nil)
	return nil
}

// Provision implements caddy.Provisioner.
func (p *ReverseProxy) Provision(ctx caddy.Context) error {
	p.asked = newRefreshes()
	if p.UpstreamsRaw == nil {
		return errors.New("upstreams is missing; name one of reverse_proxy's sources")
	}
	mod, err := ctx.LoadModule(p, "UpstreamsRaw")
	if err != nil {
		return fmt.Errorf("loading the source of reverse_proxy: %w", err)
	}
	source, ok := mod.(reverseproxy.UpstreamSource)
	if !ok {
		return fmt.Errorf("module %T is not a source of upstreams", mod)
	}
	p.source = source
	p.origin = "reverse_proxy/" + mod.(caddy.Module).CaddyModule().ID.Name() //nolint:forcetypeassert // it was loaded as one
	return nil
}

// Watch implements [Source].
func (p *ReverseProxy) Watch(ctx context.Context, sink Sink) {
	poll(ctx, sink, p.asked, func(ctx context.Context, r *reporter) (time.Duration, error) {
		ctx, cancel := context.WithTimeout(ctx, upstreamsTimeout)
		defer cancel()
		list, err := p.ask(request(ctx), p.lost.Swap(false))
		if err != nil {
			return 0, err
		}
		r.update(list)
		return upstreamsRefresh, nil
	})
}

// Refresh implements [Refresher]. reverse_proxy, too, lets a source forget what it knows when a request failed.
func (p *ReverseProxy) Refresh() {
	p.lost.Store(true)
	p.asked.ask()
}

// request is what the source is asked with in place of a client's request.
func request(ctx context.Context) *http.Request {
	r := &http.Request{
		Method: http.MethodPost, URL: new(url.URL), Proto: "HTTP/2.0", ProtoMajor: 2, Header: make(http.Header), Body: http.NoBody,
	}
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer())
	ctx = context.WithValue(ctx, caddyhttp.VarsCtxKey, make(map[string]any))
	ctx = context.WithValue(ctx, caddyhttp.OriginalRequestCtxKey, *r)
	return r.WithContext(ctx)
}

// ask asks the source. A panic in it is an error of its.
func (p *ReverseProxy) ask(r *http.Request, forget bool) (list []upstream.Endpoint, err error) {
	defer func() {
		if v := recover(); v != nil {
			list, err = nil, fmt.Errorf("%s: panic: %v", p.origin, v)
		}
	}()
	if c, ok := p.source.(reverseproxy.CachingUpstreamSource); ok && forget {
		if err := c.ResetCache(r); err != nil {
			return nil, fmt.Errorf("%s: %w", p.origin, err)
		}
	}
	upstreams, err := p.source.GetUpstreams(r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.origin, err)
	}
	if len(upstreams) > maxEndpoints {
		return nil, fmt.Errorf("%s has %d upstreams; at most %d are allowed", p.origin, len(upstreams), maxEndpoints)
	}
	for _, u := range upstreams {
		addrs, scheme, err := upstream.Parse(u.Dial)
		if err == nil && (len(addrs) != 1 || scheme != upstream.SchemeNone) {
			err = fmt.Errorf("upstream address %q is not that of one socket", u.Dial)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.origin, err) // A list with a hole would move its calls to the others.
		}
		list = append(list, upstream.Endpoint{Network: addrs[0].Network, Address: addrs[0].Dial, Origin: p.origin})
	}
	return list, nil
}

var (
	_ Refresher             = (*ReverseProxy)(nil)
	_ caddy.Provisioner     = (*ReverseProxy)(nil)
	_ caddyfile.Unmarshaler = (*ReverseProxy)(nil)
)
