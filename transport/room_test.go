package transport

import (
	"bufio"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func maxStreams(n uint32) wiretest.Options {
	return wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: n}}}
}

// TestNoRoom: an endpoint whose streams are all taken says so, until one is free: pickers pass it over.
func TestNoRoom(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t, maxStreams(1))
	e := endpoint(t, l.Addr(), Config{MaxConns: 2})
	var conns []*wiretest.Conn
	for range 2 {
		open(t, e)
		conns = append(conns, <-accepted)
	}
	wantKind(t, (<-try(e, &Ticket{}, h2.NewBlocking())).err, KindElsewhere)
	if !e.link.Has(upstream.NoRoom) || usable(e) {
		t.Error("nobody can see that it is full")
	}
	answer(conns[1], conns[1].ExpectHeaders().Stream)
	eventually(t, "room again", func() bool { return usable(e) })
	open(t, e)

	// One who waits is before those who come.
	waits := openLater(e)
	waiting(t, e, 1)
	answer(conns[0], conns[0].ExpectHeaders().Stream)
	wantOpened(t, waits)
	if !e.link.Has(upstream.NoRoom) {
		t.Error("room, though the stream is for the call that waits")
	}
	for _, c := range conns {
		c.Abort()
	}
	eventually(t, "it is not full without connections", func() bool { return !e.link.Has(upstream.NoRoom) })
}

// TestNoRoomBeside: streams that end on a client's own connections make no room on those that all others share.
func TestNoRoomBeside(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t, maxStreams(1))
	e := endpoint(t, l.Addr(), Config{MaxConns: 1})
	open(t, e)
	<-accepted
	wantKind(t, (<-try(e, &Ticket{}, h2.NewBlocking())).err, KindElsewhere)
	own := e.Own(netip.MustParseAddr("192.0.2.1"))
	open(t, own)
	c := <-accepted
	waits := openLater(own)
	waiting(t, own, 1)
	answer(c, c.ExpectHeaders().Stream)
	wantOpened(t, waits)
	answer(c, c.ExpectHeaders().Stream)
	eventually(t, "no stream of its own", func() bool { return (*own.conns.Load())[0].Available() == 1 })
	own.capacity() // whatever the reader has told until now
	if !e.link.Has(upstream.NoRoom) {
		t.Error("room, though all shared streams are taken")
	}
}

// TestNoStreamsAllowed: RFC 9113 section 6.5.2: "A value of 0 for SETTINGS_MAX_CONCURRENT_STREAMS … does prevent the creation of
// new streams". It may be taken back.
func TestNoStreamsAllowed(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t, maxStreams(0))
	e := endpoint(t, l.Addr(), Config{MinConns: 1, MaxConns: 1})
	defer e.Preconnect(1)()
	c := l.Accept()
	eventually(t, "no room", func() bool { return e.link.Has(upstream.NoRoom) })
	waits := openLater(e)
	waiting(t, e, 1)
	c.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2})
	wantOpened(t, waits)
	eventually(t, "room", func() bool { return usable(e) })
}

// TestNoRoomIsNotForgotten: whatever comes together, an endpoint with free streams has room.
func TestNoRoomIsNotForgotten(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t, maxStreams(1))
	l.Serve(func(c *wiretest.Conn) {
		for {
			answer(c, c.ExpectHeaders().Stream)
		}
	})
	e := endpoint(t, l.Addr(), Config{MaxConns: 1})
	for range 100 {
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				b := h2.NewBlocking()
				o := <-try(e, &Ticket{}, b)
				if o.err != nil {
					return
				}
				o.stream.Conn().Flush()
				_, _ = b.WaitHead(t.Context())
			})
		}
		wg.Wait()
		eventually(t, "room", func() bool { return usable(e) })
	}
}

// TestRoomOfMany: many connections without a limit have room for as many calls as wait. Where an int has 32 bits, their
// streams are more than that can count.
func TestRoomOfMany(t *testing.T) {
	wiretest.CheckLeaks(t)
	for _, most := range []uint32{math.MaxInt32, math.MaxUint32} {
		l, accepted := listen(t, maxStreams(most))
		e := endpoint(t, l.Addr(), Config{MinConns: 3})
		stop := e.Preconnect(3)
		for range 3 {
			<-accepted
		}
		eventually(t, "three", func() bool { return e.Conns() == 3 })
		e.mu.Lock()
		if n := e.roomLocked(1000); n != 1000 {
			t.Errorf("room for %d of 1000 calls", n)
		}
		w := new(Ticket)
		w.come(time.Now(), time.Minute)
		e.line.insert(w, time.Now())
		if got, _ := e.nextLocked(time.Now()); got != w {
			t.Error("it is not the waiting call's turn")
		}
		e.mu.Unlock()
		stop()
	}
}

// TestQueueByDeadline: the call with the earliest deadline is the first to be served, whenever it came.
func TestQueueByDeadline(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t, maxStreams(1))
	e := endpoint(t, l.Addr(), Config{MaxConns: 1, QueueTimeout: 30 * time.Second})
	open(t, e)
	c := <-accepted
	order := make(chan string, 3)
	for i, k := range []struct {
		name     string
		deadline time.Time
	}{
		{"last", time.Now().Add(time.Minute)},
		{"second", time.Time{}}, // it counts as start + queue wait
		{"first", time.Now().Add(10 * time.Second)},
	} {
		told := try(e, &Ticket{Deadline: k.deadline, Queue: true}, h2.NewBlocking())
		go func() {
			o := <-told
			if o.err != nil {
				t.Errorf("%s: %v", k.name, o.err)
				order <- ""
				return
			}
			order <- k.name
			o.stream.Conn().Flush()
		}()
		waiting(t, e, int32(i+1))
	}
	for _, want := range []string{"first", "second", "last"} {
		answer(c, c.ExpectHeaders().Stream)
		if got := <-order; got != want {
			t.Errorf("%q was served, want %q", got, want)
		}
	}
}

// TestNoQueue: with a queue of none no call waits for a stream, but the first ones wait for the connection.
func TestNoQueue(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t, wiretest.Options{NoSettings: true})
	e := endpoint(t, l.Addr(), Config{MaxConns: 1, QueueSize: -1})
	var results []<-chan *Error
	for i := range 5 {
		results = append(results, openLater(e))
		waiting(t, e, int32(i+1))
	}
	c := l.Accept()
	c.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2})
	served := 0
	for _, r := range results {
		if err := <-r; err == nil {
			served++
		} else {
			wantKind(t, err, KindQueueFull)
		}
	}
	if served != 2 {
		t.Errorf("%d calls were served by a connection of two streams", served)
	}
	_, err := e.OpenWait(t.Context(), request(), true, h2.NewBlocking())
	wantKind(t, err, KindQueueFull)
}

// TestNoQueueForFailedConnection: calls that wait for a further connection, where none may wait for a stream, do not wait any
// more when the connection cannot be made.
func TestNoQueueForFailedConnection(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t, maxStreams(1))
	e := endpoint(t, l.Addr(), Config{MaxConns: 2, QueueSize: -1, QueueTimeout: time.Minute})
	first := openLater(e)
	l.Accept()
	wantOpened(t, first)
	second := l.AcceptRaw()
	var results []<-chan *Error
	for i := range 3 {
		results = append(results, openLater(e))
		waiting(t, e, int32(i+1))
	}
	_ = second.Close()
	for _, r := range results {
		wantKind(t, <-r, KindQueueFull)
	}
	waiting(t, e, 0)
}

// TestDropsWhatIsTooLate: a call that cannot be answered in the time it has left gets no stream if another one can use it.
func TestDropsWhatIsTooLate(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t, maxStreams(1))
	e := endpoint(t, l.Addr(), Config{MaxConns: 1})
	open(t, e)
	c := <-accepted
	result := func(left time.Duration) <-chan opened {
		return try(e, &Ticket{Deadline: time.Now().Add(left), Queue: true}, h2.NewBlocking())
	}
	late := result(10 * time.Second)
	waiting(t, e, 1)
	good := result(time.Minute)
	waiting(t, e, 2)
	e.Took(15*time.Second, true)
	answer(c, c.ExpectHeaders().Stream)
	wantKind(t, (<-late).err, KindQueueTimeout)
	if o := <-good; o.err != nil {
		t.Error(o.err)
	}
	// But if there is nobody else, it may try.
	alone := result(10 * time.Second)
	waiting(t, e, 1)
	c.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2})
	if o := <-alone; o.err != nil {
		t.Error(o.err)
	}
}

// TestLateCallsShare: calls of a configuration that is gone share the connections that are made for them, no more than are
// allowed, and those close with their streams.
func TestLateCallsShare(t *testing.T) {
	wiretest.CheckLeaks(t)
	const calls, most = 40, 3
	l := wiretest.Listen(t, maxStreams(4))
	l.Serve(func(c *wiretest.Conn) {
		for id := uint32(1); !c.Closed(); time.Sleep(time.Millisecond) {
			for ; len(c.Untaken(id)) > 0; id += 2 {
				answer(c, c.ExpectOn(id, http2.FrameHeaders).Stream)
			}
		}
	})
	e := NewEndpoint(upstream.Address{Network: "tcp", Dial: l.Addr()}, Config{MaxConns: most, IdleTimeout: -1})
	if err := e.Destruct(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range calls {
		wg.Go(func() {
			b := h2.NewBlocking()
			s, err := e.OpenWait(t.Context(), request(), true, b)
			if err != nil {
				t.Errorf("a late call failed: %v", err)
				return
			}
			s.Conn().Flush()
			if _, err := b.WaitHead(t.Context()); err != nil {
				t.Errorf("a late call was not answered: %v", err)
			}
			if n := e.Conns(); n > most {
				t.Errorf("%d connections at once", n)
			}
		})
	}
	wg.Wait()
	eventually(t, "the connections close", func() bool { return e.Conns() == 0 })
}

// unwelcome closes connections that speak for one client.
type unwelcome struct {
	net.Listener
	client string
}

func (l *unwelcome) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		r := bufio.NewReader(c)
		h, err := proxyproto.Read(r)
		if err != nil {
			return nil, err
		}
		if !strings.HasPrefix(h.SourceAddr.String(), l.client) {
			return &bufferedConn{c, r}, nil
		}
		_ = c.Close()
	}
}

// TestUnwelcomeClient: where connections speak for clients, one client whose connections the upstream does not want says nothing
// about the endpoint: neither before nor after others have connections.
func TestUnwelcomeClient(t *testing.T) {
	wiretest.CheckLeaks(t)
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := wiretest.ListenOn(t, &unwelcome{inner, "203.0.113.66:"})
	l.Serve(func(c *wiretest.Conn) {
		answer(c, c.ExpectHeaders().Stream)
		<-t.Context().Done()
	})
	e := endpoint(t, inner.Addr().String(), Config{ProxyProtocol: 2})
	good, bad := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("203.0.113.66")
	refused := func() {
		t.Helper()
		_, err := e.For(bad).OpenWait(t.Context(), request(), true, h2.NewBlocking())
		if err == nil || err.Kind != KindDial && err.Kind != KindBackoff {
			t.Fatalf("%v, want a failed dial", err)
		}
		if e.link.Has(upstream.Backoff) {
			t.Fatal("the endpoint is in backoff for one client's sake")
		}
	}
	for range 5 {
		refused()
	}
	b := h2.NewBlocking()
	s, terr := e.For(good).OpenWait(t.Context(), request(), true, b)
	if terr != nil {
		t.Fatal(terr)
	}
	s.Conn().Flush()
	wantEnd(t, b)
	for range 5 {
		refused()
	}
	if e.For(good).Conns() != 1 || !usable(e) {
		t.Errorf("the other client has %d connections, usable: %v", e.For(good).Conns(), usable(e))
	}
}
