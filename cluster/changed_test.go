package cluster

import (
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Whoever reports on a handler's health is told of each change of a condition, though the calls' view stays, of services
// and of new lists; and of nothing after the end.
func TestChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told atomic.Int64
		src := newScript()
		f := start(t, Config{Sources: dynamic(src, t), Changed: func() { told.Add(1) }})
		sink := <-src.sinks
		sink.Update(endpoints(1))
		settle()
		s := f.View().Endpoints[0].State
		for _, step := range []struct {
			name string
			do   func()
		}{
			{"unhealthy", func() { s.Set(upstream.Unhealthy) }},
			{"draining besides", func() { s.Drain("") }},
			{"a service", func() { s.SetNotServing("a") }},
			{"no service", func() { s.SetNotServing() }},
			{"not draining", func() { s.Undrain() }},
			{"healthy", func() { s.Clear(upstream.Unhealthy) }},
			{"a new list", func() { sink.Update(endpoints(1, 2)); settle() }},
		} {
			before := told.Load()
			step.do()
			if told.Load() == before {
				t.Errorf("%s: not told", step.name)
			}
		}
		f.Close()
		before := told.Load()
		s.Set(upstream.Ejected)
		if told.Load() != before {
			t.Error("told after the end")
		}
		s.Clear(upstream.Ejected)
	})
}
