package discovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/miekg/dns"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(SRV)) }

// SRV finds endpoints by a DNS name's SRV records (RFC 2782), which have the port, the priority and the weight of each
// target. Each address of a target is an endpoint with the target's weight, 0 counting as 1. A target with a higher
// priority number is used only when those with lower ones cannot carry the load. TLS verifies an endpoint by its target's
// name.
//
// The records are looked up again when their TTL or that of a target's address is over, and at once when a connection to
// an endpoint was lost.
type SRV struct {
	// The service label: `grpc` for `_grpc._tcp.<name>`.
	Service string `json:"service,omitempty"`

	// The protocol label: `tcp` for `_grpc._tcp.<name>`.
	Proto string `json:"proto,omitempty"`

	// The domain that has the service or, without `service` and `proto`, the whole name to look up. Placeholders in these
	// three are resolved when the configuration is loaded. Required.
	Name string `json:"name,omitempty"`

	DNS

	name   string
	asked  refreshes
	logger *zap.Logger
}

// CaddyModule returns the Caddy module information.
func (*SRV) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "srv", New: func() caddy.Module { return new(SRV) }}
}

// UnmarshalCaddyfile reads the source from the Caddyfile, in the words of reverse_proxy:
//
//	dynamic srv [<full_name>] {
//	    service             <label>
//	    proto               <label>
//	    name                <name>
//	    refresh             <duration>
//	    resolvers           <addresses...>
//	    dial_timeout        <duration>
//	    dial_fallback_delay <duration>|off
//	    versions            ipv4|ipv6...
//	    grace_period        <duration> # has no effect
//	}
func (s *SRV) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	w := words{d}
	d.Next() // The source's name.
	args := d.RemainingArgs()
	if len(args) > 1 {
		return d.ArgErr()
	}
	if len(args) == 1 {
		s.Name = args[0]
	}
	for d.NextBlock(0) {
		var err error
		switch d.Val() {
		case "service":
			err = w.text(&s.Service)
		case "proto":
			err = w.text(&s.Proto)
		case "name":
			err = w.text(&s.Name)
		case "grace_period":
			var ignored caddy.Duration
			if err = w.duration(&ignored); err == nil {
				caddy.Log().Named("caddyfile").Warn(fmt.Sprintf(
					"%s:%d: grace_period has no effect in grpc_proxy: the last endpoints are kept for as long as the look-ups fail", d.File(), d.Line()))
			}
		default:
			var known bool
			if known, err = w.dnsWord(&s.DNS); err == nil && !known {
				err = d.Errf("unrecognized subdirective %q; expected service, proto, name, refresh, resolvers, dial_timeout, dial_fallback_delay, versions or grace_period", d.Val())
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Provision implements caddy.Provisioner.
func (s *SRV) Provision(ctx caddy.Context) (err error) {
	s.logger = ctx.Logger()
	s.asked = newRefreshes()
	if s.name, err = dnsName("name", s.Name); err != nil {
		return err
	}
	if (s.Service == "") != (s.Proto == "") {
		return errors.New("service and proto go together: _service._proto.name; write both, or the whole name alone")
	}
	if s.Service != "" {
		service, err := dnsName("service", s.Service)
		if err != nil {
			return err
		}
		proto, err := dnsName("proto", s.Proto)
		if err != nil {
			return err
		}
		s.name = "_" + strings.TrimPrefix(service, "_") + "._" + strings.TrimPrefix(proto, "_") + "." + s.name
	}
	return s.provision()
}

// Watch implements [Source].
func (s *SRV) Watch(ctx context.Context, sink Sink) {
	var (
		k       known
		targets = make(map[string]*known)
		told    string
	)
	poll(ctx, sink, s.asked, func(ctx context.Context, r *reporter) (time.Duration, error) {
		list, missing, ttl, err := s.look(ctx, &k, targets)
		if err != nil {
			return s.waitAfter(err), err
		}
		r.update(list)
		if text := fmt.Sprint(missing); text != told && len(missing) > 0 {
			s.logger.Warn("some targets of the SRV records cannot be found", zap.String("name", s.name), zap.Int("targets", len(missing)), zap.Error(missing[0]))
			told = text
		}
		return s.wait(ttl), nil
	})
}

// Refresh implements [Refresher].
func (s *SRV) Refresh() { s.asked.ask() }

// maxTargets bounds how many targets are looked up at a time.
const maxTargets = 16

// targetAddrs is what a look found out about a target.
type targetAddrs struct {
	addrs []netip.Addr
	ttl   time.Duration
	err   error
}

// look finds the endpoints. missing says why targets have none. k and targets remember the names between looks.
func (s *SRV) look(ctx context.Context, k *known, targets map[string]*known) (list []upstream.Endpoint, missing []error, ttl time.Duration, err error) {
	records, extra, ttl, err := s.resolver.services(ctx, s.name, k)
	if err != nil {
		return nil, nil, 0, err
	}
	// RFC 2782: "A Target of "." means that the service is decidedly not available at this domain."
	records = slices.DeleteFunc(records, func(r *dns.SRV) bool { return r.Target == "." || r.Port == 0 })
	if len(records) == 0 {
		return nil, nil, 0, fmt.Errorf("the SRV records of %s say that the service is not available: %w", s.name, ErrNoEndpoints)
	}
	found := s.addresses(ctx, records, extra, targets)
	for _, r := range records {
		target := found[strings.ToLower(r.Target)]
		if target.err != nil {
			missing = append(missing, target.err)
			continue
		}
		ttl = min(ttl, target.ttl)
		for _, addr := range target.addrs {
			list = append(list, upstream.Endpoint{
				Network: "tcp", Address: net.JoinHostPort(addr.String(), strconv.Itoa(int(r.Port))), Name: strings.TrimSuffix(r.Target, "."),
				Weight: uint32(max(r.Weight, 1)), Priority: uint32(r.Priority), Origin: "srv:///" + s.name,
			})
		}
	}
	switch {
	case len(list) == 0:
		return nil, nil, 0, fmt.Errorf("no target of the SRV records of %s can be found: %w", s.name, errors.Join(missing...))
	case len(list) > maxEndpoints:
		return nil, nil, 0, fmt.Errorf("the SRV records of %s lead to %d endpoints; at most %d are allowed", s.name, len(list), maxEndpoints)
	case len(missing) > 0:
		ttl = min(ttl, lastRetry)
	}
	slices.SortFunc(list, func(a, b upstream.Endpoint) int {
		if a.Priority != b.Priority {
			return int(a.Priority) - int(b.Priority)
		}
		return strings.Compare(a.Address+a.Name, b.Address+b.Name)
	})
	return list, missing, ttl, nil
}

// addresses finds the targets' addresses, in the answer or by asking, by the targets' names in lower case.
func (s *SRV) addresses(ctx context.Context, records []*dns.SRV, extra []dns.RR, targets map[string]*known) map[string]targetAddrs {
	var (
		want  = s.Versions.families()
		found = make(map[string]targetAddrs, len(records))
		mu    sync.Mutex
		wg    sync.WaitGroup
		slots = make(chan struct{}, maxTargets)
	)
	for _, r := range records {
		name := strings.ToLower(r.Target)
		mu.Lock()
		_, done := found[name]
		if !done {
			found[name] = targetAddrs{}
		}
		mu.Unlock()
		if done {
			continue
		}
		if targets[name] == nil {
			targets[name] = new(known)
		}
		k := targets[name]
		if addrs, ttl := additional(extra, name, want); len(addrs) > 0 {
			k.keep(name, addrs)
			mu.Lock()
			found[name] = targetAddrs{addrs: addrs, ttl: ttl}
			mu.Unlock()
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			var t targetAddrs
			t.addrs, t.ttl, t.err = s.resolver.addresses(ctx, name, want, k)
			if t.err != nil && !errors.Is(t.err, ErrNoEndpoints) && ctx.Err() == nil {
				// The target's last addresses are better than none, as long as there is trouble only.
				if last := k.all(); len(last) > 0 {
					t = targetAddrs{addrs: last, ttl: firstRetry}
				}
			}
			mu.Lock()
			defer mu.Unlock()
			found[name] = t
		})
	}
	wg.Wait()
	for name := range targets {
		if _, ok := found[name]; !ok {
			delete(targets, name)
		}
	}
	return found
}

// additional finds a target's addresses among what came with its SRV record. RFC 2782: "Implementors are urged, but not
// required, to return the address record(s) in the Additional Data section."
func additional(extra []dns.RR, name string, want families) ([]netip.Addr, time.Duration) {
	var addrs []netip.Addr
	ttl := maxTTL
	for _, rr := range extra {
		if h := rr.Header(); strings.EqualFold(h.Name, name) && slices.Contains(want.types(), h.Rrtype) {
			addrs = append(addrs, addrsOf([]dns.RR{rr})...)
			ttl = min(ttl, ttlOf(h.Ttl))
		}
	}
	return sorted(addrs), ttl
}

// keep remembers what was found by other means.
func (k *known) keep(name string, addrs []netip.Addr) {
	k.found = name
	k.addrs = map[uint16][]netip.Addr{
		dns.TypeA:    families{v4: true}.of(addrs),
		dns.TypeAAAA: families{v6: true}.of(addrs),
	}
}

// all returns what is remembered.
func (k *known) all() []netip.Addr {
	return sorted(slices.Concat(k.addrs[dns.TypeA], k.addrs[dns.TypeAAAA]))
}

var (
	_ Refresher             = (*SRV)(nil)
	_ caddy.Provisioner     = (*SRV)(nil)
	_ caddyfile.Unmarshaler = (*SRV)(nil)
)
