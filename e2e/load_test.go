package e2e

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
)

// callers make unary calls, one after the other each, until they are stopped.
type callers struct {
	stopped chan struct{}
	wg      sync.WaitGroup
	calls   atomic.Int64

	mu       sync.Mutex
	failures []failedCall
}

type failedCall struct {
	start time.Time
	err   error
}

func startCallers(t *testing.T, n int, c testgrpc.TestServiceClient) *callers {
	t.Helper()
	l := &callers{stopped: make(chan struct{})}
	ctx := within(t, time.Minute)
	for range n {
		l.wg.Go(func() {
			for {
				select {
				case <-l.stopped:
					return
				default:
				}
				start := time.Now()
				if _, err := c.EmptyCall(ctx, &testgrpc.Empty{}); err != nil {
					l.mu.Lock()
					l.failures = append(l.failures, failedCall{start, err})
					l.mu.Unlock()
				}
				l.calls.Add(1)
			}
		})
	}
	t.Cleanup(func() { l.stop() })
	return l
}

// more waits until so many further calls have been made.
func (l *callers) more(t *testing.T, n int64) {
	t.Helper()
	target := l.calls.Load() + n
	eventually(t, "the callers go on", func() bool { return l.calls.Load() >= target })
}

// stop ends the callers and returns the calls that failed.
func (l *callers) stop() []failedCall {
	l.mu.Lock()
	select {
	case <-l.stopped:
	default:
		close(l.stopped)
	}
	l.mu.Unlock()
	l.wg.Wait()
	return l.failures
}

// served waits until the backend has been called so many times.
func served(t *testing.T, b *backendtest.Backend, n int64) {
	t.Helper()
	start := time.Now()
	eventually(t, b.Name()+" gets traffic", func() bool { return b.Calls().Total() >= n })
	t.Logf("%s has %d calls after %v", b.Name(), b.Calls().Total(), time.Since(start).Round(time.Millisecond))
}

// spread makes n calls from so many callers and returns how many each backend got.
func spread(t *testing.T, c testgrpc.TestServiceClient, n, concurrent int, backends ...*backendtest.Backend) []int64 {
	t.Helper()
	before := make([]int64, len(backends))
	for i, b := range backends {
		before[i] = b.Calls().Total()
	}
	ctx := within(t, 30*time.Second)
	var left atomic.Int64
	left.Store(int64(n))
	var wg sync.WaitGroup
	for range concurrent {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if _, err := c.EmptyCall(ctx, &testgrpc.Empty{}); err != nil {
					t.Errorf("a call failed: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	got := make([]int64, len(backends))
	for i, b := range backends {
		got[i] = b.Calls().Total() - before[i]
	}
	t.Logf("%d calls from %d callers: %v", n, concurrent, got)
	return got
}
