package selection

import (
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(RoundRobin)) }

// RoundRobin picks the endpoints in turn. Each gets the same number of calls, or as many as its weight says where the
// upstreams have weights, whatever the calls cost; where calls differ a lot, or endpoints do, `least_request` is the better
// choice.
//
// The turns of an endpoint with a large weight are spread among those of the others. They begin anywhere, and anew when
// the endpoints change: else many proxies that start together would all send their first call to the first endpoint.
type RoundRobin struct{}

// CaddyModule returns the Caddy module information.
func (*RoundRobin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "round_robin", New: func() caddy.Module { return new(RoundRobin) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy round_robin
func (*RoundRobin) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return parseAlone(d) }

// Build implements [Policy].
func (*RoundRobin) Build(s *upstream.Snapshot) Picker { return newRoundRobin(newWeighted(s)) }

func newRoundRobin(c candidates) *roundRobin {
	p := &roundRobin{candidates: c}
	switch {
	case c.shares != nil:
		p.begin(int(c.shares.total))
	case c.len() > 0:
		p.begin(c.len())
	}
	return p
}

// cacheLine is at least the size of a cache line on the machines we know.
const cacheLine = 128

// roundRobin gives turns: where all weigh the same, turn t is that of the endpoint at place t mod n. A call takes the next
// turn.
//
// If that endpoint is closed, its turn is lost, and those of the closed ones behind it: the call claims the first turn
// that is an open endpoint's, and the next call begins behind that. If calls just went on to the next open endpoint
// without claiming its turn, that one would serve the closed one's calls besides its own, twice its share. This way all
// open endpoints get the same, even as calls come at the same time.
//
// A call that finds no open endpoint gives its turn back: a call asks several times, for a connected endpoint first, and
// would take the turns of endpoints that are still being connected to.
type roundRobin struct {
	candidates

	_    [cacheLine]byte // All calls write next; what all of them read should not share its line.
	next atomic.Uint64
	_    [cacheLine]byte
}

// begin makes the turns begin at one of the first n, as grpc-go does.
func (p *roundRobin) begin(n int) { p.next.Store(uint64(randN(n))) }

const (
	// maxTurns bounds how many turns of closed endpoints a call takes before it looks at all endpoints.
	maxTurns = 32
	// maxRaces bounds how many turns a call finds that others claim before it.
	maxRaces = 1000
)

// Pick implements [Picker].
func (p *roundRobin) Pick(in PickInfo) (Pick, bool) {
	if p.shares != nil {
		return p.result(p.takeByShare(p.shares, &in))
	}
	return p.result(p.takeInTurn(&in))
}

// takeByShare takes turns until one is an open endpoint's.
func (p *roundRobin) takeByShare(s *shares, in *PickInfo) (place int, ok bool) {
	turn := uint64(0)
	for range maxTurns {
		turn = p.next.Add(1) - 1
		if i := s.turn(turn); p.open(i, in) {
			return i, true
		}
	}
	c := p.candidates
	c.shares = s
	if place, ok = c.scan(in); !ok { // Out of turn.
		p.next.CompareAndSwap(turn+1, turn+1-maxTurns)
	}
	return place, ok
}

func (p *roundRobin) takeInTurn(in *PickInfo) (place int, ok bool) {
	n := p.len()
	if n == 0 {
		return 0, false
	}
	found := 0
	for range maxRaces {
		turn := p.next.Add(1) - 1
		i := int(turn % uint64(n))
		if p.open(i, in) {
			return i, true
		}
		ahead, ok := p.ahead(i, in)
		if !ok {
			p.next.CompareAndSwap(turn+1, turn) // Unless others have gone on from there.
			return 0, false
		}
		found = (i + ahead) % n
		if p.next.CompareAndSwap(turn+1, turn+1+uint64(ahead)) {
			return found, true
		}
	}
	return found, true // Out of turn.
}

// ahead tells how many steps the next open endpoint is away from i.
func (p *roundRobin) ahead(i int, in *PickInfo) (steps int, ok bool) {
	for steps := 1; steps < p.len(); steps++ {
		if p.open((i+steps)%p.len(), in) {
			return steps, true
		}
	}
	return 0, false
}

var (
	_ Policy                = (*RoundRobin)(nil)
	_ caddyfile.Unmarshaler = (*RoundRobin)(nil)
)
