package healthcheck

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// forgetful is a layer-4 proxy in front of the address that can forget the connections it has: they stay open, and what
// comes on them goes nowhere. New ones work.
func forgetful(t *testing.T, to string) (addr string, forget func(), accepted *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var epoch atomic.Int64
	accepted = new(atomic.Int64)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, in, out)
			mu.Unlock()
			accepted.Add(1)
			mine := epoch.Load()
			pass := func(to io.WriteCloser, from io.Reader) {
				defer to.Close()
				buf := make([]byte, 64<<10)
				for {
					n, err := from.Read(buf)
					if err != nil {
						return
					}
					if epoch.Load() == mine {
						if _, err := to.Write(buf[:n]); err != nil {
							return
						}
					}
				}
			}
			wg.Go(func() { pass(in, out) })
			wg.Go(func() { pass(out, in) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().String(), func() { epoch.Add(1) }, accepted
}

// A connection on which nothing comes any more is replaced: the endpoint may be well.
func TestDeadConnection(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	addr, forget, accepted := forgetful(t, b.Addr())
	end := attend(t, active(t, &Active{Interval: 100 * ms, Timeout: 500 * ms, Fails: 1}, &GRPC{Mode: ModeCheck}), addr)
	eventually(t, "healthy", end.State.Usable)
	forget()
	eventually(t, "unhealthy", func() bool { return end.State.Has(upstream.Unhealthy) })
	eventually(t, "healthy again", end.State.Usable)
	if n := accepted.Load(); n < 2 {
		t.Errorf("%d connections were made", n)
	}
}

// An endpoint that is found to be well is connected to at once, however long calls were to wait with that by then.
func TestGoodCheckEndsBackoff(t *testing.T) {
	for name, p := range map[string]Prober{"grpc": &GRPC{Mode: ModeCheck}, "tcp": new(TCP)} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			b := backendtest.Start(t, backendtest.Options{})
			end := attend(t, active(t, &Active{Interval: 50 * ms, Timeout: 10 * testSecond}, p), b.Addr())
			eventually(t, "healthy", end.State.Usable)
			b.Stop()
			failures := 0 // up to a backoff of ten seconds
			eventually(t, "a long outage", func() bool {
				if !end.Dialing() {
					failures++
					end.Retry()
				}
				return failures > 20 && end.State.Has(upstream.Backoff|upstream.Unhealthy)
			})
			backendtest.Start(t, backendtest.Options{Addr: b.Addr()})
			begin := time.Now()
			eventually(t, "back", func() bool { return end.Conns() > 0 && end.State.Usable() })
			if d := time.Since(begin); d > 6*time.Second { // of eight at least
				t.Errorf("it took %v", d)
			}
		})
	}
}
