package grpcproxy_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// fromClients makes the proxy believe what x-forwarded-for says, so that a test can be several clients.
var fromClients = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}

const (
	clientA = "192.0.2.1"
	clientB = "192.0.2.2"
)

// takeOn waits for the call on a connection of the upstream, and answers it.
func (c *rpc) takeOn(up *wiretest.Conn) {
	c.r.t.Helper()
	c.up = up
	c.req = up.ExpectHeaders()
	c.sid = c.req.Stream
}

// A client that cancels many calls gets connections of its own: servers close one on which many streams are reset.
func TestWireCancelBudget(t *testing.T) {
	for _, off := range []bool{false, true} {
		t.Run(fmt.Sprintf("off %v", off), func(t *testing.T) {
			block := "cancel_budget 5"
			if off {
				block = "cancel_budget off"
			}
			r := newRig(t, rigOptions{Block: block, Trusted: fromClients})
			for i := range 6 {
				c := r.streaming("x-forwarded-for", clientA)
				c.client.WriteReset(c.id, http2.ErrCodeCancel)
				if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
					t.Errorf("RST_STREAM(%v)", code)
				}
				eventually(t, "the call is over", func() bool { return len(r.failures()) == i+1 })
			}
			shared := r.ups[0].current()
			c := r.open("x-forwarded-for", clientA)
			if off {
				c.takeOn(shared)
				return
			}
			own := r.ups[0].Accept()
			c.takeOn(own)
			other := r.open("x-forwarded-for", clientB)
			other.takeOn(shared)
			other.answerOK()
			again := r.open("x-forwarded-for", clientA)
			again.takeOn(own)
		})
	}
}

// A call whose client is gone before it could be sent costs no upstream anything.
func TestWireGoneBeforeSent(t *testing.T) {
	o := proxytest.Options{Site: "route {\ntest_faulty late\ngrpc_proxy UPSTREAMS\n}", AccessLog: true}
	r := newRig(t, rigOptions{Caddy: o})
	healthy := r.unary("healthy", "1")
	healthy.answerOK()
	const calls = 20
	for range calls {
		c := r.open("x-gone", "1")
		c.client.WriteReset(c.id, http2.ErrCodeCancel)
	}
	eventually(t, "the calls are over", func() bool { return len(r.Log("http.log.access")) == calls+1 })
	for _, line := range r.Log("http.log.access")[1:] {
		if line["grpc_reason"] != "CLIENT_GONE" || line["grpc_attempts"] != 0.0 {
			t.Errorf("the log has reason %v after %v attempts", line["grpc_reason"], line["grpc_attempts"])
		}
	}
	next := r.unary("healthy", "1")
	if next.sid != healthy.sid+2 {
		t.Errorf("the next call is stream %d, want %d: a call of those was sent", next.sid, healthy.sid+2)
	}
	next.answerOK()
}

// Metadata beyond what every server takes travels on connections that only such calls use.
func TestWireLargeMetadataApart(t *testing.T) {
	r := newRig(t, rigOptions{Trusted: fromClients, Caddy: proxytest.Options{Servers: "max_header_size 128KiB"}})
	r.complete()
	shared := r.ups[0].current()
	var many []string
	for i := range 100 {
		many = append(many, fmt.Sprintf("x-%d", i), "v")
	}
	large := r.open("x-forwarded-for", clientA, "x-large", strings.Repeat("v", 8<<10))
	apart := r.ups[0].Accept()
	large.takeOn(apart)
	large.answerOK()
	of := r.open(append(many, "x-forwarded-for", clientB)...)
	of.takeOn(apart)
	of.answerOK()
	small := r.open("x-large", strings.Repeat("v", 7<<10))
	small.takeOn(shared)
	small.answerOK()
	if n := r.ups[0].Accepted(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
}

// max_metadata_bytes and max_metadata_fields: no upstream is asked.
func TestWireMetadataLimits(t *testing.T) {
	r := newRig(t, rigOptions{Block: "max_metadata_bytes 2KiB\nmax_metadata_fields 30"})
	r.complete()
	var many []string
	for i := range 30 {
		many = append(many, fmt.Sprintf("x-%d", i), "v")
	}
	for _, tt := range []struct {
		name, says string
		metadata   []string
	}{
		{"bytes", " bytes, and max_metadata_bytes is 2048", []string{"x-large", strings.Repeat("v", 2<<10)}},
		{"fields", " fields, and max_metadata_fields is 30", many},
	} {
		r.run(tt.name, func(_ *testing.T, r *rig) {
			c := r.open(tt.metadata...)
			r.checkFailure(c.result(), failure{
				code: codes.ResourceExhausted, reason: "REQUEST_METADATA_TOO_LARGE", attempts: -1,
				says: []string{"the call's metadata is larger than the proxy passes on: ", tt.says},
			})
		})
	}
	r.run("the path", func(_ *testing.T, r *rig) {
		c := &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request("/"+strings.Repeat("s", 2<<10)+"/M"), true)}
		r.checkFailure(c.result(), failure{code: codes.ResourceExhausted, reason: "REQUEST_METADATA_TOO_LARGE", attempts: -1})
	})
	r.complete()
}

// An upstream that ends a connection with an error has been sent something that it does not like. A call that it says it has not
// processed is sent again, away from everybody else, and not a third time if that ends a connection, too.
func TestWireGoAwayWithError(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.complete()
	bad := r.streaming()
	bad.up.WriteGoAway(bad.sid-2, http2.ErrCodeEnhanceYourCalm, "too_much")
	// One of the two is what all calls share from now on, the other one is for this call.
	apart, shared := r.ups[0].Accept(), r.ups[0].Accept()
	came := func(c *wiretest.Conn) bool {
		return slices.ContainsFunc(c.Untaken(1), func(f wiretest.Frame) bool { return f.Type == http2.FrameHeaders })
	}
	eventually(t, "the call comes again", func() bool { return came(apart) || came(shared) })
	if came(shared) {
		apart, shared = shared, apart
	}
	other := r.open()
	other.takeOn(shared)
	bad.takeOn(apart)
	apart.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, "too_much")
	r.checkFailure(bad.result(), failure{code: codes.Unavailable, reason: "UPSTREAM_GOAWAY", attempts: 2, says: []string{"all 2 attempts failed"}})
	other.answerOK()
}

// netty is an upstream that counts as Netty's servers do: more than 200 RST_STREAM within 30 s, and the connection ends.
type netty struct {
	*wiretest.Listener

	mu     sync.Mutex
	heads  int
	resets map[*wiretest.Conn]int
	closed map[*wiretest.Conn]bool
	kept   *wiretest.Conn // has the stream of the one that asked with x-kept
	stream uint32
}

func newNetty(t *testing.T) *netty {
	n := &netty{resets: make(map[*wiretest.Conn]int), closed: make(map[*wiretest.Conn]bool)}
	n.Listener = wiretest.Listen(t, wiretest.Options{Inspect: n.inspect})
	n.Serve(func(*wiretest.Conn) { <-t.Context().Done() })
	return n
}

func (n *netty) inspect(c *wiretest.Conn, f wiretest.Frame) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch f.Type {
	case http2.FrameHeaders:
		n.heads++
		if f.Get("x-kept") != "" {
			n.kept, n.stream = c, f.Stream
		}
	case http2.FrameRSTStream:
		if n.resets[c]++; n.resets[c] == 201 {
			n.closed[c] = true
			c.WriteGoAway(f.Stream, http2.ErrCodeEnhanceYourCalm, "")
			_ = c.NetConn().Close()
		}
	}
}

func (n *netty) requests() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.heads
}

// One client's cancels do not end the connection that others have calls on. Its own may end.
func TestWireCancelsOfOthers(t *testing.T) {
	up := newNetty(t)
	r := newRig(t, rigOptions{Trusted: fromClients, Caddy: proxytest.Options{Site: "grpc_proxy " + up.Addr()}})
	kept := r.open("x-kept", "1", "x-forwarded-for", clientB)
	eventually(t, "the call is there", func() bool { return up.requests() == 1 })
	const waves, each = 11, 20
	for i := range waves {
		c := wiretest.Dial(t, r.H2C, nil)
		var ids []uint32
		for range each {
			ids = append(ids, c.Open(c.Request(wirePath, "x-forwarded-for", clientA), false))
		}
		eventually(t, "the calls are there", func() bool { return up.requests() == 1+(i+1)*each })
		for _, id := range ids {
			c.WriteReset(id, http2.ErrCodeCancel)
		}
		eventually(t, "the calls are over", func() bool { return len(r.failures()) == (i+1)*each })
	}
	up.mu.Lock()
	conn, id, resets, closed := up.kept, up.stream, up.resets[up.kept], up.closed[up.kept]
	up.mu.Unlock()
	if closed || resets > 100+each {
		t.Fatalf("the shared connection saw %d resets of one client; closed: %v", resets, closed)
	}
	conn.WriteHeaders(id, wiretest.Head(), false)
	conn.WriteHeaders(id, wiretest.Fields("grpc-status", "0"), true)
	kept.ok()
}

// How long calls took on connections apart from those of others says nothing about the wait for these. Here one such call took so
// long that the next one on the shared connection would be given up as too late, if it did.
func TestWireTookApart(t *testing.T) {
	r := newRig(t, rigOptions{
		Block: "max_conns 1",
		Up:    wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}},
	})
	r.complete()
	large := strings.Repeat("v", 8<<10)
	first := r.open("x-large", large)
	apart := r.ups[0].Accept()
	first.takeOn(apart)
	second := r.open("x-large", large, "grpc-timeout", "1M")
	time.Sleep(quiet) // it waits
	first.answerOK()
	second.takeOn(apart)
	time.Sleep(1100 * time.Millisecond) // what it takes
	second.answerOK()

	busy := r.streaming()
	hurried := r.open("grpc-timeout", "2S")
	time.Sleep(quiet)
	r.open("grpc-timeout", "1M")
	time.Sleep(quiet)
	busy.answerOK()
	hurried.takeOn(busy.up)
	if got := hurried.req.Get("grpc-timeout"); strings.HasSuffix(got, "S") || strings.HasSuffix(got, "M") {
		t.Errorf("the call that was sent has grpc-timeout %s, not the hurried one's", got)
	}
	hurried.answerOK()
}
