package h2

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// calmed expects that the connection was closed as an attack.
func calmed(t *testing.T, c *Conn, p *wiretest.Conn) Stats {
	t.Helper()
	wait(t, c.Done())
	if e := c.Err(); e.Kind != KindProtocol || e.Code != EnhanceYourCalm {
		t.Fatalf("ended with %v", e)
	}
	expectGoAway(t, p, http2.ErrCodeEnhanceYourCalm)
	st := c.Stats()
	if st.FloodsStopped != 1 {
		t.Errorf("%+v", st)
	}
	return st
}

// flood repeats f until the connection is over.
func flood(t *testing.T, c *Conn, p *wiretest.Conn, f func(i int)) Stats {
	t.Helper()
	for i := 0; c.Err() == nil; i++ {
		if i > 100000 {
			t.Fatal("nothing stops it")
		}
		p.Batch(func() {
			for range 50 {
				f(i)
			}
		})
	}
	return calmed(t, c, p)
}

func TestFloods(t *testing.T) {
	for name, tt := range map[string]struct {
		frame func(p *wiretest.Conn) func(int)
		count func(Stats) uint64
		most  uint64
	}{
		"SETTINGS": {
			func(p *wiretest.Conn) func(int) { return func(int) { p.WriteSettings() } },
			func(s Stats) uint64 { return s.SettingsIn }, 200,
		},
		"PING": {
			func(p *wiretest.Conn) func(int) { return func(int) { p.WritePing(false, [8]byte{}) } },
			func(s Stats) uint64 { return s.PingsIn }, 1000,
		},
		"empty DATA": {func(p *wiretest.Conn) func(int) {
			p.Open(wiretest.Request("a", "/s/m"), false)
			return func(int) { p.WriteData(1, nil, false) }
		}, func(s Stats) uint64 { return s.EmptyData }, 200},
		"WINDOW_UPDATE": {
			func(p *wiretest.Conn) func(int) { return func(int) { p.WriteWindowUpdate(0, 1) } },
			func(s Stats) uint64 { return s.WindowUpdatesIn }, 40000,
		},
		"PRIORITY": {func(p *wiretest.Conn) func(int) {
			return func(int) { p.WriteFrame(http2.FramePriority, 0, 1, make([]byte, 5)) }
		}, func(s Stats) uint64 { return s.Ignored }, 40000},
		"unknown frames": {
			func(p *wiretest.Conn) func(int) { return func(int) { p.WriteFrame(0xfa, 0, 0, nil) } },
			func(s Stats) uint64 { return s.Ignored }, 40000,
		},
		"rapid reset": {func(p *wiretest.Conn) func(int) {
			return func(int) { p.WriteReset(p.Open(wiretest.Request("a", "/s/m"), true), http2.ErrCodeCancel) }
		}, func(s Stats) uint64 { return s.PrematureResets }, 1500},
		"made you reset: WINDOW_UPDATE of 0": {func(p *wiretest.Conn) func(int) {
			return func(int) { p.WriteWindowUpdate(p.Open(wiretest.Request("a", "/s/m"), true), 0) }
		}, func(s Stats) uint64 { return s.InducedResets }, 1500},
		"made you reset: malformed, with an empty block": {func(p *wiretest.Conn) func(int) {
			id := uint32(1)
			return func(int) { p.WriteHeaderBlock(id, nil, true, true); id += 2 }
		}, func(s Stats) uint64 { return s.InducedResets }, 1500},
		"made you reset: DATA on closed streams": {func(p *wiretest.Conn) func(int) {
			return func(int) {
				id := p.Open(wiretest.Request("a", "/s/m"), true)
				p.WriteReset(id, http2.ErrCodeCancel)
				p.WriteData(id, nil, true)
			}
		}, func(s Stats) uint64 { return s.InducedResets }, 1500},
		"above MAX_CONCURRENT_STREAMS": {func(p *wiretest.Conn) func(int) {
			return func(int) { p.Open(wiretest.Request("a", "/s/m"), false) }
		}, func(s Stats) uint64 { return s.Refused }, 2000},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := serverAgainst(t, Config{}, func(*Stream, []Field, bool) Receiver { return &sink{} },
				wiretest.Options{DiscardData: true})
			p.ExpectSettingsAck()
			st := flood(t, c, p, tt.frame(p))
			if n := tt.count(st); n == 0 || n > tt.most {
				t.Errorf("counted %d, want 1 to %d: %+v", n, tt.most, st)
			}
		})
	}
}

// A client whose calls all run into deadlines, at a rate no attacker would be content with, is left alone.
func TestCancelledCallsAreNoAttack(t *testing.T) {
	c, p := serverAgainst(t, Config{}, func(s *Stream, _ []Field, _ bool) Receiver {
		_ = s.WriteHeaders(responseHead, false)
		return &sink{}
	})
	for range 3000 {
		p.WriteReset(p.Open(wiretest.Request("a", "/s/m"), true), http2.ErrCodeCancel)
	}
	p.Barrier()
	if st := c.Stats(); c.Err() != nil || st.ResetsIn != 3000 || st.PrematureResets != 0 {
		t.Errorf("%v %+v", c.Err(), st)
	}
}

// What every call may bring along is no attack, however many calls a connection has carried.
func TestManyCallsAreNoAttack(t *testing.T) {
	const calls = 1500
	for name, write := range map[string]func(p *wiretest.Conn, id uint32){
		"empty DATA": func(p *wiretest.Conn, id uint32) {
			p.WriteHeaders(id, wiretest.Head(), false)
			p.WriteData(id, nil, false)
			p.WriteData(id, []byte("x"), false)
			p.WriteData(id, nil, false)
			p.WriteHeaders(id, wiretest.Fields("grpc-status", "0"), true)
		},
		"informational responses": func(p *wiretest.Conn, id uint32) {
			p.WriteHeaders(id, wiretest.Fields(":status", "103"), false)
			p.WriteHeaders(id, wiretest.Head("grpc-status", "0"), true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := clientAgainst(t, Config{})
			<-c.Ready()
			for range calls {
				mustOpen(t, c, true, newRecorderOf(t, 4))
			}
			c.Flush()
			p.Batch(func() {
				for range calls {
					write(p, p.ExpectHeaders().Stream)
				}
			})
			until(t, "all calls have ended", func() bool { return c.Streams() == 0 })
			if c.Err() != nil {
				t.Error(c.Err())
			}
		})
	}
	t.Run("empty DATA among others", func(t *testing.T) {
		a := newCalls(t)
		c, p := serverAgainst(t, Config{}, a.accept)
		id := p.Open(wiretest.Request("a", "/s/m"), false)
		a.next()
		p.Batch(func() {
			for range calls {
				p.WriteData(id, nil, false)
				p.WriteData(id, []byte("x"), false)
			}
		})
		p.Barrier()
		if st := c.Stats(); st.EmptyData != calls {
			t.Errorf("%+v", st)
		}
	})
}

func TestContinuationFlood(t *testing.T) {
	for name, tt := range map[string]struct {
		piece int
		most  uint64
	}{"empty": {0, 10}, "tiny": {1, 300}, "large": {16384, 3}} {
		t.Run(name, func(t *testing.T) {
			c, p := serverAgainst(t, Config{MaxHeaderListSize: 8 << 10}, acceptEcho)
			p.Barrier() // the SETTINGS acknowledgement is out and cannot come in between
			p.WriteHeaderBlock(1, nil, true, false)
			piece := bytes.Repeat([]byte{0}, tt.piece)
			st := flood(t, c, p, func(int) { p.WriteContinuation(1, piece, false) })
			if st.Continuations == 0 || st.Continuations > tt.most {
				t.Errorf("%d CONTINUATION frames", st.Continuations)
			}
		})
	}
}

func TestHeaderListSize(t *testing.T) {
	large := wiretest.Request("a", "/s/m", "x-indexed", "1", "x-large", strings.Repeat("x", 9000), "x-last", "2")
	t.Run("request", func(t *testing.T) {
		a := newCalls(t)
		c, p := serverAgainst(t, Config{MaxHeaderListSize: 8 << 10}, a.accept)
		if h := p.CollectAll(p.Open(large, false)); h.Sequence() != "HEADERS+END_STREAM RST_STREAM(NO_ERROR)" || h.Get(":status") != "" && wiretest.Get(h.Head, ":status") != "431" {
			t.Errorf("%s %v", h.Sequence(), h.Head)
		}
		// The table is in step: the field after the large one was indexed too.
		p.Open(wiretest.Request("a", "/s/m", "x-indexed", "1", "x-last", "2"), true)
		if _, _, head := a.next(); !strings.HasSuffix(head, "x-indexed=1 x-last=2 true") {
			t.Error(head)
		}
		if st := c.Stats(); st.OversizedHeaders != 1 {
			t.Errorf("%+v", st)
		}
	})
	t.Run("request, own answer", func(t *testing.T) {
		_, p := serverAgainst(t, Config{MaxHeaderListSize: 8 << 10, OnOversized: func(s *Stream, f []Field) {
			_ = s.WriteHeaders([]Field{{Name: ":status", Value: "200"}, {Name: "grpc-status", Value: "8"}, {Name: "path", Value: f[2].Value}}, true)
		}}, acceptEcho)
		if h := p.CollectAll(p.Open(large, true)); h.Sequence() != "HEADERS+END_STREAM" || wiretest.Get(h.Head, "path") != "/s/m" {
			t.Errorf("%s %v", h.Sequence(), h.Head)
		}
	})
	t.Run("response", func(t *testing.T) {
		c, p := clientAgainst(t, Config{MaxHeaderListSize: 8 << 10})
		r := newRecorder(t)
		mustOpen(t, c, true, r)
		c.Flush()
		p.ExpectHeaders()
		p.WriteHeaders(1, wiretest.Head(), false)
		p.WriteHeaders(1, wiretest.Fields("x", strings.Repeat("x", 9000)), true)
		r.want("head" + text(wiretest.Head()) + " false")
		r.want("reset header_list_size CANCEL remote=false unprocessed=false")
		if code := p.ExpectReset(1); code != http2.ErrCodeCancel {
			t.Error(code)
		}
	})
	t.Run("the peer's", func(t *testing.T) {
		// RFC 9113 section 10.5.1: the limit is advisory, but what goes beyond it is refused by most.
		c, p := clientAgainst(t, Config{})
		large := wiretest.Request("h", "/s/m", "x", strings.Repeat("x", 9000))
		for _, tt := range []struct {
			limit uint32
			ok    bool
		}{{0, true}, {9000, false}, {uint32(listSize(large)) - 1, false}, {uint32(listSize(large)), true}} {
			p.WriteSettings(http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: tt.limit})
			p.Barrier()
			s, err := c.OpenStream(large, true, newRecorder(t))
			if tt.ok {
				if err != nil {
					t.Fatalf("limit %d: %v", tt.limit, err)
				}
				c.Flush()
				if f := p.ExpectHeaders(); f.Stream != s.ID() || len(f.Get("x")) != 9000 {
					t.Errorf("limit %d: %v", tt.limit, f)
				}
			} else if err == nil || err.Kind != KindHeaderListSize || !err.Remote || !err.Unprocessed || err.Connection {
				t.Errorf("limit %d: %+v", tt.limit, err)
			}
		}
	})
	t.Run("many references to one entry", func(t *testing.T) {
		// 4,000 bytes on the wire that stand for 16 MB.
		c, p := serverAgainst(t, Config{MaxHeaderListSize: 64 << 10}, acceptEcho)
		block := p.Encode(wiretest.Request("a", "/s/m", "x-bomb", strings.Repeat("x", 4000)))
		block = append(block, bytes.Repeat([]byte{0x80 | 62}, 4000)...)
		p.WriteHeaderBlock(1, block, true, true)
		if h := p.Collect(1); wiretest.Get(h.Head, ":status") != "431" {
			t.Errorf("%s %v", h.Sequence(), h.Head)
		}
		if c.Err() != nil {
			t.Error(c.Err())
		}
	})
	t.Run("1 MiB passes", func(t *testing.T) {
		client, _ := pair(t, Config{}, Config{}, func(s *Stream, f []Field, _ bool) Receiver {
			_ = s.WriteHeaders([]Field{{Name: ":status", Value: "200"}, f[len(f)-1]}, true)
			return nil
		})
		b := NewBlocking()
		if _, err := client.OpenStream(append(requestHead[:6:6], Field{Name: "x", Value: strings.Repeat("y", 1000_000)}), true, b); err != nil {
			t.Fatal(err)
		}
		client.Flush()
		head, err := b.WaitHead(testContext(t))
		if err != nil || len(head[1].Value) != 1000_000 {
			t.Error(err)
		}
	})
}

func TestMaxConcurrentStreams(t *testing.T) {
	a := newCalls(t)
	c, p := serverAgainst(t, Config{MaxStreams: 2}, a.accept)
	p.Open(wiretest.Request("a", "/1"), false)
	half := p.Open(wiretest.Request("a", "/2"), true) // half-closed ones count
	third := p.Open(wiretest.Request("a", "/3"), true)
	if code := p.ExpectReset(third); code != http2.ErrCodeRefusedStream {
		t.Error(code)
	}
	a.next()
	_, s, _ := a.next()
	_ = s.WriteHeaders(responseHead, true)
	c.Flush()
	p.Collect(half)
	p.Open(wiretest.Request("a", "/4"), true)
	if _, _, head := a.next(); !strings.Contains(head, ":path=/4") {
		t.Error(head)
	}
	if c.Err() != nil || c.Stats().Refused != 1 {
		t.Error(c.Err())
	}
}

func TestTimeouts(t *testing.T) {
	short := Config{SettingsTimeout: 50 * time.Millisecond}
	over := func(t *testing.T, c *Conn, code ErrCode, debug string) {
		t.Helper()
		wait(t, c.Done())
		if e := c.Err(); e.Kind != KindTimeout || e.Code != code || e.Debug != debug {
			t.Errorf("%v", e)
		}
	}
	t.Run("no preface", func(t *testing.T) {
		addr, conns := serve(t, short, acceptEcho)
		nc := wiretest.DialRaw(t, addr)
		over(t, <-conns, SettingsTimeout, "no SETTINGS from the peer")
		if b, err := io.ReadAll(nc); err != nil || len(b) == 0 {
			t.Error("no GOAWAY", b, err)
		}
		nc.Close()
	})
	t.Run("no SETTINGS", func(t *testing.T) {
		c, p := clientAgainst(t, short, wiretest.Options{NoSettings: true, NoSettingsAck: true})
		r := newRecorder(t)
		mustOpen(t, c, true, r)
		c.Flush()
		expectGoAway(t, p, http2.ErrCodeSettingsTimeout)
		over(t, c, SettingsTimeout, "no SETTINGS from the peer")
		r.want("reset timeout SETTINGS_TIMEOUT remote=false unprocessed=false")
	})
	t.Run("no acknowledgement", func(t *testing.T) {
		c, p := serverAgainst(t, short, acceptEcho, wiretest.Options{NoSettingsAck: true})
		expectGoAway(t, p, http2.ErrCodeSettingsTimeout)
		over(t, c, SettingsTimeout, "the peer does not acknowledge SETTINGS")
	})
	t.Run("unfinished header block", func(t *testing.T) {
		c, p := serverAgainst(t, short, acceptEcho)
		p.Barrier()
		p.WriteHeaderBlock(1, []byte{0x82}, true, false)
		expectGoAway(t, p, http2.ErrCodeEnhanceYourCalm)
		over(t, c, EnhanceYourCalm, "unfinished header block")
	})
	t.Run("all is well", func(t *testing.T) {
		c, p := serverAgainst(t, Config{SettingsTimeout: time.Second}, acceptEcho) // a machine may stand still for longer than short
		p.ExpectSettingsAck()
		until(t, "acknowledged", func() bool { return c.Stats().SettingsAcked })
		until(t, "the timer has come and gone", func() bool { return timerAt(c) == 0 })
		p.Barrier()
	})
}

func timerAt(c *Conn) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.timerAt
}

func TestKeepalive(t *testing.T) {
	cfg := Config{PingInterval: 30 * time.Millisecond, PingTimeout: 50 * time.Millisecond}
	t.Run("answered", func(t *testing.T) {
		patient := cfg
		patient.PingTimeout = 5 * time.Second // the peer may have to wait for its turn to answer
		c, p := clientAgainst(t, patient)
		mustOpen(t, c, true, newRecorder(t))
		c.Flush()
		for range 5 {
			p.ExpectPing()
		}
		if c.Err() != nil {
			t.Error(c.Err())
		}
	})
	t.Run("unanswered", func(t *testing.T) {
		c, p := clientAgainst(t, cfg, wiretest.Options{NoPingAck: true})
		r := newRecorder(t)
		mustOpen(t, c, true, r)
		c.Flush()
		p.ExpectPing()
		r.want("reset timeout NO_ERROR remote=false unprocessed=false")
		wait(t, c.Done())
		if e := c.Err().Error(); e != "timeout: no answer to a keepalive PING" {
			t.Error(e)
		}
	})
	t.Run("not without streams", func(t *testing.T) {
		c, p := clientAgainst(t, cfg)
		<-c.Ready()
		start := timerAt(c)
		until(t, "some intervals have passed", func() bool { return timerAt(c) > start+3*int64(cfg.PingInterval) })
		p.Barrier()
		for _, f := range p.Untaken(0) {
			if f.Type == http2.FramePing && !f.Ack() {
				t.Error("PING without streams")
			}
		}
	})
	t.Run("without streams, permitted", func(t *testing.T) {
		cfg := cfg
		cfg.PingWithoutStreams = true
		_, p := clientAgainst(t, cfg)
		p.ExpectPing()
	})
}

func TestIdleTimeout(t *testing.T) {
	idle := make(chan struct{}, 10)
	c, p := clientAgainst(t, Config{IdleTimeout: 60 * time.Millisecond, SettingsTimeout: 100 * time.Millisecond, OnIdle: func(*Conn) { idle <- struct{}{} }})
	r := newRecorder(t)
	mustOpen(t, c, true, r)
	c.Flush()
	p.ExpectHeaders()
	// The timer fires once for the time before the stream, which keeps the connection alive.
	until(t, "the timer has come and gone", func() bool { return timerAt(c) == 0 })
	p.WriteHeaders(1, wiretest.Head(), true)
	r.want("head" + text(wiretest.Head()) + " true")
	wait(t, idle)
	expectGoAway(t, p, http2.ErrCodeNo)
	wait(t, c.Done())
	if e := c.Err(); e.Kind != KindLocal {
		t.Error(e)
	}
}

// The idle timeout counts from the peer's SETTINGS on: until then the connection is being made, and SettingsTimeout is what
// bounds that.
func TestIdleTimeoutStartsWithSettings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		c := Client(a, Config{IdleTimeout: time.Second})
		go func() { _, _ = io.Copy(io.Discard, b) }()
		time.Sleep(5 * time.Second) // on the bubble's clock
		if c.Draining() {
			t.Fatalf("idle before it was ready: %v", c.Err())
		}
		if _, err := b.Write([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
		<-c.Ready()
		time.Sleep(time.Second - time.Nanosecond)
		if c.Draining() {
			t.Errorf("idle too soon: %v", c.Err())
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if !c.Draining() {
			t.Error("not idle in time")
		}
		b.Close()
		<-c.Done()
	})
}

// A peer that sends requests and reads no answers fills neither memory nor time.
func TestPeerThatNeverReads(t *testing.T) {
	large := Field{Name: "x-large", Value: strings.Repeat("\xff", 4000), Sensitive: true}
	cfg := Config{MaxPending: 64 << 10, WriteTimeout: 300 * time.Millisecond}
	c, p := serverAgainst(t, cfg, func(s *Stream, _ []Field, _ bool) Receiver {
		_ = s.WriteHeaders([]Field{{Name: ":status", Value: "200"}, large}, true)
		return nil
	})
	p.ExpectSettingsAck()
	p.Pause()
	for range 20000 {
		if c.Err() != nil {
			break
		}
		p.Open(wiretest.Request("a", "/s/m"), true)
	}
	wait(t, c.Done())
	if e := c.Err(); e.Kind != KindTimeout || e.Debug != "the peer reads nothing" {
		t.Errorf("%v", e)
	}
	if st := c.Stats(); st.ReaderStalls == 0 || st.PendingPeak > 2*cfg.MaxPending+framesPerLook*5000 {
		t.Errorf("%+v", st)
	}
	p.Resume()
}

// A peer that reads nothing makes us queue only so many answers. Calls this side has given up are none.
func TestAnswersThatWait(t *testing.T) {
	t.Run("forced", func(t *testing.T) {
		wiretest.CheckLeaks(t)
		a, b := net.Pipe()
		c := Server(b, Config{ResetBudget: 1 << 20}, acceptEcho)
		hello := append([]byte(clientPreface), 0, 0, 0, 4, 0, 0, 0, 0, 0)
		if _, err := a.Write(hello); err != nil {
			t.Fatal(err)
		}
		// Requests without any field are malformed: each is answered with RST_STREAM, which nobody reads.
		for id := uint32(1); c.Err() == nil && id < 4*maxControls; id += 2 {
			if _, err := a.Write(binary.BigEndian.AppendUint32([]byte{0, 0, 0, 1, 5}, id)); err != nil {
				break
			}
		}
		a.Close()
		wait(t, c.Done())
		if e := c.Err(); e.Code != EnhanceYourCalm || e.Debug != "too many answers to control frames wait for the peer" {
			t.Error(e)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		c, p := clientAgainst(t, Config{MaxPending: 64 << 20}) // nothing is flushed
		<-c.Ready()
		p.ExpectSettingsAck()
		for range maxControls + 1000 {
			mustOpen(t, c, true, nil).Reset(Cancel)
		}
		p.Barrier() // a frame from the peer makes the reader look
		if c.Err() != nil {
			t.Error(c.Err())
		}
	})
}

// Calls to a peer that reads nothing: what waits for the socket is bounded, and when the peer reads on there is room again.
func TestHeadersThatWait(t *testing.T) {
	const size = 32 << 10
	told := make(chan struct{}, 1)
	cfg := Config{MaxPending: 64 << 10, OnCapacity: func(*Conn) {
		select {
		case told <- struct{}{}:
		default:
		}
	}}
	c, p := clientAgainst(t, cfg)
	<-c.Ready()
	p.ExpectSettingsAck()
	p.Pause()
	large := append(slices.Clip(requestHead), Field{Name: "x", Value: strings.Repeat("\xff", size), Sensitive: true})
	var refused *Error
	for range 5000 {
		_, err := c.OpenStream(large, true, newRecorderOf(t, 1))
		if err != nil {
			refused = err
			break
		}
		c.Flush()
	}
	if refused == nil || refused.Kind != KindNoCapacity || !refused.Unprocessed {
		t.Fatalf("%v", refused)
	}
	if st := c.Stats(); st.Pending > cfg.MaxPending+2*size {
		t.Errorf("%d bytes wait", st.Pending)
	}
	p.Resume()
	wait(t, told)
	until(t, "room", func() bool { return c.Available() > 0 })
	r := newRecorder(t)
	s := mustOpen(t, c, true, r)
	c.Flush()
	p.Expect("the call's head", func(f wiretest.Frame) bool { return f.Type == http2.FrameHeaders && f.Stream == s.ID() })
}

// slowReads is a connection whose reader takes its time.
type slowReads struct{ net.Conn }

func (c slowReads) Read(p []byte) (int, error) {
	<-time.After(time.Millisecond)
	return c.Conn.Read(p[:min(len(p), 8<<10)])
}

// More new calls than the socket takes: those that wait are let in when messages of the older ones are, too, and not each time
// that a little has left, which would keep everything else waiting, the reader included.
func TestRoomForNewStreams(t *testing.T) {
	wiretest.CheckLeaks(t)
	a, b := net.Pipe()
	server := Server(slowReads{b}, Config{MaxStreams: 1 << 20, ResetBudget: 1 << 20}, acceptEcho)
	const most = 64 << 10
	room := make(chan int, 1)
	c := Client(a, Config{MaxPending: most, OnCapacity: func(c *Conn) {
		if c.Available() > 0 {
			select {
			case room <- c.Stats().Pending:
			default:
			}
		}
	}})
	defer closeAndWait(t, server)
	defer closeAndWait(t, c)
	<-c.Ready()
	large := append(slices.Clip(requestHead), Field{Name: "x", Value: strings.Repeat("\xff", 8<<10), Sensitive: true})
	for range 3 {
		for {
			if _, err := c.OpenStream(large, true, newRecorderOf(t, 10)); err != nil {
				break
			}
			c.FlushSoon()
			select {
			case <-room: // that was before it was full
			default:
			}
		}
		select {
		case n := <-room:
			if n > most/2 {
				t.Errorf("let in with %d bytes waiting of %d at most", n, most)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("no room")
		}
	}
	if n := c.Stats().ReaderStalls; n > 0 {
		t.Errorf("the reader was stopped %d times", n)
	}
}
