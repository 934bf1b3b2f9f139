package cluster

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// choosy uses the first two endpoints, or all if none of them is usable.
type choosy struct{ selection.RoundRobin }

func (*choosy) Uses(s *upstream.Snapshot) []int {
	if len(s.Endpoints) <= 2 || !s.Endpoints[0].State.Usable() && !s.Endpoints[1].State.Usable() {
		return nil
	}
	return []int{0, 1}
}

func (*choosy) WatchesHealth() bool { return true }

// Only endpoints that the policy uses have companions.
func TestUses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		running := map[string]int{}
		count := func(addr string, n int) {
			mu.Lock()
			defer mu.Unlock()
			if running[addr] += n; running[addr] == 0 {
				delete(running, addr)
			}
		}
		src := newScript()
		f := start(t, Config{
			Sources: dynamic(src, t), Policy: new(choosy), Panics: func(usable, all int) bool { return 2*usable < all },
			Companions: []Companion{func(e *upstream.Endpoint, _ *transport.Endpoint) func() {
				addr := strings.TrimPrefix(e.Address, "127.0.0.1:")
				count(addr, 1)
				return func() { count(addr, -1) }
			}},
		})
		expect := func(what, want string) {
			t.Helper()
			settle()
			mu.Lock()
			defer mu.Unlock()
			var got []string
			for _, addr := range slices.Sorted(maps.Keys(running)) {
				got = append(got, addr)
				if running[addr] != 1 {
					t.Errorf("%s: %s has %d companions", what, addr, running[addr])
				}
			}
			if fmt.Sprint(got) != "["+want+"]" {
				t.Errorf("%s: companions %v, want %s", what, got, want)
			}
		}
		state := func(i int) *upstream.State { return f.View().Snapshot.Endpoints[i].State }
		sink := <-src.sinks
		sink.Update(endpoints(1, 2, 3, 4))
		expect("at the start", "1 2")
		state(0).SetUsable(false)
		expect("with one that is usable", "1 2")
		if f.View().Panic {
			t.Error("panic with one of the two that are used")
		}
		state(1).SetUsable(false)
		if f.reconsider(); !f.View().Panic {
			t.Error("no panic with none of the two that are used")
		}
		expect("with none", "1 2 3 4")
		if f.View().Panic {
			t.Error("panic with two of four that are used")
		}
		state(1).SetUsable(true)
		expect("with one again", "1 2")
		sink.Update(endpoints(2, 3, 4))
		expect("with a new one in use", "1 2 3") // 1 may still have calls
		sink.Update(endpoints(4, 1, 2, 3))
		expect("in another order", "1 4")
		sink.Update(endpoints(4))
		time.Sleep(2 * memoryTime)
		expect("with one that is left", "4")
		f.Close()
		expect("at the end", "")
	})
}
