package h2

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

func TestCapacity(t *testing.T) {
	var freed, settled atomic.Int32
	cfg := Config{OnCapacity: func(c *Conn) { _ = c.Available(); freed.Add(1) }, OnSettings: func(*Conn) { settled.Add(1) }}
	c, p := clientAgainst(t, cfg, wiretest.Options{NoSettings: true, NoSettingsAck: true})
	if n := c.Available(); n != 100 {
		t.Errorf("%d available before SETTINGS, want the assumed 100", n)
	}
	// The limit arrives when more streams are open than it allows.
	var open []*Stream
	for range 3 {
		open = append(open, mustOpen(t, c, false, newRecorder(t)))
	}
	p.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2})
	wait(t, c.Ready())
	until(t, "OnSettings", func() bool { return settled.Load() == 1 })
	if n := c.Available(); n != 0 {
		t.Errorf("%d available", n)
	}
	if _, err := c.OpenStream(requestHead, true, newRecorder(t)); err == nil || err.Kind != KindNoCapacity || !err.Unprocessed {
		t.Errorf("%v", err)
	}
	p.WriteSettingsAck()
	before := freed.Load()
	open[0].Reset(Cancel)
	open[1].Reset(Cancel)
	if n := c.Available(); n != 1 || freed.Load() != before+2 {
		t.Errorf("%d available, told %d times", n, freed.Load()-before)
	}
	p.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 10})
	until(t, "the higher limit", func() bool { return c.Available() == 9 && freed.Load() == before+3 })
	p.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 0})
	until(t, "the lower limit", func() bool { return c.Available() == 0 })
	if n := freed.Load(); n != before+3 {
		t.Errorf("told %d times", n-before)
	}
}

func TestOwnLimit(t *testing.T) {
	c, _ := clientAgainst(t, Config{MaxStreams: 2})
	<-c.Ready()
	if n := c.Available(); n != 2 {
		t.Error(n)
	}
	mustOpen(t, c, false, newRecorder(t))
	if n, s := c.Available(), c.Streams(); n != 1 || s != 1 {
		t.Error(n, s)
	}
}

func TestNoLimit(t *testing.T) {
	c, _ := clientAgainst(t, Config{})
	<-c.Ready()
	if n := c.Available(); n != maxStreamID {
		t.Errorf("%d available of a server that names no limit", n)
	}
}

// The highest limit that SETTINGS can name is no negative number where an int has 32 bits.
func TestHighestLimit(t *testing.T) {
	const most = 1<<32 - 1
	c, _ := clientAgainst(t, Config{MaxStreams: most}, wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: most}}})
	<-c.Ready()
	if n := c.Available(); n != maxStreamID {
		t.Errorf("%d available", n)
	}
	mustOpen(t, c, false, newRecorder(t))
	a := newCalls(t)
	_, p := serverAgainst(t, Config{MaxStreams: most}, a.accept)
	p.Open(wiretest.Request("a", "/s/m"), true)
	a.next()
}

// RFC 9113 section 5.1.1: identifiers are used once; a connection that has none left drains.
func TestIdentifiersRunOut(t *testing.T) {
	var told atomic.Int32
	c, p := clientAgainst(t, Config{OnNearlyFull: func(c *Conn) {
		if c.Draining() {
			told.Add(1)
		}
	}})
	<-c.Ready()
	c.mu.Lock()
	c.nextID = maxStreamID
	c.mu.Unlock()
	r := newRecorder(t)
	if s := mustOpen(t, c, true, r); s.ID() != maxStreamID {
		t.Error(s.ID())
	}
	c.Flush()
	p.ExpectHeaders()
	wait(t, c.Leaving())
	if c.Available() != 0 || !c.Draining() || told.Load() != 1 {
		t.Errorf("not draining, or told %d times", told.Load())
	}
	p.WriteHeaders(maxStreamID, wiretest.Head(), true)
	wait(t, c.Done())
	r.want("head" + text(wiretest.Head()) + " true")
}

// Callers that open streams concurrently: identifiers reach the peer in rising order.
func TestConcurrentOpen(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	<-c.Ready()
	const callers, each = 8, 50
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for range each {
				s, err := c.OpenStream(requestHead, false, newRecorderOf(t, 2))
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := s.TryWrite([]byte("x"), true); err != nil {
					t.Error(err)
				}
				if i%2 == 0 {
					c.Flush()
				} else {
					c.FlushSoon()
				}
			}
		})
	}
	wg.Wait()
	for i := range uint32(callers * each) {
		if f := p.ExpectHeaders(); f.Stream != 2*i+1 {
			t.Fatalf("stream %d at place %d", f.Stream, i)
		}
	}
}

func TestClientShutdown(t *testing.T) {
	var closed atomic.Int32
	c, p := clientAgainst(t, Config{OnClose: func(_ *Conn, e *Error) {
		if e.Kind != KindLocal || e.Code != NoError {
			t.Errorf("%v", e)
		}
		closed.Add(1)
	}})
	r := newRecorder(t)
	mustOpen(t, c, true, r)
	c.Flush()
	p.ExpectHeaders()
	c.Shutdown()
	c.Shutdown()
	if _, err := c.OpenStream(requestHead, true, r); err == nil || err.Kind != KindLocal || !err.Unprocessed {
		t.Errorf("%v", err)
	}
	p.WriteHeaders(1, wiretest.Head(), true)
	wait(t, c.Done())
	r.want("head" + text(wiretest.Head()) + " true")
	expectGoAway(t, p, http2.ErrCodeNo)
	if err := p.ExpectClosed(); err == nil || err.Error() != "EOF" {
		t.Error(err)
	}
	if closed.Load() != 1 {
		t.Errorf("OnClose ran %d times", closed.Load())
	}
}

func TestClose(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	sent, unsent := newRecorder(t), newRecorder(t)
	mustOpen(t, c, true, sent)
	c.Flush()
	p.ExpectHeaders()
	c.Close(EnhanceYourCalm, "enough")
	c.Close(NoError, "later reasons do not count")
	wait(t, c.Done())
	sent.want("reset local ENHANCE_YOUR_CALM remote=false unprocessed=false")
	if f := expectGoAway(t, p, http2.ErrCodeEnhanceYourCalm); string(f.Data) != "enough" {
		t.Errorf("%q", f.Data)
	}
	if e := c.Err().Error(); e != "closed by this side with ENHANCE_YOUR_CALM: enough" {
		t.Error(e)
	}
	if _, err := c.OpenStream(requestHead, true, unsent); err == nil || !err.Unprocessed {
		t.Errorf("%v", err)
	}
	if _, err := c.Ping(testContext(t)); err == nil {
		t.Error("ping after the end")
	}
}

func TestPing(t *testing.T) {
	c, p := clientAgainst(t, Config{}, wiretest.Options{NoPingAck: true})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		p.ExpectPing()
		cancel()
	}()
	if _, err := c.Ping(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	go func() {
		f := p.ExpectPing()
		p.WritePing(true, [8]byte{9}) // somebody else's
		p.WritePing(true, [8]byte(f.Data))
	}()
	if rtt, err := c.Ping(testContext(t)); err != nil || rtt <= 0 || c.Stats().RTT != rtt {
		t.Error(rtt, err)
	}
	go func() {
		p.ExpectPing()
		p.Close()
	}()
	var e *Error
	if _, err := c.Ping(testContext(t)); !errors.As(err, &e) || e.Kind != KindConnLost {
		t.Error(err)
	}
}

// A relay in small: what one connection's reader hands to others is flushed once per batch.
func TestFlushAfter(t *testing.T) {
	up, upPeer := clientAgainst(t, Config{})
	<-up.Ready()
	a := newCalls(t)
	var batches atomic.Int32
	down, peer := serverAgainst(t, Config{OnBatch: func(*Conn) { batches.Add(1) }}, func(s *Stream, f []Field, end bool) Receiver {
		if _, err := up.OpenStream(f, end, a.accept(s, f, end)); err != nil {
			t.Error(err)
		}
		s.Conn().FlushAfter(up)
		s.Conn().FlushAfter(up)
		s.Conn().FlushAfter(s.Conn())
		return newRecorder(t)
	})
	peer.Barrier()
	before := up.Stats().Flushes
	var ids []uint32
	peer.Batch(func() {
		for range 20 {
			ids = append(ids, peer.Open(wiretest.Request("a", "/s/m"), true))
		}
	})
	for range ids {
		upPeer.ExpectHeaders()
	}
	if n := up.Stats().Flushes - before; n > 3 {
		t.Errorf("%d flushes for one batch of 20 calls", n)
	}
	if batches.Load() == 0 || down.Err() != nil {
		t.Error(batches.Load(), down.Err())
	}
}

func TestErrorTexts(t *testing.T) {
	cause := errors.New("cause")
	for _, tt := range []struct {
		e    Error
		want string
	}{
		{Error{Kind: KindReset, Code: RefusedStream, Remote: true}, "stream reset by peer: REFUSED_STREAM"},
		{Error{Kind: KindReset, Code: Cancel}, "stream reset: CANCEL"},
		{Error{Kind: KindGoAway, Code: EnhanceYourCalm, Debug: "too_many_pings"}, `peer sent GOAWAY ENHANCE_YOUR_CALM "too_many_pings"`},
		{Error{Kind: KindConnLost, Err: cause}, "connection lost: cause"},
		{Error{Kind: KindConnLost, Code: InternalError, Debug: "x", Err: cause}, `connection lost after GOAWAY INTERNAL_ERROR "x": cause`},
		{Error{Kind: KindProtocol, Code: ProtocolError, Debug: "rule"}, "peer broke the protocol: PROTOCOL_ERROR: rule"},
		{Error{Kind: KindTimeout, Debug: "what"}, "timeout: what"},
		{Error{Kind: KindHeaderListSize, Code: Cancel}, "header list too large"},
		{Error{Kind: KindLocal}, "closed by this side"},
		{Error{Kind: KindNoCapacity}, "no stream free"},
		{Error{Kind: KindNotHTTP2, Debug: `"HTTP/1.1"`}, `peer does not speak HTTP/2: "HTTP/1.1"`},
		{Error{Kind: 77}, "kind(77)"},
	} {
		if got := tt.e.Error(); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
	if !errors.Is(&Error{Kind: KindConnLost, Err: cause}, cause) {
		t.Error("the cause is lost")
	}
	var names []string
	for k := KindReset; k <= KindNotHTTP2; k++ {
		names = append(names, k.String())
	}
	if slices.Contains(names, "") || len(slices.Compact(names)) != 10 {
		t.Error(names)
	}
}

// A connection over a unix socket works like TCP, and is tried without blocking as well.
func TestUnixSocket(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Skip(err)
	}
	defer l.Close()
	got := make(chan net.Conn, 1)
	go func() {
		nc, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		got <- nc
	}()
	nc, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client, _ := join(t, nc, <-got, Config{}, Config{}, acceptEcho)
	r := newRecorder(t)
	s := mustOpen(t, client, false, r)
	if _, err := s.TryWrite([]byte("abc"), true); err != nil {
		t.Fatal(err)
	}
	client.Flush()
	r.want("head" + text(responseHead) + " false")
	r.want("data 3 false")
	r.want("trailers" + text(okTrailers))
}

// Who waits for the rest of a frame does not hold a read buffer meanwhile.
func TestPartialFrames(t *testing.T) {
	a, b := tcpPair(t)
	server := Server(b, Config{}, acceptEcho)
	client := Client(a, Config{})
	<-client.Ready()
	until(t, "all is quiet", func() bool { return server.Stats().SettingsAcked && client.Stats().SettingsAcked })
	for _, size := range []int{10, 500, 513, 5000, 16383, 16384} {
		r := newRecorder(t)
		s := mustOpen(t, client, false, r)
		if n, err := s.TryWrite(make([]byte, size), true); n != size || err != nil {
			t.Fatal(n, err)
		}
		client.mu.Lock()
		whole := client.takeLocked().b
		client.inflight = 0
		client.mu.Unlock()
		for _, cut := range []int{1, 8, 9, 40, len(whole) - 1} {
			if cut >= len(whole) {
				continue
			}
			before := server.Stats().BytesIn
			if _, err := a.Write(whole[:cut]); err != nil {
				t.Fatal(err)
			}
			whole = whole[cut:]
			until(t, "read", func() bool { return server.Stats().BytesIn >= before+uint64(cut) })
		}
		if _, err := a.Write(whole); err != nil {
			t.Fatal(err)
		}
		r.want("head" + text(responseHead) + " false")
		for got := 0; got < size; {
			var n int
			var end bool
			line := <-r.ev
			if _, err := fmt.Sscanf(line, "data %d %t", &n, &end); err != nil {
				t.Fatal(line)
			}
			got += n
		}
		r.want("trailers" + text(okTrailers))
	}
	closeAndWait(t, client)
	closeAndWait(t, server)
}
