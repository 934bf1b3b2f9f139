package upstream

import "github.com/caddyserver/caddy/v2"

// Pool holds values that outlive one configuration, counted by use. A value is destructed when its last lease is
// released. The zero value is not usable; use NewPool.
type Pool[T caddy.Destructor] struct{ values *caddy.UsagePool }

// NewPool returns an empty pool.
func NewPool[T caddy.Destructor]() *Pool[T] { return &Pool[T]{values: caddy.NewUsagePool()} }

// References tells how many leases hold the key, and whether the pool has it at all.
func (p *Pool[T]) References(key string) (int, bool) { return p.values.References(key) }

// Range calls f for each value until it returns false.
func (p *Pool[T]) Range(f func(key string, value T) bool) {
	p.values.Range(func(k, v any) bool { return f(k.(string), v.(T)) })
}

// Lease remembers which entries of a pool one module instance holds, so that it gives back exactly what it took: Caddy
// calls Cleanup also when Provision failed half way, and giving back more would pull the entries from under the
// configuration that is running.
type Lease[T caddy.Destructor] struct {
	pool *Pool[T]
	keys []string
}

// NewLease returns a lease on the pool that holds nothing yet. It is not safe for concurrent use.
func (p *Pool[T]) NewLease() *Lease[T] { return &Lease[T]{pool: p} }

// Acquire returns the value for the key, made by create if the pool has none, and records the reference.
func (l *Lease[T]) Acquire(key string, create func() (T, error)) (T, error) {
	v, _, err := l.pool.values.LoadOrNew(key, func() (caddy.Destructor, error) { return create() })
	if err != nil {
		var zero T
		return zero, err
	}
	l.keys = append(l.keys, key)
	return v.(T), nil
}

// Shared tells whether somebody else holds one of the entries as well.
func (l *Lease[T]) Shared() bool {
	for _, k := range l.keys {
		if n, _ := l.pool.References(k); n > 1 {
			return true
		}
	}
	return false
}

// Release gives back what Acquire took. It may be called more than once, and on a nil lease.
func (l *Lease[T]) Release() {
	if l == nil {
		return
	}
	for _, k := range l.keys {
		_, _ = l.pool.values.Delete(k)
	}
	l.keys = nil
}
