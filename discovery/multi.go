package discovery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(Multi)) }

// Multi joins the endpoints of several sources into one list, in the order of the sources. A source that fails keeps its
// last endpoints in the list, and does not keep the others' changes from being seen. That holds across reloads for a
// source whose configuration stays the same.
type Multi struct {
	// The sources. Required.
	SourcesRaw []json.RawMessage `json:"sources,omitempty" caddy:"namespace=http.grpc_proxy.discovery inline_key=source"`

	sources []Source
	names   []string
	lease   *upstream.Lease[*memory]
	last    []*memory
}

// memory is the last list of a member, for the same member in the configuration after this one: else a reload would drop
// the endpoints of all members but the first to be heard, for as long as the others take.
type memory struct {
	list atomic.Pointer[[]upstream.Endpoint]
}

// Destruct implements caddy.Destructor.
func (*memory) Destruct() error { return nil }

var memories = upstream.NewPool[*memory]()

// CaddyModule returns the Caddy module information.
func (*Multi) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "multi", New: func() caddy.Module { return new(Multi) }}
}

// UnmarshalCaddyfile reads the source from the Caddyfile:
//
//	dynamic multi {
//	    <source> [<options...>]
//	    ...
//	}
func (m *Multi) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // The source's name.
	if d.NextArg() {
		return d.ArgErr()
	}
	for d.NextBlock(0) {
		name := d.Val()
		if _, err := caddy.GetModule(namespace + name); err != nil {
			return d.Errf("there is no source of upstreams %q; available: %s", name, available())
		}
		mod, err := caddyfile.UnmarshalModule(d, namespace+name)
		if err != nil {
			return err
		}
		source, ok := mod.(Source)
		if !ok {
			return d.Errf("module %s%s is not a source of endpoints", namespace, name)
		}
		m.SourcesRaw = append(m.SourcesRaw, caddyconfig.JSONModuleObject(source, "source", name, nil))
	}
	return nil
}

// available lists the sources there are.
func available() string {
	modules := caddy.GetModules(strings.TrimSuffix(namespace, "."))
	names := make([]string, len(modules))
	for i, m := range modules {
		names[i] = m.ID.Name()
	}
	return strings.Join(names, ", ")
}

// Provision implements caddy.Provisioner.
func (m *Multi) Provision(ctx caddy.Context) error {
	if len(m.SourcesRaw) == 0 {
		return errors.New("sources is empty; list at least one source")
	}
	m.lease = memories.NewLease()
	for _, raw := range m.SourcesRaw {
		last, err := m.lease.Acquire(string(raw), func() (*memory, error) { return new(memory), nil })
		if err != nil {
			return err
		}
		m.last = append(m.last, last)
	}
	mods, err := ctx.LoadModule(m, "SourcesRaw")
	if err != nil {
		return fmt.Errorf("loading the sources: %w", err)
	}
	for _, mod := range mods.([]any) { //nolint:forcetypeassert // what LoadModule makes of a list
		source, ok := mod.(Source)
		if !ok {
			return fmt.Errorf("module %T is not a source of endpoints", mod)
		}
		m.sources = append(m.sources, source)
		m.names = append(m.names, mod.(caddy.Module).CaddyModule().ID.Name()) //nolint:forcetypeassert // it was loaded as one
	}
	return nil
}

// Cleanup implements caddy.CleanerUpper.
func (m *Multi) Cleanup() error {
	m.lease.Release()
	return nil
}

// Watch implements [Source].
func (m *Multi) Watch(ctx context.Context, sink Sink) {
	j := &joined{sink: sink, lists: make([][]upstream.Endpoint, len(m.sources)), heard: make([]bool, len(m.sources))}
	for i, last := range m.last {
		if list := last.list.Load(); list != nil {
			j.lists[i] = *list
		}
	}
	var wg sync.WaitGroup
	for i, source := range m.sources {
		member := &joinedMember{joined: j, i: i, name: m.names[i], last: m.last[i]}
		wg.Go(func() {
			defer func() {
				if p := recover(); p != nil {
					member.Fail(fmt.Errorf("panic: %v", p))
				}
			}()
			source.Watch(ctx, member)
		})
	}
	wg.Wait()
}

// Refresh implements [Refresher]. It is not known whose endpoint was lost, so all look again.
func (m *Multi) Refresh() {
	for _, source := range m.sources {
		if r, ok := source.(Refresher); ok {
			r.Refresh()
		}
	}
}

// joined is the list of all members' endpoints.
type joined struct {
	mu    sync.Mutex // Held while the sink is told, so that it hears things in their order.
	sink  Sink
	lists [][]upstream.Endpoint
	heard []bool // Who has found out, or failed to.
	found bool   // Whether anybody has found out.
}

// joinedMember is the sink of one of the sources.
type joinedMember struct {
	*joined
	i    int
	name string
	last *memory
}

// Update implements [Sink].
func (m *joinedMember) Update(endpoints []upstream.Endpoint) {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := slices.Clone(endpoints)
	m.lists[m.i], m.heard[m.i], m.found = list, true, true
	m.last.list.Store(&list)
	m.tell()
}

// Fail implements [Sink].
func (m *joinedMember) Fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	waited := slices.Contains(m.heard, false)
	m.heard[m.i] = true
	m.sink.Fail(fmt.Errorf("%s (source %d of %d): %w", m.name, m.i+1, len(m.lists), err))
	if waited && m.found && m.count() == 0 {
		m.tell()
	}
}

func (j *joined) count() (n int) {
	for _, list := range j.lists {
		n += len(list)
	}
	return n
}

// tell hands on the list as far as it is known. That there is no endpoint is known only when everybody was heard.
func (j *joined) tell() {
	if j.count() > 0 || !slices.Contains(j.heard, false) {
		j.sink.Update(slices.Concat(j.lists...))
	}
}

var (
	_ Refresher             = (*Multi)(nil)
	_ caddy.Provisioner     = (*Multi)(nil)
	_ caddy.CleanerUpper    = (*Multi)(nil)
	_ caddyfile.Unmarshaler = (*Multi)(nil)
)
