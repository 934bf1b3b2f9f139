package selection

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Hashing is what all policies have in common that send calls with the same key to the same endpoint.
type Hashing struct {
	// Where the key comes from. Several sources are combined; one that a call lacks is passed over. At least one is
	// needed.
	Keys []HashKey `json:"keys,omitempty"`

	// The policy for calls that have no key at all. Default: any endpoint, as if the key were random.
	FallbackRaw json.RawMessage `json:"fallback,omitempty" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`

	hashing
}

func (h *Hashing) provision(ctx caddy.Context) error {
	return h.hashing.provision(ctx, h.Keys, h, h.FallbackRaw)
}

// hashing is what is made of the configuration.
type hashing struct {
	nested // The fallback, if there is one.

	from sources
}

// provision checks the keys and loads the fallback from the field FallbackRaw of the module.
func (h *hashing) provision(ctx caddy.Context, keys []HashKey, module any, fallback json.RawMessage) (err error) {
	if h.from, err = newSources(keys); err != nil {
		return err
	}
	if fallback != nil {
		if err := h.load(ctx, module, "FallbackRaw"); err != nil {
			return fmt.Errorf("fallback: %w", err)
		}
	}
	return nil
}

// KeyHash implements [Keyed].
func (h *hashing) KeyHash(c *call.Call) (uint64, bool) { return h.from.hash(c) }

// unmarshal reads the policy's name, a key on the same line, and the block; more are the policy's own options.
func (h *Hashing) unmarshal(d *caddyfile.Dispenser, more options) error {
	d.Next() // The policy's name.
	name := d.Val()
	key := func(d *caddyfile.Dispenser) error {
		k, err := parseKey(d)
		h.Keys = append(h.Keys, k)
		return err
	}
	if d.NextArg() {
		d.Prev()
		if err := key(d); err != nil {
			return err
		}
	}
	words := options{"key": key, "fallback": policyOption(&h.FallbackRaw)}
	maps.Copy(words, more)
	return words.parse(d, name, "key")
}

// hashed is what the pickers of these policies have in common.
type hashed struct {
	candidates
	from     sources
	fallback Picker // Nil: calls without a key get a random one.
	others   interests
}

func (h *hashing) hashed(s *upstream.Snapshot) hashed {
	p := hashed{candidates: newCandidates(s), from: h.from}
	if h.child != nil {
		p.fallback = h.child.Build(s)
		p.others = interestsOf(p.fallback)
	}
	return p
}

// result is what a picker returns for the place that it chose, by a key or without one. The fallback may be interested in it.
func (p *hashed) result(place int, ok, keyed bool) (Pick, bool) {
	if !ok {
		return Pick{}, false
	}
	pick := p.others.in(p.index(place))
	pick.AnyWillDo = !keyed
	return pick, true
}

// Interests implements [Interested].
func (p *hashed) Interests(f func(Pick)) { Interests(p.fallback, f) }

// hashOrder returns the places of the endpoints in the order of their hash keys, and these: what is built of them does
// not depend on the order in which a source names them.
func hashOrder(s *upstream.Snapshot) (order []int32, keys []string) {
	order, keys = make([]int32, len(s.Endpoints)), make([]string, len(s.Endpoints))
	for i := range s.Endpoints {
		order[i], keys[i] = int32(i), s.Endpoints[i].HashKey()
	}
	slices.SortFunc(order, func(a, b int32) int {
		return cmp.Or(strings.Compare(keys[a], keys[b]), strings.Compare(s.Endpoints[a].Address, s.Endpoints[b].Address))
	})
	return order, keys
}

// maxWalk is how many entries of a ring or table are looked at for an open endpoint. If a tenth of the endpoints are
// open, one call in 10^11 finds none there.
const maxWalk = 256

// wheel is a circular list of places.
type wheel struct {
	hashed
	slots []int32
	bound *bound // Nil without bounded load.
}

// walk returns the first open endpoint from the slot on that has room for one more call.
func (w *wheel) walk(slot int, h uint64, in *PickInfo) (place int, ok bool) {
	var all sums
	if w.bound != nil {
		all = w.bound.sums(&w.candidates)
	}
	for range min(len(w.slots), maxWalk) {
		place := int(w.slots[slot])
		if w.open(place, in) && (w.bound == nil || w.bound.room(all, place, w.states[place].Active())) {
			return place, true
		}
		if slot++; slot == len(w.slots) {
			slot = 0
		}
	}
	return w.search(all, h, in)
}

// search looks at all endpoints, when an open one with room was looked for in vain where the key would have it. Among
// several the one with the highest rank for the key is picked; if all are full, the one with the least load.
func (w *wheel) search(all sums, h uint64, in *PickInfo) (place int, ok bool) {
	var (
		spare   int
		spared  bool
		highest uint64
	)
	for i, s := range w.states {
		switch r := mix(h ^ uint64(i)<<32); {
		case !w.open(i, in):
		case w.bound == nil || w.bound.room(all, i, s.Active()):
			if !ok || r > highest {
				place, highest, ok = i, r, true
			}
		case !spared || w.bound.less(w.states, i, spare):
			spare, spared = i, true
		}
	}
	if !ok {
		return spare, spared
	}
	return place, true
}

// mix makes a hash of a number of which any bit may differ from that of another: the finalizer of SplitMix64 (Steele, Lea
// and Flood, "Fast splittable pseudorandom number generators", 2014).
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
