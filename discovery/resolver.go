package discovery

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// ErrNoEndpoints is in the errors of a source that knows that there are no endpoints, such as a DNS name that does not
// exist; other errors mean that it could not find out.
var ErrNoEndpoints = errors.New("no endpoints")

// Unwrap makes it an ErrNoEndpoints.
func (e *noRecordsError) Unwrap() error { return ErrNoEndpoints }

// resolver looks names up: in the system's hosts file, then in DNS. It knows how long an answer holds, which Go's own
// resolver does not tell.
type resolver struct {
	client  dnsClient
	own     []dnsServer // If there are none, those of the system.
	timeout time.Duration
	conf    string // The file resolv.conf.
	hosts   string // The hosts file.
}

// families are the kinds of addresses that are wanted.
type families struct{ v4, v6 bool }

func (f families) of(addrs []netip.Addr) []netip.Addr {
	var list []netip.Addr
	for _, a := range addrs {
		if a = a.Unmap(); a.Is4() && f.v4 || a.Is6() && f.v6 {
			list = append(list, a)
		}
	}
	return list
}

func (f families) types() []uint16 {
	var types []uint16
	if f.v4 {
		types = append(types, dns.TypeA)
	}
	if f.v6 {
		types = append(types, dns.TypeAAAA)
	}
	return types
}

// network is the name of the families in package net.
func (f families) network() string {
	switch f {
	case families{v4: true}:
		return "ip4"
	case families{v6: true}:
		return "ip6"
	}
	return "ip"
}

// known is what is remembered of a name between two looks.
type known struct {
	found string                  // Which of the candidates it was.
	addrs map[uint16][]netip.Addr // What was found, by type.
}

// options are the system's settings and our own. ok is false if DNS servers are neither configured nor found in the
// system's settings (Windows keeps them elsewhere): Go's resolver must do.
func (r *resolver) options() (o resolveOptions, first int, ok bool) {
	o, ok = readResolvConf(r.conf)
	if len(r.own) > 0 {
		o.servers, o.rotate, ok = r.own, true, true
	}
	if r.timeout > 0 {
		o.timeout = r.timeout
	}
	if ok && o.rotate {
		first = rand.IntN(len(o.servers)) //nolint:gosec // spreading load
	}
	return o, first, ok
}

// addresses returns all of a name's addresses, sorted, and how long they hold.
func (r *resolver) addresses(ctx context.Context, name string, want families, k *known) ([]netip.Addr, time.Duration, error) {
	if addrs := want.of(lookupHosts(r.hosts, name)); len(addrs) > 0 {
		return sorted(addrs), maxTTL, nil
	}
	o, first, ok := r.options()
	if !ok {
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, want.network(), name)
		return sorted(want.of(addrs)), maxTTL, goError(err, name)
	}
	var (
		addrs []netip.Addr
		ttl   time.Duration
	)
	err := search(ctx, &o, name, &k.found, func(full string) (err error) {
		addrs, ttl, err = r.allOf(ctx, &o, first, full, want, k)
		return err
	})
	return addrs, ttl, err
}

// allOf asks for all wanted types of addresses of one full name.
//
// A server that fails for one type (many do for AAAA) does not make us forget what it said of that type before.
func (r *resolver) allOf(ctx context.Context, o *resolveOptions, first int, full string, want families, k *known) ([]netip.Addr, time.Duration, error) {
	if full != k.found || k.addrs == nil {
		k.addrs = make(map[uint16][]netip.Addr)
	}
	types := want.types()
	found := make([][]netip.Addr, len(types))
	ttls := make([]time.Duration, len(types))
	errs := make([]error, len(types))
	var wg sync.WaitGroup
	for i, t := range types {
		wg.Go(func() {
			var list []dns.RR
			list, _, ttls[i], errs[i] = r.client.records(ctx, o, first, full, t)
			found[i] = addrsOf(list)
		})
	}
	wg.Wait()

	var (
		addrs       []netip.Addr
		ttl         = maxTTL
		none        *noRecordsError
		trouble     error
		anyAnswered bool
	)
	for i, t := range types {
		switch nothing, isNothing := errors.AsType[*noRecordsError](errs[i]); {
		case errs[i] == nil:
			k.addrs[t] = found[i]
			ttl = min(ttl, ttls[i])
			anyAnswered = true
		case isNothing:
			delete(k.addrs, t)
			none = none.or(nothing)
		default:
			trouble = errs[i]
		}
		addrs = append(addrs, k.addrs[t]...)
	}
	switch {
	case anyAnswered:
		return sorted(addrs), ttl, nil
	case trouble != nil:
		return nil, 0, trouble
	}
	return nil, 0, none
}

// services returns a name's SRV records, what came with them, and how long they hold.
func (r *resolver) services(ctx context.Context, name string, k *known) (list []*dns.SRV, extra []dns.RR, ttl time.Duration, err error) {
	o, first, ok := r.options()
	if !ok {
		_, srvs, err := net.DefaultResolver.LookupSRV(ctx, "", "", name)
		for _, s := range srvs {
			list = append(list, &dns.SRV{Target: s.Target, Port: s.Port, Priority: s.Priority, Weight: s.Weight})
		}
		if len(list) > 0 {
			err = nil // "those records are filtered out and an error will be returned alongside the remaining results"
		}
		return list, nil, maxTTL, goError(err, name)
	}
	var rrs []dns.RR
	err = search(ctx, &o, name, &k.found, func(full string) (err error) {
		rrs, extra, ttl, err = r.client.records(ctx, &o, first, full, dns.TypeSRV)
		return err
	})
	for _, rr := range rrs {
		if s, ok := rr.(*dns.SRV); ok {
			list = append(list, s)
		}
	}
	return list, extra, ttl, err
}

// search tries the full names that a name may stand for until one is there. found is the one that was there last time.
func search(ctx context.Context, o *resolveOptions, name string, found *string, try func(full string) error) error {
	var (
		none    *noRecordsError
		trouble error
	)
	candidates := o.candidates(name)
	for _, full := range candidates {
		err := try(full)
		if err == nil {
			*found = full
			return nil
		}
		if nothing, ok := errors.AsType[*noRecordsError](err); ok {
			none = none.or(nothing)
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if trouble == nil {
			trouble = err
		}
		if full == *found {
			break // The candidates behind it may be other services, which our calls are not meant for.
		}
	}
	if trouble != nil {
		return trouble
	}
	if len(candidates) > 1 {
		none.name = fmt.Sprintf("%s (asked for %s)", name, strings.Join(candidates, ", "))
	}
	return none
}

// or joins two findings that there is nothing.
func (e *noRecordsError) or(other *noRecordsError) *noRecordsError {
	if e == nil {
		return other
	}
	return &noRecordsError{name: e.name, exists: e.exists || other.exists, ttl: min(e.ttl, other.ttl)}
}

// goError tells Go's errors apart.
func goError(err error, name string) error {
	if e, ok := errors.AsType[*net.DNSError](err); ok && e.IsNotFound {
		return &noRecordsError{name: name}
	}
	return err
}

func addrsOf(list []dns.RR) []netip.Addr {
	var addrs []netip.Addr
	for _, rr := range list {
		var ip net.IP
		switch rr := rr.(type) {
		case *dns.A:
			ip = rr.A
		case *dns.AAAA:
			ip = rr.AAAA
		}
		if a, ok := netip.AddrFromSlice(ip); ok {
			addrs = append(addrs, a.Unmap())
		}
	}
	return addrs
}

// sorted puts addresses into an order that does not change when servers rotate their answers.
func sorted(addrs []netip.Addr) []netip.Addr {
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}
