package proxy

import (
	"net"
	"net/netip"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// deaf is a client's side that nobody listens at.
type deaf struct{ done chan struct{} }

func (d *deaf) Head([]h2.Field, bool)     {}
func (d *deaf) Data(p []byte) (int, bool) { return len(p), true }
func (d *deaf) Trailers([]h2.Field, bool) {}
func (d *deaf) Consumed(int)              {}
func (d *deaf) Flush(*h2.Conn)            {}
func (d *deaf) Reset(h2.ErrCode)          {}
func (d *deaf) Done()                     { close(d.done) }

// serve begins a call.
func serve(p *Proxy, f *Flight) (done <-chan struct{}) {
	d := &deaf{make(chan struct{})}
	f.Call.Path, f.Request.Path = "/test.Service/Method", "/test.Service/Method"
	f.Call.ClientIP = netip.MustParseAddr("127.0.0.1")
	f.Request.Fields = []h2.Field{{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"}}
	p.Serve(f, d, nil)
	f.Data(nil, true, nil)
	return d.done
}

// dead returns addresses where nobody listens: connections are refused at once. As long as the test runs nobody else comes there.
func dead(tb testing.TB, n int) []upstream.Endpoint {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	list := make([]upstream.Endpoint, n)
	for i := range list {
		ip := netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)})
		list[i] = upstream.Endpoint{Network: "tcp", Address: net.JoinHostPort(ip.String(), port)}
	}
	return list
}

func proxyOf(tb testing.TB, list []upstream.Endpoint, policy selection.Policy, cfg Config) *Proxy {
	tb.Helper()
	c, err := cluster.New(cluster.Config{
		Static: list,
		Policy: policy,
		Transport: func(*upstream.Endpoint) transport.Config {
			return transport.Config{Identity: tb.Name(), Logger: zap.NewNop(), MaxConns: 1, QueueTimeout: time.Hour}
		},
		Cut:    func(*transport.Endpoint) int { return 0 },
		Logger: zap.NewNop(),
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(c.Close)
	c.Start()
	cfg.Cluster = c
	return New(cfg)
}

// quiet has f looked at when nobody runs it.
func quiet(f *Flight, ok func() bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return !f.running && ok()
}

func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for begin := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			tb.Fatal(what)
		}
	}
}

// A wake may come when the call has turned to something else and waits again. It must not wait twice then, and nothing of it stays
// behind.
func TestLateWake(t *testing.T) {
	p := proxyOf(t, dead(t, 1), new(selection.RoundRobin), Config{TryDuration: time.Hour, TryInterval: time.Millisecond})
	var wakes atomic.Int32
	f := new(Flight)
	f.choice.waiter.Wake = func() {
		wakes.Add(1)
		f.push(&event{kind: evNews}, nil)
	}
	done := serve(p, f)
	waits := func() bool {
		return quiet(f, func() bool { return f.choice.waiting && f.choice.waiter.Wish == cluster.Usable })
	}
	for range 3 {
		eventually(t, "the call does not wait", waits)
		f.push(&event{kind: evNews}, nil)
	}
	eventually(t, "the call does not wait", waits)
	f.Cut(ClientGone())
	<-done
	before := wakes.Load()
	p.cfg.Cluster.Close() // has all look for themselves
	last := make(chan struct{})
	p.cfg.Cluster.Wait(&cluster.Waiter{Due: time.Now().Add(time.Hour), Wish: cluster.Usable, Wake: func() { close(last) }}, 0)
	<-last
	if n := wakes.Load() - before; n != 0 {
		t.Errorf("a call that is over is woken %d times", n)
	}
}

// server takes calls, so many at a time, and answers none.
func server(tb testing.TB, most uint32) (e upstream.Endpoint, streams <-chan *h2.Stream) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	got := make(chan *h2.Stream, 100)
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			go h2.Server(nc, h2.Config{MaxStreams: most}, func(s *h2.Stream, _ []h2.Field, _ bool) h2.Receiver {
				got <- s
				return h2.NewBlocking()
			})
		}
	}()
	return upstream.Endpoint{Network: "tcp", Address: l.Addr().String()}, got
}

// meddler is a policy with something that happens whenever it has been asked.
type meddler struct {
	selection.RoundRobin
	asked atomic.Pointer[func(in selection.PickInfo, picked bool)]
}

type meddling struct {
	selection.Picker
	m *meddler
}

func (m *meddler) Build(s *upstream.Snapshot) selection.Picker {
	return &meddling{m.RoundRobin.Build(s), m}
}

func (p *meddling) Pick(in selection.PickInfo) (selection.Pick, bool) {
	pick, ok := p.Picker.Pick(in)
	if asked := p.m.asked.Load(); asked != nil {
		(*asked)(in, ok)
	}
	return pick, ok
}

// An endpoint that has room from the moment on at which a call has looked for one, and before it waits, is not missed.
func TestRoomWhileACallIsParked(t *testing.T) {
	full, taken := server(t, 1)
	other, moved := server(t, 1)
	m := new(meddler)
	p := proxyOf(t, []upstream.Endpoint{full, other}, m, Config{})
	c := p.cfg.Cluster
	state := c.View().Endpoints[1].State
	state.Set(upstream.Unhealthy)
	first := serve(p, new(Flight))
	<-taken

	meddle := func(in selection.PickInfo, picked bool) {
		if !picked || in.Disregard&upstream.NoRoom == 0 || !state.Clear(upstream.Unhealthy) {
			return
		}
		looked := make(chan struct{}) // whoever waits already is told
		c.Wait(&cluster.Waiter{Due: time.Now(), Wake: func() { close(looked) }}, 0)
		<-looked
	}
	m.asked.Store(&meddle)
	second := serve(p, new(Flight))
	select {
	case <-moved:
	case <-time.After(20 * time.Second):
		t.Error("the call waits for a stream of an upstream while another one has room")
	}
	p.EndAll(ClientGone())
	<-first
	<-second
}

// Where something changes all the time, a call that no endpoint can take is told so all the same.
func TestVerdictInTurmoil(t *testing.T) {
	m := new(meddler)
	p := proxyOf(t, dead(t, 1), m, Config{ConnectTimeout: time.Hour})
	state := p.cfg.Cluster.View().Endpoints[0].State
	var n atomic.Int32
	meddle := func(selection.PickInfo, bool) { state.SetNotServing(strconv.Itoa(int(n.Add(1)))) }
	m.asked.Store(&meddle)
	select {
	case <-serve(p, new(Flight)):
	case <-time.After(20 * time.Second):
		t.Error("the call waits for an upstream that has refused it")
	}
}
