package discovery

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const (
	// defaultDNSRefresh is how long an answer is believed at most. Some servers give TTLs that have nothing to do with how
	// long an answer holds: Docker's gives 10 minutes for containers that come and go.
	defaultDNSRefresh = 30 * time.Second
	// minTTL is how long an answer is believed at least; Consul's TTLs, for one, are 0.
	minTTL = time.Second
)

// DNS is how names are looked up.
type DNS struct {
	// How long an answer is believed at most. A shorter TTL of the records counts, but no less than a second. Each wait
	// is shortened by up to a tenth at random. Default: `30s`.
	Refresh caddy.Duration `json:"refresh,omitempty"`

	// The DNS servers to ask. Default: the system's, from /etc/resolv.conf.
	Resolver *Resolver `json:"resolver,omitempty"`

	// How long one DNS server may take for an answer before the next is asked. Default: the `timeout` option of
	// /etc/resolv.conf, else `5s`.
	DialTimeout caddy.Duration `json:"dial_timeout,omitempty"`

	// How long the first address family of a DNS server's host name is tried before the other joins in (RFC 8305). A
	// negative value turns that off. Default: `300ms`.
	FallbackDelay caddy.Duration `json:"dial_fallback_delay,omitempty"`

	// The kinds of addresses to look for. Default: both.
	Versions *IPVersions `json:"versions,omitempty"`

	resolver *resolver
}

// Resolver names DNS servers.
type Resolver struct {
	// `host:port` of each; the port defaults to 53. They are asked by UDP, and by TCP where an answer is too large for
	// that; `tcp/host:port` is asked by TCP alone. Each look-up begins with one at random, and goes on to the others
	// while they do not answer. Placeholders are resolved when the configuration is loaded.
	Addresses []string `json:"addresses,omitempty"`
}

// IPVersions are kinds of addresses. If none is set, both are meant.
type IPVersions struct {
	// IPv4 addresses, from A records. Default: `true` unless `ipv6` is set.
	IPv4 *bool `json:"ipv4,omitempty"`

	// IPv6 addresses, from AAAA records. Default: `true` unless `ipv4` is set.
	IPv6 *bool `json:"ipv6,omitempty"`
}

func (v *IPVersions) families() families {
	if v == nil || v.IPv4 == nil && v.IPv6 == nil {
		return families{v4: true, v6: true}
	}
	return families{v4: v.IPv4 != nil && *v.IPv4, v6: v.IPv6 != nil && *v.IPv6}
}

// provision checks the settings.
func (d *DNS) provision() error {
	if d.Refresh == 0 {
		d.Refresh = caddy.Duration(defaultDNSRefresh)
	}
	if err := checkRefresh(d.Refresh); err != nil {
		return err
	}
	if d.DialTimeout < 0 {
		return fmt.Errorf("dial_timeout is %v; it must be positive", time.Duration(d.DialTimeout))
	}
	if d.Versions.families() == (families{}) {
		return errors.New("versions excludes both ipv4 and ipv6; leave it out for both")
	}
	r := &resolver{timeout: time.Duration(d.DialTimeout), conf: resolvConf, hosts: hostsFile()}
	r.client.dialer = net.Dialer{FallbackDelay: time.Duration(d.FallbackDelay)}
	d.resolver = r
	if d.Resolver == nil {
		return nil
	}
	if len(d.Resolver.Addresses) == 0 {
		return errors.New("resolver.addresses is empty; list the DNS servers, such as 10.0.0.2:53, or leave resolver out")
	}
	for _, addr := range d.Resolver.Addresses {
		resolved, err := upstream.Resolve(addr)
		if err != nil {
			return fmt.Errorf("resolver address %w", err)
		}
		na, err := caddy.ParseNetworkAddressWithDefaults(resolved, "udp", 53)
		network := strings.TrimRight(na.Network, "46")
		if err != nil || na.PortRangeSize() != 1 || na.Host == "" || strings.ContainsAny(na.Host, "{}") || network != "udp" && network != "tcp" {
			return fmt.Errorf("resolver address %q is not that of a DNS server; write host:port or tcp/host:port", addr)
		}
		r.own = append(r.own, dnsServer{network, na.JoinHostPort(0)})
	}
	return nil
}

// wait is how long to wait after an answer that holds for so long.
func (d *DNS) wait(ttl time.Duration) time.Duration {
	return min(max(ttl, minTTL), time.Duration(d.Refresh))
}

// waitAfter is how long to wait after an error; 0 leaves it to the number of failures.
func (d *DNS) waitAfter(err error) time.Duration {
	if none, ok := errors.AsType[*noRecordsError](err); ok && none.ttl > 0 {
		return d.wait(none.ttl)
	}
	return 0
}

// dnsWord reads a word of the block of a source that asks DNS. known is false if it is none.
func (w words) dnsWord(d *DNS) (known bool, err error) {
	switch w.Val() {
	case "refresh":
		return true, w.duration(&d.Refresh)
	case "resolvers":
		args := w.RemainingArgs()
		if len(args) == 0 {
			return true, w.ArgErr()
		}
		if d.Resolver == nil {
			d.Resolver = new(Resolver)
		}
		d.Resolver.Addresses = append(d.Resolver.Addresses, args...)
		return true, nil
	case "dial_timeout":
		return true, w.duration(&d.DialTimeout)
	case "dial_fallback_delay":
		return true, w.durationOrOff(&d.FallbackDelay)
	case "versions":
		args := w.RemainingArgs()
		if len(args) == 0 {
			return true, w.ArgErr()
		}
		if d.Versions == nil {
			d.Versions = new(IPVersions)
		}
		yes := true
		for _, arg := range args {
			switch arg {
			case "ipv4":
				d.Versions.IPv4 = &yes
			case "ipv6":
				d.Versions.IPv6 = &yes
			default:
				return true, w.Errf("versions: %q is neither ipv4 nor ipv6", arg)
			}
		}
		return true, nil
	}
	return false, nil
}

// dnsName resolves placeholders in a name and checks it.
func dnsName(field, name string) (string, error) {
	name, err := upstream.Resolve(name)
	switch {
	case err != nil:
		return "", fmt.Errorf("%s %w", field, err)
	case name == "":
		return "", fmt.Errorf("%s is missing; write the name to look up, such as backend.example.com", field)
	case strings.ContainsAny(name, "{}"):
		return "", fmt.Errorf("%s %q contains a placeholder that is not known when the configuration is loaded; use {env.*}, {file.*} or {$VAR}", field, name)
	case strings.ContainsAny(name, "/ \t\r\n"):
		return "", fmt.Errorf("%s %q is not a name; write one such as backend.example.com, without scheme", field, name)
	}
	return name, nil
}
