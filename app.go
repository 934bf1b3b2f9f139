package grpcproxy

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(new(App))
}

// App is what the handlers `grpc_proxy` and `grpc_health` of one configuration have in common. It is there as soon as one of
// them is, and has no settings.
type App struct {
	// All under running.mu.
	proxies   []*Handler // replaced, never changed
	reporters []*Health
	stopping  bool
	granted   map[*caddyhttp.Server]struct{}
}

const appName = "grpc_proxy"

// CaddyModule returns the Caddy module information.
func (*App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: appName, New: func() caddy.Module { return new(App) }}
}

// appOf is the app of the configuration that is being loaded.
func appOf(ctx caddy.Context) (*App, error) {
	app, err := ctx.App(appName)
	if err != nil {
		return nil, err
	}
	return app.(*App), nil
}

// Provision makes the app hear when its configuration comes into force, and when it goes.
func (a *App) Provision(ctx caddy.Context) error {
	app, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	events := app.(*caddyevents.App)
	if err := events.On("started", eventHandler(a.started)); err != nil {
		return err
	}
	return events.On("stopping", eventHandler(func() { running.stop(a) }))
}

// eventHandler is a function that handles an event of Caddy's.
type eventHandler func()

// Handle calls the function.
func (f eventHandler) Handle(context.Context, caddy.Event) error {
	f()
	return nil
}

// Start refuses a configuration whose handlers do not fit together. It is the first moment at which all of them are known.
func (a *App) Start() error {
	running.mu.Lock()
	defer running.mu.Unlock()
	for _, r := range a.reporters {
		if err := r.checkGroups(a.proxies); err != nil {
			return err
		}
	}
	return nil
}

// started runs when the whole configuration has started.
func (a *App) started() {
	running.mu.Lock()
	proxies := a.proxies
	running.mu.Unlock()
	for _, p := range proxies {
		p.cluster.Start()
	}
	running.start(a)
}

// Stop does nothing: by the time that an app is stopped, others may have been already. See Provision.
func (*App) Stop() error { return nil }

// Cleanup takes the configuration out of those that count.
func (a *App) Cleanup() error {
	running.remove(a)
	return nil
}

// join and leave are called by a handler that begins and one that ends. A handler outside of a server never joined.
func (a *App) join(h *Handler) {
	running.mu.Lock()
	defer running.mu.Unlock()
	a.proxies = append(slices.Clip(a.proxies), h)
}

func (a *App) leave(h *Handler) {
	if a == nil {
		return
	}
	running.mu.Lock()
	a.proxies = slices.DeleteFunc(slices.Clone(a.proxies), func(p *Handler) bool { return p == h })
	running.mu.Unlock()
	running.tell()
}

func (a *App) joinReporter(h *Health) {
	running.mu.Lock()
	defer running.mu.Unlock()
	a.reporters = append(a.reporters, h)
}

// configurations knows those that have started. During a reload there are two.
type configurations struct {
	mu sync.Mutex
	// apps are of the configurations that have started and were not replaced; the last one counts.
	apps []*App
	// told are those who want to know of changes.
	told map[*Health]struct{}
}

var running = configurations{told: make(map[*Health]struct{})}

func (c *configurations) start(a *App) {
	c.mu.Lock()
	c.apps = append(c.apps, a)
	c.mu.Unlock()
	c.tell()
}

// stop runs when a configuration begins to stop: because a newer one has started or, if there is none, because there will
// be no proxy any more.
func (c *configurations) stop(a *App) {
	c.mu.Lock()
	if n := len(c.apps); n > 0 && c.apps[n-1] == a {
		a.stopping = true
	} else {
		c.removeLocked(a)
	}
	c.mu.Unlock()
	c.tell()
}

func (c *configurations) remove(a *App) {
	c.mu.Lock()
	c.removeLocked(a)
	c.mu.Unlock()
	c.tell()
}

func (c *configurations) removeLocked(a *App) {
	c.apps = slices.DeleteFunc(c.apps, func(b *App) bool { return a == b })
}

// look returns the proxies of the configuration that counts, and those of the one that asks. up is false if nothing is
// running, or not for long any more.
func (c *configurations) look(own *App) (current, ours []*Handler, up bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if own != nil {
		ours = own.proxies
	}
	if n := len(c.apps); n > 0 {
		current, up = c.apps[n-1].proxies, !c.apps[n-1].stopping
	}
	return current, ours, up
}

// tell lets everyone who reports on proxies look anew. It does not block.
func (c *configurations) tell() {
	c.mu.Lock()
	told := make([]*Health, 0, len(c.told))
	for h := range c.told {
		told = append(told, h)
	}
	c.mu.Unlock()
	for _, h := range told {
		h.lookAgain()
	}
}

func (c *configurations) subscribe(h *Health) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told[h] = struct{}{}
}

func (c *configurations) unsubscribe(h *Health) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.told, h)
}

// checkGroup refuses names of groups that could be taken for something else.
func checkGroup(name string) error {
	if strings.Trim(name, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-.") != "" {
		return fmt.Errorf("group: %q is no name of a group; use letters, digits, '_', '-' and '.'", name)
	}
	return nil
}

// Interface guards
var (
	_ caddy.App          = (*App)(nil)
	_ caddy.Provisioner  = (*App)(nil)
	_ caddy.CleanerUpper = (*App)(nil)
)
