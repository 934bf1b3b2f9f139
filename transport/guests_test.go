package transport

import (
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// A guest is on a connection of calls while these leave room, and is told when they need it. Where streams are few it never is.
func TestGuests(t *testing.T) {
	for _, limit := range []uint32{1, 2, guestLimit - 1, guestLimit, 0} {
		l, _ := listen(t, wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: max(limit, 1)}}})
		if limit == 0 {
			l, _ = listen(t)
		}
		e := endpoint(t, l.Addr(), Config{MaxConns: 1})
		var own *Endpoint
		beside := func() *Endpoint {
			if own == nil {
				own = e.Beside()
				t.Cleanup(func() { _ = own.Destruct() })
			}
			return own
		}
		guest := func() (*h2.Stream, <-chan struct{}) {
			t.Helper()
			s, crowded, err := e.OpenGuest(t.Context(), beside, request(), h2.NewBlocking())
			if err != nil {
				t.Fatal(err)
			}
			return s, crowded
		}
		gone := func(crowded <-chan struct{}) bool {
			select {
			case <-crowded:
				return true
			default:
				return false
			}
		}
		first, crowded := guest() // before there is a connection
		shares := limit == 0 || limit >= guestLimit
		if (own == nil) != shares || (crowded != nil) != shares || e.Conns() != 1 {
			t.Fatalf("limit %d: on a connection of its own: %v; calls have %d", limit, own != nil, e.Conns())
		}
		second, other := guest() // when there is one
		if (other != nil) != shares || shares && second.Conn() != first.Conn() {
			t.Errorf("limit %d: the second guest is elsewhere", limit)
		}
		if limit == 0 {
			continue
		}
		if shares { // calls fill the connection up to an eighth
			for range limit - limit/8 - 3 {
				open(t, e)
			}
			if gone(crowded) {
				t.Errorf("limit %d: sent away too soon", limit)
			}
			open(t, e)
			if !gone(crowded) || !gone(other) {
				t.Errorf("limit %d: not sent away", limit)
			}
			first.Reset(h2.Cancel)
			second.Reset(h2.Cancel)
			if _, again := guest(); again != nil || own == nil {
				t.Errorf("limit %d: it comes back", limit)
			}
		}
		for e.tryRoom() > 0 {
			open(t, e)
		}
		if n := e.calls(); n != int(limit) {
			t.Errorf("limit %d: room for %d calls", limit, n)
		}
	}
}

// tryRoom is how many streams more there is room for.
func (e *Endpoint) tryRoom() (n int) {
	for _, c := range *e.conns.Load() {
		n += c.Available()
	}
	return n
}

func (e *Endpoint) calls() (n int) {
	for _, c := range *e.conns.Load() {
		n += c.Streams()
	}
	return n
}
