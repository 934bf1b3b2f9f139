package listen

import (
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// A connection that is old enough is shut down.
func TestAge(t *testing.T) {
	wiretest.CheckLeaks(t)
	p := newPort(t)
	p.open(t, options{Name: "site", Limits: Limits{Age: time.Millisecond}})
	c := wiretest.Dial(t, p.addr(), nil)
	expectGoAway(t, c)
}

func expectGoAway(t *testing.T, c *wiretest.Conn) {
	t.Helper()
	if f := c.Expect("GOAWAY", func(f wiretest.Frame) bool { return f.Type == http2.FrameGoAway }); f.Code != http2.ErrCodeNo {
		t.Errorf("GOAWAY %v", f.Code)
	}
}

// What runs on it goes on, for as long as the grace is.
func TestAgeGrace(t *testing.T) {
	for name, grace := range map[string]time.Duration{"without a grace": 0, "with one": time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			p := newPort(t)
			s := p.open(t, options{Name: "site"})
			c := wiretest.Dial(t, p.addr(), nil)
			id := c.Open(c.Request("/hold"), true)
			eventually(t, "the stream has come", func() bool {
				all := s.l.hub.all()
				return len(all) == 1 && all[0].c.Streams() == 1
			})
			s.l.hub.all()[0].retire(grace)
			expectGoAway(t, c)
			if grace > 0 {
				eventually(t, "the connection is over", func() bool { return len(s.l.hub.all()) == 0 })
			}
			close(s.hold)
			if grace > 0 {
				return
			}
			if h := c.Collect(id); h.Get(":status") != "200" {
				t.Errorf("%v", h.Head)
			}
		})
	}
}

// Connections that were made together do not end together.
func TestJitter(t *testing.T) {
	seen := make(map[time.Duration]bool)
	for range 1000 {
		d := jittered(time.Hour)
		if d < 54*time.Minute || d > 66*time.Minute {
			t.Fatal(d)
		}
		seen[d] = true
	}
	if len(seen) < 100 {
		t.Errorf("%d ages of 1000", len(seen))
	}
}
