package selection

import (
	"fmt"
	"slices"
	"testing"

	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// plainTable fills a table as listing 1 of the paper and Envoy say it, asking every endpoint in every round.
func plainTable(s *upstream.Snapshot, size int) []int32 {
	order, keys := hashOrder(s)
	greatest := uint32(0)
	for i := range s.Endpoints {
		greatest = max(greatest, s.Endpoints[i].EffectiveWeight())
	}
	next, target := make([]uint64, len(order)), make([]float64, len(order))
	table := slices.Repeat([]int32{-1}, size)
	for round, filled := 1, 0; ; round++ {
		for i, place := range order {
			w := float64(s.Endpoints[place].EffectiveWeight())
			if float64(round)*w < target[i] {
				continue
			}
			target[i] += float64(greatest)
			d := xxhash.NewWithSeed(1)
			_, _ = d.WriteString(keys[place])
			offset, skip := xxhash.Sum64String(keys[place])%uint64(size), d.Sum64()%uint64(size-1)+1
			for {
				at := (offset + skip*next[i]) % uint64(size)
				next[i]++
				if table[at] < 0 {
					table[at] = place
					break
				}
			}
			if filled++; filled == size {
				return table
			}
		}
	}
}

func TestMaglevTable(t *testing.T) {
	for _, tt := range []struct{ n, size int }{{1, 2}, {1, 13}, {5, 13}, {13, 13}, {20, 13}, {3, 251}, {40, 1009}} {
		for name, weight := range map[string]func(i int) uint32{
			"equal":     func(int) uint32 { return 7 },
			"different": func(i int) uint32 { return uint32(i%5) + 1 },
			"far apart": func(i int) uint32 { return []uint32{1, 1000, 65_535}[i%3] },
		} {
			s := parted(tt.n, func(e *upstream.Endpoint) { e.Weight = weight(e.Index) })
			got, want := newTable(s, tt.size), plainTable(s, tt.size)
			if !slices.Equal(got, want) {
				t.Errorf("%d endpoints of %s weights in %d entries: %v, want %v", tt.n, name, tt.size, got, want)
			}
		}
	}
}

// Weights far apart make many rounds.
func BenchmarkMaglevTable(b *testing.B) {
	for name, weight := range map[string]func(i int) uint32{
		"equal":     func(int) uint32 { return 1 },
		"far apart": func(i int) uint32 { return max(1, 65_535*uint32(1-min(i, 1))) },
	} {
		s := parted(10_000, func(e *upstream.Endpoint) {
			e.Weight, e.Address = weight(e.Index), fmt.Sprintf("10.0.%d.%d:1", e.Index/250, e.Index%250)
		})
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				newTable(s, defaultTable)
			}
		})
	}
}
