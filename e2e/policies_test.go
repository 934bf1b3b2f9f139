package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// asked makes a call with metadata, names and values in turn, and returns which backend answered, and with what header.
func asked(t *testing.T, c testgrpc.TestServiceClient, kv ...string) (backend string, header metadata.MD) {
	t.Helper()
	_, err := c.EmptyCall(metadata.AppendToOutgoingContext(within(t, timeout), kv...), new(testgrpc.Empty), grpc.Header(&header))
	if err != nil {
		t.Fatal(err)
	}
	if v := header[backendtest.KeyBackend]; len(v) == 1 {
		return v[0], header
	}
	t.Fatalf("no backend in %v", header)
	return "", nil
}

// TestHashMoves: calls of one key go to one backend, and when a backend comes or goes, only the keys that must move do, or with
// ring_hash and maglev not many others.
func TestHashMoves(t *testing.T) {
	for _, policy := range []string{"ring_hash header x-user", "maglev header x-user", "rendezvous header x-user", "header x-user"} {
		t.Run(policy, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			const keys = 300
			backends := start(t, 5)
			l, name := newList(t)
			l.backends(backends[:4]...)
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic told " + name + "\n\tlb_policy " + policy + "\n}"})
			c := client(t, p.H2C)
			home := func(i int) string {
				at, _ := asked(t, c, "x-user", fmt.Sprint("user-", i))
				return at
			}
			homes := func() []string {
				out := make([]string, keys)
				for i := range out {
					out[i] = home(i)
				}
				return out
			}
			before := homes()
			again := homes()
			counts := map[string]int{}
			for i := range before {
				if before[i] != again[i] {
					t.Fatalf("key %d went to %s and then to %s", i, before[i], again[i])
				}
				counts[before[i]]++
			}
			t.Logf("keys per backend: %v", counts)
			for _, b := range backends[:4] {
				if n := counts[b.Name()]; n < keys/4/2 || n > keys/4*2 {
					t.Errorf("%s has %d of %d keys", b.Name(), n, keys)
				}
			}
			// moved counts the keys that moved although they did not have to.
			moved := func(old, now []string, gone, came string) (must, needless int) {
				for i := range old {
					switch {
					case old[i] == now[i]:
					case old[i] == gone || now[i] == came:
						must++
					default:
						needless++
					}
				}
				return must, needless
			}
			l.backends(backends...)
			served(t, backends[4], 0)
			next := 0
			eventually(t, "the new one has keys", func() bool { next++; return home(next%keys) == "b4" })
			after := homes()
			must, needless := moved(before, after, "", "b4")
			t.Logf("one more: %d keys moved to it, %d others", must, needless)
			limit := 0
			switch {
			case strings.HasPrefix(policy, "maglev"):
				limit = keys / 20 // Maglev's disruption is small, not nothing
			case strings.HasPrefix(policy, "ring_hash"):
				limit = keys / 4 // a tenth, since the others have 205 points then instead of 256
			}
			if needless > limit {
				t.Errorf("%d keys moved needlessly", needless)
			}
			l.backends(backends[0], backends[1], backends[3], backends[4])
			one := slices.Index(after, "b2")
			eventually(t, "a key of the one that left moves", func() bool { return home(one) != "b2" })
			if slices.Contains(homes(), "b2") {
				t.Error("the one that left has keys")
			}
		})
	}
}

// TestSticky: a client that sends its cookie back stays where it is, also while its backend drains; others do not go there
// any more. The cookie says nothing of the address.
func TestSticky(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 3)
	l, name := newList(t)
	l.backends(backends...)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic told " + name + "\n\tlb_policy sticky {\n\t\tcookie session\n\t\tsecret s3cret-s3cret-s3cret\n\t\tfallback round_robin\n\t}\n}"})
	c := client(t, p.H2C)
	home, header := asked(t, c)
	cookie := ""
	for _, v := range header["set-cookie"] {
		cookie, _, _ = strings.Cut(v, ";")
	}
	if !strings.HasPrefix(cookie, "session=") {
		t.Fatalf("no cookie in %v", header)
	}
	if strings.Contains(cookie, "127.0.0.1") {
		t.Errorf("the cookie %q names an address", cookie)
	}
	stays := func(what string) {
		t.Helper()
		for range 6 {
			at, header := asked(t, c, "cookie", cookie)
			if at != home || len(header["set-cookie"]) > 0 {
				t.Fatalf("%s: at %s instead of %s, %v", what, at, home, header["set-cookie"])
			}
		}
	}
	stays("at first")
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	stays("after a reload")
	var rest []*backendtest.Backend
	for _, b := range backends {
		if b.Name() != home {
			rest = append(rest, b)
		}
	}
	l.backends(rest...)
	eventually(t, "others go elsewhere", func() bool {
		for range 6 {
			if at, _ := asked(t, c); at == home {
				return false
			}
		}
		return true
	})
	stays("while its backend drains")
	if at, header := asked(t, c, "cookie", "session=forged"); at == home || len(header["set-cookie"]) != 1 {
		t.Errorf("a forged cookie: at %s, %v", at, header["set-cookie"])
	}
}

// TestPriorities: endpoints of the next level are used when those of the first are not enough, gradually.
func TestPriorities(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 4)
	l, name := newList(t)
	list := make([]upstream.Endpoint, len(backends))
	for i, b := range backends {
		list[i] = upstream.Endpoint{Network: "tcp", Address: b.Addr(), Priority: uint32(i / 2)}
	}
	l.set(list)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic told " + name + "\n\tlb_policy round_robin\n\thealth_check grpc\n}"})
	c := client(t, p.H2C)
	// Until it is known of all how they are, calls go where it is known.
	eventually(t, "the spares are not used", func() bool {
		got := spread(t, c, 40, 4, backends...)
		return got[0] == 20 && got[1] == 20
	})
	backends[0].Health.SetServingStatus("", notServing)
	// One of two: 50 % × 1.4 = 70 % of the calls stay.
	eventually(t, "30 % spill over", func() bool {
		got := spread(t, c, 400, 4, backends...)
		spilt := got[2] + got[3]
		return got[0] == 0 && spilt > 80 && spilt < 160
	})
	backends[1].Health.SetServingStatus("", notServing)
	eventually(t, "all go to the spares", func() bool {
		got := spread(t, c, 40, 4, backends...)
		return got[2] == 20 && got[3] == 20
	})
}

// TestHealthSurvivesReload: an upstream that was unhealthy is so for the new configuration from the start.
func TestHealthSurvivesReload(t *testing.T) {
	wiretest.CheckLeaks(t)
	backends := start(t, 2)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + addrs(backends) + " {\n\thealth_mode check\n\thealth_interval 1h\n\tlb_policy round_robin\n}"})
	c := client(t, p.H2C)
	spread(t, c, 20, 2, backends...)
	state := stateOf(t, backends[0].Addr())
	eventually(t, "the first answer is there", state.Usable) // or it would be the newer one
	state.SetWhy(upstream.Unhealthy, "told by the test")
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	if stateOf(t, backends[0].Addr()) != state || state.Usable() {
		t.Fatal("the reload forgot that the upstream is unhealthy")
	}
	begin := time.Now()
	if got := spread(t, client(t, p.H2C), 20, 2, backends...); got[0] != 0 {
		t.Errorf("%v: calls go to it", got)
	}
	t.Logf("after the reload, calls took %v", time.Since(begin))
}
