package selection

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(Locality)) }

// Locality prefers endpoints that are near: first those in the same sub-zone, then those in the same zone, then those in
// the same region, then all others. What the near ones cannot carry goes to the next ones, as little as possible: the
// near ones get calls until each has `overprovisioning_factor` times as many as it would have if all calls were spread
// evenly over all endpoints.
//
// This is Envoy's zone aware routing for a proxy that does not know the others of its fleet: `share` says, or it is
// assumed, how much of all calls come from here.
type Locality struct {
	// Where this proxy is. Endpoints whose source says that they are in the same place are near. Placeholders such as
	// `{env.ZONE}` are resolved when the configuration is loaded. At least one of the three is needed.
	Region string `json:"region,omitempty"`
	// The zone of this proxy.
	Zone string `json:"zone,omitempty"`
	// The part of the zone.
	SubZone string `json:"sub_zone,omitempty"`

	// How much of all calls to these endpoints come from proxies in the same place as this one, in percent. Default: as
	// much as from each of the other places where there are endpoints, which is 33 percent if there are three.
	Share float64 `json:"share,omitempty"`

	// How much more load endpoints can carry than they get when all calls are spread evenly, 1 to 100. Default: `1.4`.
	OverprovisioningFactor float64 `json:"overprovisioning_factor,omitempty"`

	// How many endpoints that can be used there must be near by. If there are fewer, they are treated like those that
	// are farther away. Default: `1`.
	MinEndpoints int `json:"min_endpoints,omitempty"`

	// The policy that chooses among endpoints that are equally near. Default: `least_request`.
	PolicyRaw json.RawMessage `json:"child,omitempty" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`

	nested
	here upstream.Locality
}

// CaddyModule returns the Caddy module information.
func (*Locality) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "locality", New: func() caddy.Module { return new(Locality) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy locality {
//	    region                  <name>
//	    zone                    <name>
//	    sub_zone                <name>
//	    share                   <percent>
//	    overprovisioning_factor <factor>
//	    min_endpoints           <n>
//	    policy                  <policy> ...
//	}
func (p *Locality) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // The policy's name.
	if d.NextArg() {
		return d.Errf("locality: unexpected argument %q; options go into a block", d.Val())
	}
	return options{
		"region":                  textOption(&p.Region),
		"zone":                    textOption(&p.Zone),
		"sub_zone":                textOption(&p.SubZone),
		"share":                   shareOption(&p.Share),
		"overprovisioning_factor": factorOption(&p.OverprovisioningFactor),
		"min_endpoints":           numberOption(&p.MinEndpoints),
		"policy":                  policyOption(&p.PolicyRaw),
	}.parse(d, "locality")
}

// Provision implements caddy.Provisioner.
func (p *Locality) Provision(ctx caddy.Context) error {
	repl := caddy.NewReplacer()
	for _, f := range []struct {
		name, configured string
		to               *string
	}{
		{"region", p.Region, &p.here.Region},
		{"zone", p.Zone, &p.here.Zone},
		{"sub_zone", p.SubZone, &p.here.SubZone},
	} {
		if *f.to = repl.ReplaceAll(f.configured, ""); f.configured != "" && *f.to == "" {
			return fmt.Errorf("%s: %s is empty", f.name, f.configured)
		}
	}
	p.PolicyRaw = orLeastRequest(p.PolicyRaw)
	if err := p.load(ctx, p, "PolicyRaw"); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	return nil
}

// Validate implements caddy.Validator.
func (p *Locality) Validate() error {
	switch {
	case p.here == upstream.Locality{}:
		return errors.New("region, zone, sub_zone: none says where this proxy is; write zone {env.ZONE}, say")
	case p.Share < 0 || p.Share > 100:
		return fmt.Errorf("share: %v is not a percentage above 0", p.Share)
	case p.MinEndpoints < 0:
		return fmt.Errorf("min_endpoints: %d is negative", p.MinEndpoints)
	}
	if err := p.notSticky("locality"); err != nil {
		return err
	}
	return checkOverprovisioning(p.OverprovisioningFactor)
}

// WatchesHealth implements [HealthWatcher].
func (*Locality) WatchesHealth() bool { return true }

// Build implements [Policy].
func (p *Locality) Build(s *upstream.Snapshot) Picker {
	var near [distances][]upstream.Endpoint
	where := map[upstream.Locality]bool{p.reach(p.here): true}
	farthest := 0
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		d := p.distance(e.Locality)
		near[d] = append(near[d], *e)
		where[p.reach(e.Locality)] = true
		farthest = max(farthest, d)
	}
	share := p.Share / 100
	if share == 0 {
		share = 1 / float64(len(where))
	}
	factor := cmp.Or(p.OverprovisioningFactor, defaultOverprovisioning)
	all := max(usable(s.Endpoints), 1)
	var (
		list    []level
		few     []upstream.Endpoint // too few for a level of their own
		open    int                 // endpoints that can be used, up to this distance
		carried float64             // share of the calls that endpoints nearer than this carry
	)
	for d, endpoints := range near[:farthest+1] {
		few = append(few, endpoints...)
		open += usable(endpoints)
		if d < farthest && (len(few) == 0 || open < max(p.MinEndpoints, 1)) {
			continue
		}
		// Envoy's zone aware routing: if a tenth of the endpoints are here and a fifth of the calls come from here, half of
		// these calls can be answered here.
		can := min(1, factor*float64(open)/float64(all)/share)
		if d == farthest {
			can = 1
		}
		list = append(list, level{few, can - carried})
		few, carried = nil, can
	}
	return p.buildLevels(s, list, false)
}

// distances are: the same sub-zone, zone, region, and elsewhere.
const distances = 4

// distance tells how far away a place is. A part that is not configured does not count.
func (p *Locality) distance(l upstream.Locality) int {
	switch {
	case p.here.Region != "" && l.Region != p.here.Region:
		return 3
	case p.here.Zone != "" && l.Zone != p.here.Zone:
		if p.here.Region == "" {
			return 3
		}
		return 2
	case p.here.SubZone != "" && l.SubZone != p.here.SubZone:
		switch {
		case p.here.Zone != "":
			return 1
		case p.here.Region != "":
			return 2
		}
		return 3
	}
	return 0
}

// reach is the place as far as this proxy tells places apart.
func (p *Locality) reach(l upstream.Locality) upstream.Locality {
	if p.here.SubZone == "" {
		l.SubZone = ""
		if p.here.Zone == "" {
			l.Zone = ""
		}
	}
	return l
}

var (
	_ Policy                = (*Locality)(nil)
	_ HealthWatcher         = (*Locality)(nil)
	_ LoadReportReceiver    = (*Locality)(nil)
	_ caddy.Provisioner     = (*Locality)(nil)
	_ caddy.Validator       = (*Locality)(nil)
	_ caddyfile.Unmarshaler = (*Locality)(nil)
)
