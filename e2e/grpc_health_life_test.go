package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/health" // client-side health checking
	"google.golang.org/grpc/health/grpc_health_v1"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestGRPCHealthDeadline: a Watch may have one.
func TestGRPCHealthDeadline(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + "\ngrpc_health"})
	// A deadline that the client does not know of, so that the status is the proxy's.
	ctx := metadata.AppendToOutgoingContext(within(t, long), "x", "y")
	s, err := askHealth(t, p.H2C).Watch(ctx, new(grpc_health_v1.HealthCheckRequest))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := s.Recv(); err != nil || r.GetStatus() != serving {
		t.Fatalf("told %v, %v", r, err)
	}
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	s, err = askHealth(t, p.H2C).Watch(short, new(grpc_health_v1.HealthCheckRequest))
	for err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("ended with %v", err)
	}
}

// TestGRPCHealthIdle: a Watch is silent for longer than Caddy lets web pages be.
func TestGRPCHealthIdle(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 3 s")
	}
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{
		Site:    "grpc_proxy " + b.Addr() + " {\n\thealth_check grpc\n}\ngrpc_health",
		Servers: "timeouts {\n\tread_body_idle 500ms\n\twrite_idle 500ms\n}",
	})
	c := askHealth(t, p.H2C)
	c.becomes("", "SERVING")
	w := c.watch("")
	w.next("SERVING")
	time.Sleep(3 * time.Second) // the silence that is being tested
	b.Health.SetServingStatus("", notServing)
	w.next("NOT_SERVING")
}

// TestGRPCHealthReload: a Watch outlives the configuration it began in and tells of the upstreams of the one that is
// running; one that ends with the last configuration that has upstreams says so.
func TestGRPCHealthReload(t *testing.T) {
	wiretest.CheckLeaks(t)
	a, b := backendtest.Start(t, backendtest.Options{Name: "a"}), backendtest.Start(t, backendtest.Options{Name: "b"})
	site := func(b *backendtest.Backend, more string) string {
		return "grpc_proxy " + b.Addr() + " {\n\tgroup g\n\thealth_check grpc\n}\ngrpc_health" + more
	}
	p := proxytest.Start(t, proxytest.Options{Site: site(a, "")})
	c := askHealth(t, p.H2C)
	c.becomes("g", "SERVING")
	w := c.watch("g")
	w.next("SERVING")
	if err := p.Load(site(a, "\nheader x y")); err != nil {
		t.Fatal(err)
	}
	w.quiet() // the same upstream, whose health is remembered
	b.Health.SetServingStatus("", notServing)
	if err := p.Load(site(b, "")); err != nil {
		t.Fatal(err)
	}
	w.next("NOT_SERVING")
	a.Health.SetServingStatus("", notServing)
	b.Health.SetServingStatus("", serving)
	w.next("SERVING")
	second := c.watch("g") // in the last configuration
	second.next("SERVING")
	if err := p.Load("respond ok"); err != nil {
		t.Fatal(err)
	}
	for _, w := range []*healthWatch{w, second} {
		w.next("NOT_SERVING")
		w.next("code = Unavailable desc = the proxy is shutting down")
	}
	if got := c.check("g"); got != "Internal" && got != "Unknown" && got != "Unimplemented" {
		t.Errorf("without grpc_health the answer is %s", got)
	}
}

// TestGRPCHealthReloadStorm: a Watch is told nothing while nothing changes, however often the configuration is loaded.
func TestGRPCHealthReloadStorm(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 2)
	site := func(i int) string {
		return fmt.Sprintf("header x %d\ngrpc_proxy%s {\n\tgroup g\n\thealth_check grpc\n}\ngrpc_health {\n\tserving_if all\n}", i, addrs(backends))
	}
	p := proxytest.Start(t, proxytest.Options{Site: site(0)})
	c := askHealth(t, p.H2C)
	c.becomes("g", "SERVING")
	w := c.watch("g")
	w.next("SERVING")
	for i := range 20 {
		if err := p.Load(site(i + 1)); err != nil {
			t.Fatal(err)
		}
		if got := c.check("g"); got != "SERVING" {
			t.Errorf("after reload %d: %s", i, got)
		}
	}
	w.quiet()
	backends[0].Health.SetServingStatus("", notServing)
	w.next("NOT_SERVING")
}

// TestGRPCHealthRefused: groups that are not there are refused before anything of the configuration is in force.
func TestGRPCHealthRefused(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	running := "grpc_health users\ngrpc_proxy " + b.Addr() + " {\n\tgroup users\n\thealth_check grpc\n}"
	p := proxytest.Start(t, proxytest.Options{Site: running})
	c := askHealth(t, p.H2C)
	c.becomes("users", "SERVING")
	w := c.watch("users")
	w.next("SERVING")
	for site, want := range map[string]string{
		"grpc_health": "grpc_health has no upstreams to answer for: there is no grpc_proxy in the configuration",
		"grpc_health users orders\ngrpc_proxy " + b.Addr() + " {\n\tgroup users\n}\n@z header x z\ngrpc_proxy @z " + b.Addr() + " {\n\tgroup billing\n}": `grpc_health: no grpc_proxy in the configuration has the group "orders"; the groups are billing, users`,
		"grpc_health users\ngrpc_proxy " + b.Addr(): `grpc_health: no grpc_proxy in the configuration has the group "users"; no grpc_proxy has a group; give it one with ` + "`group users` in its block",
	} {
		if err := p.Load(site); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: error %v, want %s", site, err, want)
		}
	}
	if got := c.check("users"); got != "SERVING" {
		t.Errorf("users is %s after configurations that were refused", got)
	}
	w.quiet()
	b.Health.SetServingStatus("", notServing)
	w.next("NOT_SERVING")
}

// TestGRPCHealthExit: when Caddy exits, answers are NOT_SERVING at once, while calls are still taken for the shutdown delay,
// so that balancers in front turn away; then Watches end and do not hold up the exit.
func TestGRPCHealthExit(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	site := "grpc_proxy " + b.Addr() + " {\n\thealth_check grpc\n}\ngrpc_health"
	cmd, addr, _ := startCaddy(t, "\tshutdown_delay 4s\n", site)
	c := askHealth(t, addr)
	c.becomes("", "SERVING")
	w := c.watch("")
	w.next("SERVING")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	w.next("NOT_SERVING")
	told := time.Now()
	if got := c.check(""); got != "NOT_SERVING" {
		t.Errorf("during the shutdown delay, Check says %s", got)
	}
	if _, err := client(t, addr).EmptyCall(within(t, long), new(testgrpc.Empty)); err != nil {
		t.Errorf("a call in the shutdown delay: %v", err)
	}
	w.next("code = Unavailable desc = the proxy is shutting down")
	if d := time.Since(told); d < time.Second {
		t.Errorf("the Watch ended %v after the news; the shutdown delay is 4s", d)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("Caddy left with %v", err)
	}
	t.Logf("Caddy left %v after the news", time.Since(told))
}

// TestGRPCHealthExitAfterReload: a Watch that began before a reload does not hold up the exit either.
func TestGRPCHealthExitAfterReload(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{})
	admin := proxytest.FreeAddress(t)
	site := "grpc_proxy " + b.Addr() + " {\n\thealth_check grpc\n}\n"
	cmd, addr, _ := startCaddy(t, "\tadmin "+admin+"\n", site+"grpc_health")
	c := askHealth(t, addr)
	c.becomes("", "SERVING")
	w := c.watch("")
	w.next("SERVING")
	// The new configuration has no grpc_health.
	text := "{\n\tadmin " + admin + "\n\tpersist_config off\n}\nhttp://" + addr + " {\n" + site + "}\n"
	r, err := http.Post("http://"+admin+"/load", "text/caddyfile", strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		msg, _ := io.ReadAll(r.Body)
		t.Fatalf("reload: %s %s", r.Status, msg)
	}
	w.quiet()
	begin := time.Now()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	w.next("NOT_SERVING")
	w.next("code = Unavailable desc = the proxy is shutting down")
	if err := cmd.Wait(); err != nil {
		t.Fatalf("Caddy left with %v", err)
	}
	t.Logf("Caddy left after %v", time.Since(begin))
	if d := time.Since(begin); d > 20*time.Second {
		t.Errorf("the exit took %v", d)
	}
}
