package discovery

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(Static)) }

// Static lists endpoints in the configuration, with more to say about each than `to` has room for: weight, level,
// locality and metadata. It goes well with other sources inside `multi`.
type Static struct {
	// The endpoints. Placeholders in addresses are resolved when the configuration is loaded.
	Endpoints []Entry `json:"endpoints,omitempty"`

	list []upstream.Endpoint
}

// CaddyModule returns the Caddy module information.
func (*Static) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "static", New: func() caddy.Module { return new(Static) }}
}

// UnmarshalCaddyfile reads the source from the Caddyfile. What a block says holds for all addresses before it.
//
//	dynamic static [<addresses...>] {
//	    endpoint <addresses...> {
//	        name     <host_name>
//	        weight   <n>
//	        priority <n>
//	        locality <region> [<zone> [<sub_zone>]]
//	        metadata <key> <value>
//	    }
//	}
func (s *Static) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	w := words{d}
	d.Next() // The source's name.
	for _, addr := range d.RemainingArgs() {
		s.Endpoints = append(s.Endpoints, Entry{Address: addr})
	}
	for d.NextBlock(0) {
		if d.Val() != "endpoint" {
			return d.Errf("unrecognized subdirective %q; expected endpoint", d.Val())
		}
		addrs := d.RemainingArgs()
		if len(addrs) == 0 {
			return d.ArgErr()
		}
		var e Entry
		for nesting := d.Nesting(); d.NextBlock(nesting); {
			if err := w.entry(&e); err != nil {
				return err
			}
		}
		if err := e.check(); err != nil {
			return d.WrapErr(err)
		}
		for _, addr := range addrs {
			e.Address = addr
			s.Endpoints = append(s.Endpoints, e)
		}
	}
	return nil
}

// entry reads a word about an endpoint.
func (w words) entry(e *Entry) error {
	switch word := w.Val(); word {
	case "name":
		return w.text(&e.Name)
	case "weight":
		if e.Weight != nil {
			return w.Errf("weight is given twice")
		}
		n, err := w.integer()
		e.Weight = &n
		return err
	case "priority":
		if e.Priority != 0 {
			return w.Errf("priority is given twice")
		}
		n, err := w.integer()
		e.Priority = n
		return err
	case "locality":
		args := w.RemainingArgs()
		switch {
		case len(args) < 1 || len(args) > 3:
			return w.ArgErr()
		case e.Locality != upstream.Locality{}:
			return w.Errf("locality is given twice")
		}
		args = append(args, "", "")
		e.Locality = upstream.Locality{Region: args[0], Zone: args[1], SubZone: args[2]}
		return nil
	case "metadata":
		args := w.RemainingArgs()
		if len(args) != 2 {
			return w.ArgErr()
		}
		if _, ok := e.Metadata[args[0]]; ok {
			return w.Errf("metadata %s is given twice", args[0])
		}
		if e.Metadata == nil {
			e.Metadata = make(map[string]string)
		}
		e.Metadata[args[0]] = args[1]
		return nil
	default:
		return w.Errf("unrecognized subdirective %q; expected name, weight, priority, locality or metadata", word)
	}
}

// Provision implements caddy.Provisioner.
func (s *Static) Provision(caddy.Context) error {
	if len(s.Endpoints) == 0 {
		return errors.New("endpoints is empty; list at least one address")
	}
	entries := make([]Entry, len(s.Endpoints))
	var err error
	for i, e := range s.Endpoints {
		if e.Address, err = upstream.Resolve(e.Address); err != nil {
			return fmt.Errorf("endpoints[%d]: address %w", i, err)
		}
		entries[i] = e
	}
	s.list, err = endpointsOf(entries, "static", func(i int) string { return fmt.Sprintf("endpoints[%d]", i) })
	return err
}

// Watch implements [Source].
func (s *Static) Watch(ctx context.Context, sink Sink) {
	sink.Update(slices.Clone(s.list))
	<-ctx.Done()
}

var (
	_ Source                = (*Static)(nil)
	_ caddy.Provisioner     = (*Static)(nil)
	_ caddyfile.Unmarshaler = (*Static)(nil)
)
