package cluster

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Calls are counted by address, connections are those of who reaches it in the same way, and health is what those think of it
// who judge it in the same way.
func TestThreeKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reach := func(identity string, conns int) func(*upstream.Endpoint) transport.Config {
			return func(*upstream.Endpoint) transport.Config {
				return transport.Config{Identity: own(t) + identity, MaxConns: conns}
			}
		}
		first := start(t, Config{Static: endpoints(1), Transport: reach("", 1), Health: "a"})
		one := first.View().Endpoints[0]
		one.State.Set(upstream.Ejected)
		one.State.Begin()
		for _, tt := range []struct {
			what         string
			cfg          Config
			conns, state bool // shared
		}{
			{"the same", Config{Transport: reach("", 1), Health: "a"}, true, true},
			{"another max_conns", Config{Transport: reach("", 2), Health: "a"}, true, true},
			{"other checks", Config{Transport: reach("", 1), Health: "b"}, true, false},
			{"other certificates", Config{Transport: reach(" x", 1), Health: "a"}, false, false},
		} {
			tt.cfg.Static = endpoints(1)
			f := start(t, tt.cfg)
			is := f.View().Endpoints[0]
			if shared := is.Endpoint == one.Endpoint; shared != tt.conns {
				t.Errorf("%s: connections shared: %v", tt.what, shared)
			}
			if shared := is.State == one.State; shared != tt.state || is.State.Has(upstream.Ejected) != tt.state {
				t.Errorf("%s: health shared: %v, ejected: %v", tt.what, shared, is.State.Has(upstream.Ejected))
			}
			if n := is.State.Active(); n != 1 {
				t.Errorf("%s: %d calls", tt.what, n)
			}
			f.Close()
		}
		one.State.End()
	})
}

// What is known outlives the configuration, whichever of the keys changes.
func TestReloadForgetsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := func(identity, health string, conns int) Config {
			return Config{
				Static: endpoints(7301), Health: health,
				Transport: func(*upstream.Endpoint) transport.Config {
					return transport.Config{Identity: own(t) + identity, MaxConns: conns}
				},
			}
		}
		before := start(t, cfg("", "a", 1))
		was := before.View().Endpoints[0]
		was.State.Begin()
		was.State.Set(upstream.Ejected)
		reload := func(next Config) Endpoint {
			after := start(t, next)
			before.Close()
			before = after
			return after.View().Endpoints[0]
		}
		if is := reload(cfg("", "a", 2)); is != was || !is.State.Has(upstream.Ejected) {
			t.Error("another max_conns: an ejection is forgotten")
		}
		is := reload(cfg("", "b", 2))
		if is.Endpoint != was.Endpoint || is.State == was.State || is.State.Active() != 1 {
			t.Errorf("other checks: %d calls, the same connections: %v", is.State.Active(), is.Endpoint == was.Endpoint)
		}
		if is = reload(cfg(" x", "b", 2)); is.State.Active() != 1 {
			t.Errorf("other certificates: %d calls", is.State.Active())
		}
		before.Close()
		if is = reload(cfg("", "a", 1)); is.State.Active() != 1 || is.State.Has(upstream.Ejected) {
			t.Errorf("by a configuration that comes when none is there: %d calls", is.State.Active())
		}
		was.State.End()
		if n := is.State.Active(); n != 0 {
			t.Errorf("%d calls when the last has ended", n)
		}
		before.Close()
		left := entries(transport.Pool, "tcp/127.0.0.1:7301 ") + entries(upstream.States, "tcp/127.0.0.1:7301 ")
		if left != 0 {
			t.Errorf("%d entries are left in the pools", left)
		}
	})
}

// entries is how many of a pool's keys begin so.
func entries[T caddy.Destructor](p *upstream.Pool[T], prefix string) (n int) {
	p.Range(func(key string, _ T) bool {
		if strings.HasPrefix(key, prefix) {
			n++
		}
		return true
	})
	return n
}

// That handlers of one configuration differ is logged once, and what holds is the larger number.
func TestMaxConnsDiffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := func(conns int, configuration any) Config {
			return Config{
				Static: endpoints(1, 2, 3), Configuration: configuration,
				Transport: func(*upstream.Endpoint) transport.Config {
					return transport.Config{Identity: own(t), MaxConns: conns}
				},
			}
		}
		lines := func(f *fixture) []int64 {
			var is []int64
			for _, line := range f.logs.FilterMessageSnippet("the largest max_conns holds").All() {
				is = append(is, line.ContextMap()["max_conns"].(int64), line.ContextMap()["other_max_conns"].(int64))
			}
			return is
		}
		small := start(t, cfg(1, "old"))
		large := start(t, cfg(0, "old"))
		if got := lines(large); !slices.Equal(got, []int64{transport.DefaultMaxConns, 1}) {
			t.Errorf("logged %v", got)
		}
		for _, f := range []*fixture{small, start(t, cfg(1, "old")), start(t, cfg(3, "new"))} {
			if f != small {
				f.Close()
			}
		}
		if got := lines(small); len(got) > 0 {
			t.Errorf("the first logs %v", got)
		}
		reloaded := start(t, cfg(3, "new"))
		if got := lines(reloaded); len(got) > 0 {
			t.Errorf("a reload logs %v", got)
		}
	})
}

// Who goes on with an endpoint that somebody else has made gets what he was configured for.
func TestLimitsAreInForceWithTheConfiguration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := New(Config{
			Static: endpoints(1), Policy: new(watchful), Logger: start(t, Config{Static: endpoints(2)}).cfg.Logger,
			Transport: func(*upstream.Endpoint) transport.Config { return transport.Config{Identity: own(t), MaxConns: 5} },
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		running := start(t, Config{
			Static:    endpoints(1),
			Transport: func(*upstream.Endpoint) transport.Config { return transport.Config{Identity: own(t), MaxConns: 2} },
		})
		end := running.View().Endpoints[0]
		if n := end.MaxConns(); n != 2 {
			t.Errorf("%d connections are allowed by a configuration that is not in force", n)
		}
		c.Start()
		if n := end.MaxConns(); n != 5 {
			t.Errorf("%d connections are allowed", n)
		}
		c.Close()
		if n := end.MaxConns(); n != 2 {
			t.Errorf("%d connections are allowed when the other is gone", n)
		}
	})
}
