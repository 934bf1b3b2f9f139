package selection

import (
	"cmp"
	"fmt"
	"math/big"
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(Maglev)) }

const (
	defaultTable = 65_537
	maxTable     = 5_000_011
)

// Maglev sends calls with the same key to the same endpoint. It is quicker than `ring_hash` and its shares are more
// even, but when an endpoint comes or goes, a few keys of other endpoints move too.
//
// The endpoints take turns in filling a table, each in an order of its own, and a call looks its endpoint up by the hash
// of its key ("Maglev: A Fast and Reliable Software Network Load Balancer", Eisenbud and others, 2016; Envoy's form of
// it, with weights). The entry `hash_key` of an endpoint's metadata stands for its address.
type Maglev struct {
	Hashing

	// The number of the table's entries, 4 bytes each: a prime number up to 5000011, which should be at least a hundred
	// times the number of endpoints. Default: `65537`.
	TableSize uint64 `json:"table_size,omitempty"`

	// Let no endpoint have more calls in flight than so many percent of the average, at least 100; a call goes on to the
	// endpoint of the table's next entry instead. It keeps a popular key from overloading one endpoint. Usual are 120 to
	// 200. Default: `0`, no such limit.
	BalanceFactor int `json:"balance_factor,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*Maglev) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "maglev", New: func() caddy.Module { return new(Maglev) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy maglev [<source> [<name>]] {
//	    key            <source> [<name>] [terminal]
//	    fallback       <policy> ...
//	    table_size     <entries>
//	    balance_factor <percent>
//	}
//
// The sources are those of [HashKey]; key may be repeated.
func (p *Maglev) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return p.unmarshal(d, options{
		"table_size":     numberOption(&p.TableSize),
		"balance_factor": percentOption(&p.BalanceFactor),
	})
}

// Provision implements caddy.Provisioner.
func (p *Maglev) Provision(ctx caddy.Context) error { return p.provision(ctx) }

// Validate implements caddy.Validator.
func (p *Maglev) Validate() error {
	if p.TableSize > maxTable {
		return fmt.Errorf("table_size: %d is above the largest table, %d", p.TableSize, maxTable)
	}
	if p.TableSize != 0 && !isPrime(p.TableSize) {
		next := p.TableSize + 1
		for !isPrime(next) {
			next++
		}
		return fmt.Errorf("table_size: %d is not a prime number; the next one is %d", p.TableSize, next)
	}
	return checkBalanceFactor(p.BalanceFactor)
}

// isPrime is exact below 2^64.
func isPrime(n uint64) bool { return new(big.Int).SetUint64(n).ProbablyPrime(0) }

// Build implements [Policy].
func (p *Maglev) Build(s *upstream.Snapshot) Picker {
	m := &maglev{wheel{hashed: p.hashed(s), bound: newBound(p.BalanceFactor, s)}}
	m.slots = newTable(s, int(cmp.Or(p.TableSize, defaultTable)))
	return m
}

// newTable fills the table (listing 1 of the paper): whoever's turn it is takes the first entry of its permutation that
// is free. The permutation of an endpoint is offset + i × skip mod size, by XXH64 of its key with the seeds 0 and 1, as
// in Envoy's maglev_lb.cc.
//
// An endpoint with the weight w has its k-th turn in round ceil(k × greatest / w), as there, so each gets one in the
// first round. Who comes in a round is kept in a list per round: with weights far apart there are many rounds, and nobody
// asks all endpoints in each.
func newTable(s *upstream.Snapshot, size int) []int32 {
	n := len(s.Endpoints)
	if n == 0 {
		return nil
	}
	order, keys := hashOrder(s)
	type filler struct {
		at, skip      int
		turns, weight int64
		place         int32
		next          int32 // in the list of the same round
	}
	fillers := make([]filler, n)
	greatest := int64(0)
	seeded := xxhash.NewWithSeed(1)
	for i, place := range order {
		seeded.ResetWithSeed(1)
		_, _ = seeded.WriteString(keys[place])
		fillers[i] = filler{
			at:     int(xxhash.Sum64String(keys[place]) % uint64(size)),
			skip:   int(seeded.Sum64()%uint64(max(size-1, 1))) + 1,
			weight: int64(s.Endpoints[place].EffectiveWeight()),
			place:  place,
			next:   int32(i) + 1,
		}
		greatest = max(greatest, fillers[i].weight)
	}
	const none = -1
	fillers[n-1].next = none
	// The endpoint with the greatest weight fills an entry in every round, so there are no more rounds than entries.
	lists := make([]int32, size+2)
	for i := range lists {
		lists[i] = none
	}
	lists[1] = 0
	table := make([]int32, size)
	for i := range table {
		table[i] = none
	}
	var turn []int32
	for round, filled := int64(1), 0; ; round++ {
		turn = turn[:0]
		for i := lists[round]; i != none; i = fillers[i].next {
			turn = append(turn, i)
		}
		slices.Sort(turn)
		for _, i := range turn {
			f := &fillers[i]
			for table[f.at] != none {
				if f.at += f.skip; f.at >= size {
					f.at -= size
				}
			}
			table[f.at] = f.place
			if filled++; filled == size {
				return table
			}
			f.turns++
			if next := max(round+1, (f.turns*greatest+f.weight-1)/f.weight); next <= int64(size) {
				f.next, lists[next] = lists[next], i
			}
		}
	}
}

type maglev struct{ wheel }

// Pick implements [Picker].
func (p *maglev) Pick(in PickInfo) (Pick, bool) {
	h, keyed := p.from.hash(in.Call)
	if !keyed {
		if p.fallback != nil {
			return p.fallback.Pick(in)
		}
		h = randUint64()
	}
	if len(p.slots) == 0 {
		return Pick{}, false
	}
	place, ok := p.walk(int(h%uint64(len(p.slots))), h, &in)
	return p.result(place, ok, keyed)
}

var (
	_ Policy                = (*Maglev)(nil)
	_ Keyed                 = (*Maglev)(nil)
	_ HealthWatcher         = (*Maglev)(nil)
	_ LoadReportReceiver    = (*Maglev)(nil)
	_ caddy.Provisioner     = (*Maglev)(nil)
	_ caddy.Validator       = (*Maglev)(nil)
	_ caddyfile.Unmarshaler = (*Maglev)(nil)
)
