package selection

import (
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// newSticky is a policy whose fallback is the first endpoint.
func newSticky(t testing.TB, p Sticky) *Sticky {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	p.FallbackRaw = []byte(`{"policy":"first"}`)
	if err := p.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	return &p
}

// client is one that keeps its cookies, or the token in metadata.
type client struct {
	md  metadata
	tls bool
}

func (c *client) call() *call.Call {
	k := &call.Call{Metadata: c.md}
	if c.tls {
		k.TLS = new(tls.ConnectionState)
	}
	return k
}

// picks makes a call and returns the endpoint and what the answer adds.
func (c *client) picks(t testing.TB, p Picker, tried ...int) (index int, set string) {
	t.Helper()
	k := c.call()
	pick, ok := p.Pick(PickInfo{Call: k, Tried: tried})
	if !ok {
		t.Fatal("nothing picked")
	}
	pick.Annotate(k, func(name, value string) {
		if set != "" {
			t.Error("two fields are added")
		}
		set = value
		if c.md == nil {
			c.md = metadata{}
		}
		if name != "set-cookie" {
			c.md[name] = []string{value}
			return
		}
		cookie, err := http.ParseSetCookie(value)
		if err != nil {
			t.Errorf("%q: %v", value, err)
			return
		}
		c.md["cookie"] = []string{"other=1; " + cookie.Name + "=" + cookie.Value}
	})
	return pick.Index, set
}

func TestStickySession(t *testing.T) {
	for name, p := range map[string]Sticky{
		"cookie":   {},
		"metadata": {Metadata: "x-session"},
		"expiring": {MaxAge: caddy.Duration(time.Hour)},
	} {
		t.Run(name, func(t *testing.T) {
			policy := newSticky(t, p)
			s := parted(5, nil)
			picker := policy.Build(s)
			var c client
			// The first one is taken out of its turn, so that the fallback would choose another one later.
			home, set := c.picks(t, picker, 4, 3)
			if home != 2 || set == "" {
				t.Fatalf("picked %d, set %q", home, set)
			}
			for range 5 {
				if i, set := c.picks(t, picker); i != home || set != "" {
					t.Fatalf("picked %d, set %q", i, set)
				}
			}
			// It has been tried in vain: the client moves and stays there.
			if i, set := c.picks(t, picker, home); i != 4 || set == "" {
				t.Fatalf("picked %d, set %q", i, set)
			}
			if i, set := c.picks(t, picker); i != 4 || set != "" {
				t.Fatalf("picked %d, set %q", i, set)
			}
			// It cannot be used.
			s.Endpoints[0].State.SetUsable(false)
			if i, set := c.picks(t, picker); i != 3 || set == "" {
				t.Fatalf("picked %d, set %q", i, set)
			}
			// Reloads, other snapshots and other numbers change nothing.
			other := parted(9, func(e *upstream.Endpoint) { e.Index = 8 - e.Index })
			if i, set := c.picks(t, newSticky(t, p).Build(other)); i != 5 || set != "" {
				t.Fatalf("picked %d, set %q", i, set)
			}
			// It is gone.
			if i, set := c.picks(t, policy.Build(parted(3, nil))); i != 2 || set == "" {
				t.Fatalf("picked %d, set %q", i, set)
			}
		})
	}
}

// A new client never gets an endpoint that drains; an old one keeps it.
func TestStickyDraining(t *testing.T) {
	policy := newSticky(t, Sticky{})
	s := parted(4, nil)
	var c client
	c.picks(t, policy.Build(s), 3, 2, 1) // It is 0's.
	drained := &upstream.Snapshot{Endpoints: s.Endpoints[:3:3], Draining: s.Endpoints[3:]}
	for i := range drained.Endpoints {
		drained.Endpoints[i].Index = i
	}
	drained.Draining[0].Index = 3
	p := policy.Build(drained)
	if i, set := c.picks(t, p); i != 3 || set != "" {
		t.Errorf("picked %d, set %q; 3 drains", i, set)
	}
	if i, ok := pick(p, PickInfo{Call: new(call.Call), Tried: []int{0, 1, 2}}); ok {
		t.Errorf("a new client was sent to %d", i)
	}
	drained.Draining[0].State.SetUsable(false)
	if i, set := c.picks(t, p); i != 0 || set == "" {
		t.Errorf("picked %d, set %q", i, set)
	}
}

// So it is with one that is drained by hand, which stays in the list.
func TestStickyDrainedByHand(t *testing.T) {
	s := parted(3, nil)
	p := newSticky(t, Sticky{}).Build(s)
	var c client
	c.picks(t, p)
	s.Endpoints[0].State.Drain("test")
	for range 3 {
		if i, set := c.picks(t, p); i != 2 || set != "" {
			t.Errorf("picked %d, set %q", i, set)
		}
		if i, _ := new(client).picks(t, p); i != 1 {
			t.Errorf("a new client was sent to %d", i)
		}
	}
	s.Endpoints[0].State.SetUsable(false)
	if i, ok := pick(p, PickInfo{Call: c.call(), Disregard: upstream.Unhealthy}); !ok || i != 2 {
		t.Errorf("in a panic, picked %d, %v", i, ok)
	}
	if i, set := c.picks(t, p); i != 1 || set == "" {
		t.Errorf("picked %d, set %q", i, set)
	}
}

func TestStickyExpiry(t *testing.T) {
	start := time.Unix(1_800_000_000, 0)
	clock := start
	now = func() time.Time { return clock }
	defer func() { now = time.Now }()
	p := newSticky(t, Sticky{MaxAge: caddy.Duration(time.Hour)}).Build(parted(3, nil))
	var c client
	if _, set := c.picks(t, p, 2); !strings.Contains(set, "Max-Age=3600") {
		t.Errorf("set %q", set)
	}
	steps := []struct {
		at    time.Duration
		want  int
		renew bool
	}{
		{29 * time.Minute, 1, false},
		{31 * time.Minute, 1, true}, // Half of its time is over.
		{60 * time.Minute, 1, false},
		{91 * time.Minute, 2, true}, // Over since the renewal.
	}
	for _, step := range steps {
		clock = start.Add(step.at)
		if i, set := c.picks(t, p); i != step.want || step.renew != (set != "") {
			t.Errorf("after %v: picked %d, set %q", step.at, i, set)
		}
	}
	// Tokens that do not expire are not for a policy where they do, and the other way round they are good.
	var lasting client
	lasting.picks(t, newSticky(t, Sticky{}).Build(parted(3, nil)), 2)
	if i, set := lasting.picks(t, p); i != 2 || set == "" {
		t.Errorf("a token without an end led to %d, set %q", i, set)
	}
	if i, set := lasting.picks(t, newSticky(t, Sticky{}).Build(parted(3, nil)), 1); i != 2 || set != "" {
		t.Errorf("a token with an end led to %d, set %q", i, set)
	}
}

// No byte of a token can be changed, and none is good with another secret.
func TestStickyForged(t *testing.T) {
	for name, maxAge := range map[string]time.Duration{"lasting": 0, "expiring": time.Hour} {
		t.Run(name, func(t *testing.T) {
			policy := newSticky(t, Sticky{Secret: "one", MaxAge: caddy.Duration(maxAge)})
			tokens := policy.minter.mint(parted(3, nil).Endpoints)
			good := tokens.text(1, maxAge)
			if place, _, ok := tokens.find(good, maxAge > 0); !ok || place != 1 {
				t.Fatalf("a good token leads to %d, %v", place, ok)
			}
			raw, err := base64.RawURLEncoding.DecodeString(good)
			if err != nil || len(raw) != tokenSize {
				t.Fatalf("%q: %v", good, err)
			}
			for i := range raw {
				for bit := range 8 {
					raw[i] ^= 1 << bit
					if place, _, ok := tokens.find(base64.RawURLEncoding.EncodeToString(raw), maxAge > 0); ok {
						t.Errorf("byte %d, bit %d changed: it leads to %d", i, bit, place)
					}
					raw[i] ^= 1 << bit
				}
			}
			for _, bad := range []string{"", "x", good[1:], good + "A", good[:len(good)-1] + "!", good[:len(good)-1] + "\n", strings.Repeat("A", len(good)), strings.Repeat("é", 100)} {
				if _, _, ok := tokens.find(bad, maxAge > 0); ok {
					t.Errorf("%q is good", bad)
				}
			}
			other := newSticky(t, Sticky{Secret: "two", MaxAge: caddy.Duration(maxAge)})
			if _, _, ok := other.minter.mint(parted(3, nil).Endpoints).find(good, maxAge > 0); ok {
				t.Error("it is good with another secret")
			}
			same := newSticky(t, Sticky{Secret: "one", MaxAge: caddy.Duration(maxAge)})
			if place, _, ok := same.minter.mint(parted(5, nil).Endpoints[1:]).find(good, maxAge > 0); !ok || place != 2 {
				t.Errorf("with the same secret elsewhere it leads to %d, %v", place, ok)
			}
			if strings.Contains(good, "10.0.0") {
				t.Error("it has the address in it")
			}
		})
	}
}

func TestStickyCookieAttributes(t *testing.T) {
	tests := []struct {
		policy Sticky
		tls    bool
		want   string
	}{
		{Sticky{}, false, "lb=TOKEN; Path=/; HttpOnly; SameSite=Lax"},
		{Sticky{}, true, "lb=TOKEN; Path=/; HttpOnly; Secure; SameSite=None"},
		{Sticky{Secure: true}, false, "lb=TOKEN; Path=/; HttpOnly; Secure; SameSite=None"},
		{Sticky{SameSite: "none"}, false, "lb=TOKEN; Path=/; HttpOnly; Secure; SameSite=None"},
		{Sticky{SameSite: "lax"}, true, "lb=TOKEN; Path=/; HttpOnly; Secure; SameSite=Lax"},
		{
			Sticky{Cookie: "s", Path: "/pkg.S/", SameSite: "strict", MaxAge: caddy.Duration(90 * time.Second)},
			true,
			"s=TOKEN; Path=/pkg.S/; Max-Age=90; HttpOnly; Secure; SameSite=Strict",
		},
	}
	for _, tt := range tests {
		c := client{tls: tt.tls}
		_, set := c.picks(t, newSticky(t, tt.policy).Build(parted(2, nil)))
		cookie, err := http.ParseSetCookie(set)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Replace(set, cookie.Value, "TOKEN", 1); got != tt.want {
			t.Errorf("%+v: %s, want %s", tt.policy, got, tt.want)
		}
	}
}

func TestStickyNoAllocation(t *testing.T) {
	for name, p := range map[string]Sticky{"cookie": {}, "metadata": {Metadata: "x-session"}, "expiring": {MaxAge: caddy.Duration(time.Hour)}} {
		if raceEnabled && p.MaxAge > 0 {
			continue
		}
		picker := newSticky(t, p).Build(parted(10, nil))
		var c client
		home, _ := c.picks(t, picker, 9)
		k := c.call()
		if n := testing.AllocsPerRun(200, func() {
			if i, _ := pick(picker, PickInfo{Call: k}); i != home {
				t.Errorf("picked %d", i)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// A session stays where it is whatever the level of its endpoint; new ones go to the best level.
func TestStickyWithPriorities(t *testing.T) {
	s := parted(4, func(e *upstream.Endpoint) { e.Priority = uint32(e.Index % 2) })
	p := WithPriorities(newSticky(t, Sticky{})).Build(s)
	var c client
	if i, _ := c.picks(t, p, 2, 0); i != 3 {
		t.Fatalf("picked %d", i)
	}
	for range 20 {
		if i, set := c.picks(t, p); i != 3 || set != "" {
			t.Fatalf("picked %d, set %q", i, set)
		}
		if i, _ := new(client).picks(t, p); i != 2 {
			t.Fatalf("a new session is at %d", i)
		}
	}
}

func BenchmarkSticky(b *testing.B) {
	for name, p := range map[string]Sticky{"lasting": {}, "expiring": {MaxAge: caddy.Duration(time.Hour)}} {
		policy := newSticky(b, p)
		s := parted(10_000, func(e *upstream.Endpoint) { e.Address = fmt.Sprintf("10.0.%d.%d:50051", e.Index/250, e.Index%250) })
		picker := policy.Build(s)
		var c client
		c.picks(b, picker, 7)
		k := c.call()
		b.Run(name+"/pick/10000", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				picker.Pick(PickInfo{Call: k})
			}
		})
		b.Run(name+"/build/10000", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				policy.Build(s)
			}
		})
	}
}

// No text but a token that was made here is good.
func FuzzStickyToken(f *testing.F) {
	m := newMinter([]byte("secret"))
	tokens := m.mint(parted(3, nil).Endpoints)
	good := tokens.text(0, 0)
	f.Add("")
	f.Add(good)
	f.Add(tokens.text(1, time.Hour))
	f.Add(strings.Repeat("A", len(good)))
	f.Fuzz(func(t *testing.T, text string) {
		place, _, ok := tokens.find(text, false)
		if ok && text != tokens.text(place, 0) {
			// Without the secret, only one that was handed out with an end could be.
			if _, _, lasting := tokens.find(text, true); !lasting || len(text) != len(good) {
				t.Errorf("%q is good", text)
			}
		}
	})
}
