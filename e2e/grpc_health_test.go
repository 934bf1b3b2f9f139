package e2e

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/health" // client-side health checking
	"google.golang.org/grpc/health/grpc_health_v1"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// long bounds waits for what a busy machine may take its time over.
const long = 30 * time.Second

// healthClient asks the proxy itself.
type healthClient struct {
	grpc_health_v1.HealthClient
	t *testing.T
}

func askHealth(t *testing.T, addr string) healthClient {
	t.Helper()
	return healthClient{grpc_health_v1.NewHealthClient(dial(t, addr, nil)), t}
}

// check asks about a name. A code other than OK is the answer's, in its own words.
func (c healthClient) check(name string, md ...string) string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(c.t.Context(), md...), long)
	defer cancel()
	r, err := c.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: name})
	if err != nil {
		return status.Code(err).String()
	}
	return r.GetStatus().String()
}

// becomes waits until the answer is what it should be.
func (c healthClient) becomes(name, want string, md ...string) {
	c.t.Helper()
	var got string
	for end := time.Now().Add(long); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if got = c.check(name, md...); got == want {
			return
		}
	}
	c.t.Fatalf("%q is %s, want %s", name, got, want)
}

func (c healthClient) list() map[string]string {
	c.t.Helper()
	r, err := c.List(within(c.t, long), new(grpc_health_v1.HealthListRequest))
	if err != nil {
		c.t.Fatal(err)
	}
	list := make(map[string]string)
	for name, s := range r.GetStatuses() {
		list[name] = s.GetStatus().String()
	}
	return list
}

// healthWatch is a Watch under way.
type healthWatch struct {
	t      *testing.T
	name   string
	told   chan string // each status, and at the end the error
	cancel context.CancelFunc
}

func (c healthClient) watch(name string, opts ...grpc.CallOption) *healthWatch {
	c.t.Helper()
	ctx, cancel := context.WithCancel(c.t.Context())
	w := &healthWatch{t: c.t, name: name, told: make(chan string, 100), cancel: cancel}
	c.t.Cleanup(cancel)
	s, err := c.Watch(ctx, &grpc_health_v1.HealthCheckRequest{Service: name}, opts...)
	if err != nil {
		c.t.Fatal(err)
	}
	go func() {
		for {
			r, err := s.Recv()
			if err != nil {
				w.told <- err.Error()
				return
			}
			w.told <- r.GetStatus().String()
		}
	}()
	return w
}

// next makes sure that the next thing told is the wanted one, an error of which a part will do.
func (w *healthWatch) next(want string) {
	w.t.Helper()
	select {
	case got := <-w.told:
		if got != want && !(strings.HasPrefix(got, "rpc error") && strings.Contains(got, want)) {
			w.t.Fatalf("watching %q: told %s, want %s", w.name, got, want)
		}
	case <-time.After(long):
		w.t.Fatalf("watching %q: told nothing, want %s", w.name, want)
	}
}

func (w *healthWatch) quiet() {
	w.t.Helper()
	select {
	case got := <-w.told:
		w.t.Errorf("watching %q: told %s, want nothing", w.name, got)
	default:
	}
}

// TestGRPCHealthGroups: Check, Watch and List answer for the whole and for each group, as health checks of the upstreams
// change.
func TestGRPCHealthGroups(t *testing.T) {
	wiretest.CheckLeaks(t)
	users, orders, other := start(t, 2), start(t, 1), start(t, 1)
	p := proxytest.Start(t, proxytest.Options{Site: `
@users header x-to users
grpc_proxy @users` + addrs(users) + ` {
	group users
	health_check grpc
}
@orders header x-to orders
grpc_proxy @orders` + addrs(orders) + ` {
	group orders
	health_check grpc
}
grpc_proxy` + addrs(other) + ` {
	health_check grpc
}
grpc_health`})
	c := askHealth(t, p.H2C)
	for _, b := range slices.Concat(users, orders, other) {
		state := stateOf(t, b.Addr())
		eventually(t, b.Name()+" is healthy", func() bool { return state.Usable() && state.Status().Condition == upstream.ConditionHealthy })
	}
	for _, name := range []string{"", "users", "orders"} {
		if got := c.check(name); got != "SERVING" {
			t.Errorf("%q is %s", name, got)
		}
	}
	if got := c.check("payments"); got != "NotFound" {
		t.Errorf("an unknown name is %s", got)
	}
	whole, watchUsers, watchOrders, unknown := c.watch(""), c.watch("users"), c.watch("orders"), c.watch("payments")
	for _, w := range []*healthWatch{whole, watchUsers, watchOrders} {
		w.next("SERVING")
	}
	unknown.next("SERVICE_UNKNOWN")

	users[0].Health.SetServingStatus("", notServing)
	orders[0].Health.SetServingStatus("", notServing)
	watchOrders.next("NOT_SERVING")
	users[1].Health.SetServingStatus("", notServing)
	watchUsers.next("NOT_SERVING")
	if got, want := c.list(), map[string]string{"": "SERVING", "users": "NOT_SERVING", "orders": "NOT_SERVING"}; !maps.Equal(got, want) {
		t.Errorf("List: %v, want %v", got, want)
	}
	whole.quiet()
	other[0].Health.SetServingStatus("", notServing)
	whole.next("NOT_SERVING")
	users[0].Health.SetServingStatus("", serving)
	whole.next("SERVING")
	watchUsers.next("SERVING")
	watchOrders.quiet()
	unknown.quiet()
}

// TestGRPCHealthQuorum: how many upstreams make the whole; those that drain are not counted, those that nothing is known of
// yet are not serving, and an upstream of two groups counts once.
func TestGRPCHealthQuorum(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 3)
	p := proxytest.Start(t, proxytest.Options{Site: `
grpc_proxy` + addrs(backends) + ` {
	health_check grpc
	group a
}
@again header x-to again
grpc_proxy @again` + addrs(backends[:1]) + ` {
	health_check grpc
	group b
}
@all header x-rule all
grpc_health @all {
	serving_if all
}
@percent header x-rule percent
grpc_health @percent {
	serving_if 67%
}
@half header x-rule half
grpc_health @half b a {
	serving_if 50%
}
@any header x-rule any
grpc_health @any {
	serving_if any
}`})
	c := askHealth(t, p.H2C)
	expect := func(what string, want map[string]bool) {
		t.Helper()
		for rule, serving := range want {
			s := "NOT_SERVING"
			if serving {
				s = "SERVING"
			}
			t.Log(what, rule, s)
			c.becomes("", s, "x-rule", rule)
		}
	}
	expect("3 of 3", map[string]bool{"all": true, "percent": true, "half": true, "any": true})
	backends[0].Health.SetServingStatus("", notServing)
	expect("2 of 3", map[string]bool{"all": false, "percent": false, "half": true, "any": true})
	backends[1].Health.SetServingStatus("", notServing)
	expect("1 of 3", map[string]bool{"all": false, "percent": false, "half": false, "any": true})
	states := func(i int) (stop func()) {
		s := stateOf(t, backends[i].Addr())
		s.Drain("maintenance")
		return func() { s.Undrain() }
	}
	undrain := states(0)
	expect("1 of 2, one drains", map[string]bool{"all": false, "percent": false, "half": true, "any": true})
	undrain2 := states(1)
	expect("1 of 1, two drain", map[string]bool{"all": true, "percent": true, "half": true, "any": true})
	undrain3 := states(2)
	expect("none, three drain", map[string]bool{"all": false, "percent": false, "half": false, "any": false})
	undrain()
	undrain2()
	undrain3()
	backends[2].Health.SetServingStatus("", notServing)
	expect("0 of 3", map[string]bool{"all": false, "percent": false, "half": false, "any": false})
}

// TestGRPCHealthFirstVerdict: before the first answer of a health check, nothing is serving; so it is with an upstream that
// could not be connected to.
func TestGRPCHealthFirstVerdict(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	gate, frozen := freezable(t, b.Addr())
	frozen.Store(true)
	p := proxytest.Start(t, proxytest.Options{Site: fmt.Sprintf(`
grpc_proxy %s {
	health_timeout 60s
}
@dead header x-to dead
grpc_proxy @dead %s {
	group dead
}
grpc_health`, gate, proxytest.FreeAddress(t))})
	c := askHealth(t, p.H2C)
	if got := c.check("dead"); got != "SERVING" {
		t.Errorf("an upstream that nobody has looked at is %s", got)
	}
	if _, err := client(t, p.H2C).EmptyCall(metadata.AppendToOutgoingContext(within(t, long), "x-to", "dead"), new(testgrpc.Empty)); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	c.becomes("dead", "NOT_SERVING")
	if got := c.check(""); got != "NOT_SERVING" {
		t.Errorf("before the first verdict: %s", got)
	}
	w := c.watch("")
	w.next("NOT_SERVING")
	frozen.Store(false)
	w.next("SERVING")
}

// TestGRPCHealthServices: services are known that grpc_proxy blocks name, with the upstreams of these blocks.
func TestGRPCHealthServices(t *testing.T) {
	wiretest.CheckLeaks(t)
	two, one := start(t, 2), start(t, 1)
	for _, b := range two {
		b.Health.SetServingStatus("pkg.A", serving)
	}
	two[0].Health.SetServingStatus("pkg.Half", serving)
	two[0].Health.SetServingStatus("pkg.Unnamed", serving)
	one[0].Health.SetServingStatus("pkg.N", serving)
	p := proxytest.Start(t, proxytest.Options{Site: `
@one header x-to one
grpc_proxy @one` + addrs(one) + ` {
	health_services pkg.N
}
grpc_proxy` + addrs(two) + ` {
	health_services pkg.A pkg.Half pkg.Later
}
@all header x-rule all
grpc_health @all {
	serving_if all
}
grpc_health`})
	c := askHealth(t, p.H2C)
	c.becomes("", "SERVING", "x-rule", "all")
	for name, want := range map[string]string{"pkg.A": "SERVING", "pkg.Half": "SERVING", "pkg.N": "SERVING", "pkg.Later": "NOT_SERVING", "pkg.Unnamed": "NotFound"} {
		if got := c.check(name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	for name, want := range map[string]string{"pkg.A": "SERVING", "pkg.Half": "NOT_SERVING"} {
		if got := c.check(name, "x-rule", "all"); got != want {
			t.Errorf("%s is %s where all must serve it, want %s", name, got, want)
		}
	}
	if got, want := c.list(), map[string]string{"": "SERVING", "pkg.A": "SERVING", "pkg.Half": "SERVING", "pkg.Later": "NOT_SERVING", "pkg.N": "SERVING"}; !maps.Equal(got, want) {
		t.Errorf("List: %v, want %v", got, want)
	}
	a, n, whole, later, unnamed := c.watch("pkg.A"), c.watch("pkg.N"), c.watch(""), c.watch("pkg.Later"), c.watch("pkg.Unnamed")
	for _, w := range []*healthWatch{a, n, whole} {
		w.next("SERVING")
	}
	later.next("NOT_SERVING")
	unnamed.next("SERVICE_UNKNOWN")
	two[0].Health.SetServingStatus("pkg.A", notServing)
	two[1].Health.SetServingStatus("pkg.A", notServing)
	a.next("NOT_SERVING")
	one[0].Health.SetServingStatus("pkg.N", notServing)
	n.next("NOT_SERVING")
	two[1].Health.SetServingStatus("pkg.A", serving)
	a.next("SERVING")
	two[0].Health.SetServingStatus("pkg.Later", serving)
	later.next("SERVING")
	whole.quiet()
}

// TestGRPCHealthTooManyToList: gRFC A90 stops at 100.
func TestGRPCHealthTooManyToList(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	site := func(n int) string {
		var s strings.Builder
		for i := range n {
			fmt.Fprintf(&s, "@to%d header x-to %d\ngrpc_proxy @to%d %s {\n\tgroup g%d\n}\n", i, i, i, b.Addr(), i)
		}
		return s.String() + "grpc_health"
	}
	p := proxytest.Start(t, proxytest.Options{Site: site(99)})
	if n := len(askHealth(t, p.H2C).list()); n != 100 {
		t.Errorf("%d names are listed, want 99 groups and the whole", n)
	}
	if err := p.Load(site(100)); err != nil {
		t.Fatal(err)
	}
	c := askHealth(t, p.H2C)
	if _, err := c.List(within(t, long), new(grpc_health_v1.HealthListRequest)); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("List of 101 names: %v", err)
	}
	if got := c.check("g99"); got != "SERVING" {
		t.Errorf("g99 is %s", got)
	}
}

// TestGRPCHealthClientSide: grpc-go's own client-side health checking, through the proxy.
func TestGRPCHealthClientSide(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 2)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy" + addrs(backends) + " {\n\tgroup test\n\thealth_check grpc\n}\ngrpc_health test"})
	c := client(t, p.H2C, grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": "test"}}`))
	call := func() error {
		_, err := c.EmptyCall(within(t, long), new(testgrpc.Empty), grpc.WaitForReady(true))
		return err
	}
	if err := call(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for _, b := range backends {
			b.Health.SetServingStatus("", notServing)
		}
		eventually(t, "the client keeps its calls", func() bool {
			_, err := c.EmptyCall(within(t, long), new(testgrpc.Empty))
			return status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "NOT_SERVING")
		})
		backends[1].Health.SetServingStatus("", serving)
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestGRPCHealthManyWatches: of many that watch, each is told.
func TestGRPCHealthManyWatches(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + " {\n\tgroup g\n\thealth_check grpc\n}\ngrpc_health"})
	c := askHealth(t, p.H2C)
	c.becomes("", "SERVING")
	watches := make([]*healthWatch, 100)
	for i := range watches {
		watches[i] = c.watch([]string{"", "g"}[i%2])
		watches[i].next("SERVING")
	}
	for _, s := range []grpc_health_v1.HealthCheckResponse_ServingStatus{notServing, serving} {
		b.Health.SetServingStatus("", s)
		for _, w := range watches {
			w.next(s.String())
		}
	}
	for _, w := range watches {
		w.cancel()
		w.next("context canceled")
	}
	w := c.watch("")
	w.next("SERVING")
	b.Health.SetServingStatus("", notServing)
	w.next("NOT_SERVING")
}
