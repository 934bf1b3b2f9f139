package discovery

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(A)) }

// A finds endpoints by a DNS name: each of its addresses, from A and AAAA records, is one. The name is looked up again
// when the records' TTL is over, and at once when a connection to an endpoint was lost.
//
// The hosts file comes first, then DNS, with the search domains and options of /etc/resolv.conf. TLS verifies the
// endpoints by the name. In Kubernetes, name a headless service (`clusterIP: None`), whose name has the addresses of the
// pods; another service's has a single virtual address, over which calls cannot be balanced.
type A struct {
	// The name to look up. Placeholders are resolved when the configuration is loaded. Required.
	Name string `json:"name,omitempty"`

	// The endpoints' port. Placeholders are resolved when the configuration is loaded. Required.
	Port string `json:"port,omitempty"`

	DNS

	name, port string
	asked      refreshes
	logger     *zap.Logger
}

// CaddyModule returns the Caddy module information.
func (*A) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "a", New: func() caddy.Module { return new(A) }}
}

// UnmarshalCaddyfile reads the source from the Caddyfile, in the words of reverse_proxy:
//
//	dynamic a [<name> <port>] {
//	    name                <name>
//	    port                <port>
//	    refresh             <duration>
//	    resolvers           <addresses...>
//	    dial_timeout        <duration>
//	    dial_fallback_delay <duration>|off
//	    versions            ipv4|ipv6...
//	}
func (a *A) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	w := words{d}
	d.Next() // The source's name.
	args := d.RemainingArgs()
	if len(args) > 2 {
		return d.ArgErr()
	}
	args = append(args, "", "")
	a.Name, a.Port = args[0], args[1]
	for d.NextBlock(0) {
		switch d.Val() {
		case "name":
			if err := w.text(&a.Name); err != nil {
				return err
			}
		case "port":
			if err := w.text(&a.Port); err != nil {
				return err
			}
		default:
			known, err := w.dnsWord(&a.DNS)
			if err != nil {
				return err
			}
			if !known {
				return d.Errf("unrecognized subdirective %q; expected name, port, refresh, resolvers, dial_timeout, dial_fallback_delay or versions", d.Val())
			}
		}
	}
	return nil
}

// Provision implements caddy.Provisioner.
func (a *A) Provision(ctx caddy.Context) (err error) {
	a.logger = ctx.Logger()
	a.asked = newRefreshes()
	if a.name, err = dnsName("name", strings.Trim(a.Name, "[]")); err != nil {
		return err
	}
	if a.port, err = upstream.Resolve(a.Port); err != nil {
		return fmt.Errorf("port %w", err)
	}
	switch n, err := strconv.ParseUint(a.port, 10, 16); {
	case a.port == "":
		return fmt.Errorf("port is missing; write the endpoints' port behind the name: %s 50051, say", a.name)
	case err != nil || n == 0:
		return fmt.Errorf("port %q is not a number from 1 to 65535", a.port)
	}
	return a.provision()
}

// Watch implements [Source].
func (a *A) Watch(ctx context.Context, sink Sink) {
	if ip, err := netip.ParseAddr(a.name); err == nil {
		sink.Update([]upstream.Endpoint{a.endpoint(ip, "")})
		<-ctx.Done()
		return
	}
	var (
		k    known
		lone loneAddress
	)
	poll(ctx, sink, a.asked, func(ctx context.Context, r *reporter) (time.Duration, error) {
		addrs, ttl, err := a.resolver.addresses(ctx, a.name, a.Versions.families(), &k)
		if err == nil && len(addrs) > maxEndpoints {
			err = fmt.Errorf("the name %s has %d addresses; at most %d are allowed", a.name, len(addrs), maxEndpoints)
		}
		if err != nil {
			return a.waitAfter(err), err
		}
		list := make([]upstream.Endpoint, len(addrs))
		for i, addr := range addrs {
			list[i] = a.endpoint(addr, strings.TrimSuffix(a.name, "."))
		}
		r.update(list)
		if lone.suspicious(addrs, time.Now()) {
			a.logger.Warn("this name always has the same single address; if that is a virtual one, such as that of a Kubernetes service, "+
				"calls cannot be balanced over the endpoints behind it: name a headless service (clusterIP: None), or the endpoints themselves",
				zap.String("name", a.name), zap.Stringers("addresses", addrs))
		}
		return a.wait(ttl), nil
	})
}

// Refresh implements [Refresher].
func (a *A) Refresh() { a.asked.ask() }

func (a *A) endpoint(addr netip.Addr, name string) upstream.Endpoint {
	return upstream.Endpoint{
		Network: "tcp", Address: net.JoinHostPort(addr.String(), a.port), Name: name,
		Origin: "dns:///" + net.JoinHostPort(a.name, a.port),
	}
}

// loneAddress notices a name that has one address, or one of each family, and keeps it.
type loneAddress struct {
	last  string
	since time.Time
	told  bool
}

// loneFor is how long that must be so before it is told. An endpoint that was scaled down to one for a moment, or has
// only just been started, is nothing to warn about.
const loneFor = 2 * time.Minute

// suspicious tells, once, that it has been so for long.
func (l *loneAddress) suspicious(addrs []netip.Addr, now time.Time) bool {
	text := fmt.Sprint(addrs)
	one := len(addrs) == 1 || len(addrs) == 2 && addrs[0].Is4() && addrs[1].Is6()
	if !one || addrs[0].IsLoopback() {
		text = ""
	}
	if text != l.last {
		l.last, l.since = text, now
	}
	if text == "" || l.told || now.Sub(l.since) < loneFor {
		return false
	}
	l.told = true
	return true
}

var (
	_ Refresher             = (*A)(nil)
	_ caddy.Provisioner     = (*A)(nil)
	_ caddyfile.Unmarshaler = (*A)(nil)
)
