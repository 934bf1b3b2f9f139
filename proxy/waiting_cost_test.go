//go:build !race

package proxy

import (
	"syscall"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
)

// cpu is how much time the processors have spent on this process.
func cpu(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// crowd is 10,000 calls that wait for 1,000 endpoints which refuse connections, as with lb_try_duration. It returns what it has cost
// until all of them wait, and has measure tell what it costs, in processors, that they wait for so long.
func crowd(tb testing.TB) (arrival time.Duration, measure func(d time.Duration) float64) {
	tb.Helper()
	const calls, endpoints = 10_000, 1000
	p := proxyOf(tb, dead(tb, endpoints), new(selection.RoundRobin), Config{TryDuration: time.Hour, TryInterval: 250 * time.Millisecond})
	flights := make([]*Flight, calls)
	before := cpu(tb)
	for i := range flights {
		flights[i] = new(Flight)
		serve(p, flights[i])
	}
	for _, f := range flights {
		eventually(tb, "a call does not wait", func() bool {
			return quiet(f, func() bool { return f.choice.waiting && f.choice.waiter.Wish == cluster.Usable })
		})
	}
	arrival = cpu(tb) - before
	tb.Cleanup(func() { p.EndAll(ClientGone()) })
	return arrival, func(d time.Duration) float64 {
		before, begin := cpu(tb), time.Now()
		time.Sleep(d)
		if n := p.Running(); n != calls {
			tb.Errorf("%d calls wait", n)
		}
		return (cpu(tb) - before).Seconds() / time.Since(begin).Seconds()
	}
}

// BenchmarkWaiting reports the processors that waiting takes, and the processor's seconds until all calls wait.
func BenchmarkWaiting(b *testing.B) {
	arrival, measure := crowd(b)
	var cost float64
	n := 0
	for b.Loop() {
		cost += measure(time.Second)
		n++
	}
	b.ReportMetric(cost/float64(n), "processors")
	b.ReportMetric(arrival.Seconds(), "arrival-cpu-s")
}
