package grpcproxy

import (
	"fmt"
	"sync"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// leastStreamMemory is below what a few streams need.
const leastStreamMemory = 1 << 20

// streamMemory is what handlers let all streams of the process hold together. It is the process's, so during a reload the
// handlers of two configurations count, and the largest limit holds.
var streamMemory = struct {
	mu     sync.Mutex
	limits map[*Handler]int64
}{limits: make(map[*Handler]int64)}

// limitStreamMemory makes the handler's limit count, or, with 0, count no more.
func (h *Handler) limitStreamMemory(n int64) {
	m := &streamMemory
	m.mu.Lock()
	defer m.mu.Unlock()
	if n > 0 {
		m.limits[h] = n
	} else if _, ok := m.limits[h]; ok {
		delete(m.limits, h)
	} else {
		return
	}
	var most int64
	for _, n := range m.limits {
		most = max(most, n)
	}
	if most == 0 {
		most = h2.DefaultBudgetLimit
	}
	h2.ProcessBudget.SetLimit(most)
}

func (h *Handler) validateStreamMemory() error {
	if n := h.StreamMemoryLimit; n < 0 || n > 0 && n < leastStreamMemory {
		return fmt.Errorf("stream_memory_limit is %d; write at least %d bytes (1MiB), or leave it out for 256MiB", n, leastStreamMemory)
	}
	return nil
}
