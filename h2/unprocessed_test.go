package h2

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// What is told Unprocessed for never having been sent is never sent, and what may have left is not told so: a stream waits for
// the socket, behind one that is being written, when the connection ends for one reason or another.
func TestUnprocessedNeverLeaves(t *testing.T) {
	for name, end := range map[string]func(c *Conn, p *wiretest.Conn){
		"Close":            func(c *Conn, _ *wiretest.Conn) { c.Close(NoError, "") },
		"violation":        func(_ *Conn, p *wiretest.Conn) { p.WriteFrame(http2.FramePushPromise, 0, 1, make([]byte, 8)) },
		"refused SETTINGS": func(_ *Conn, p *wiretest.Conn) { p.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1}) },
		"GOAWAY":           func(_ *Conn, p *wiretest.Conn) { p.WriteGoAway(0, http2.ErrCodeNo, "") },
		"half-close":       func(_ *Conn, p *wiretest.Conn) { p.CloseWrite() },
		"timeout": func(c *Conn, _ *wiretest.Conn) {
			c.end(&Error{Kind: KindTimeout, Debug: "no answer to a keepalive PING"}, true)
		},
	} {
		for _, under := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, writer under way %t", name, under), func(t *testing.T) {
				c, p := clientAgainst(t, Config{}, wiretest.Options{DiscardData: true})
				settled(t, c)
				var left *Stream
				release := func() {}
				if under {
					left, release = holdWrite(t, c)
					p.ExpectOn(left.ID(), http2.FrameHeaders)
				}
				r := newRecorder(t)
				s := mustOpen(t, c, false, r)
				if n, err := s.TryWrite([]byte("charge the card"), true); n != 15 || err != nil {
					t.Fatal(n, err)
				}
				end(c, p)
				until(t, "the stream is told", func() bool { return r.stream() != nil })
				if err := s.Err(); err == nil || !err.Unprocessed {
					t.Errorf("a stream that has not left was told %+v, want Unprocessed", err)
				}
				if left != nil && name != "GOAWAY" { // GOAWAY itself says that it is not processed
					until(t, "the other stream is told", left.Closed)
					if err := left.Err(); err == nil || err.Unprocessed {
						t.Errorf("a stream that has left was told %+v, want not Unprocessed", err)
					}
				}
				release()
				c.Flush()
				p.ExpectClosed()
				silence(t, p, s.ID())
			})
		}
	}
}

// A stream that has not left may be reset by its owner when the connection is over and its receiver was not told yet. The peer
// gets no RST_STREAM for what it has never heard of.
func TestResetWhenAbandoned(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	settled(t, c)
	busy := &busyReader{reached: make(chan struct{}), goOn: make(chan struct{})}
	first := mustOpen(t, c, true, busy)
	c.Flush()
	p.ExpectOn(first.ID(), http2.FrameHeaders)
	p.WriteHeaders(first.ID(), wiretest.Head(), false)
	wait(t, busy.reached)
	r := newRecorder(t)
	s := mustOpen(t, c, false, r)
	c.Close(NoError, "")
	if n, err := s.TryWrite([]byte("x"), true); n != 0 || err == nil || !err.Unprocessed {
		t.Errorf("%d bytes were taken, %+v; want Unprocessed", n, err)
	}
	s.Reset(Cancel)
	close(busy.goOn)
	p.ExpectClosed()
	silence(t, p, s.ID())
	r.none()
}

// busyReader keeps its connection's reader busy with a head.
type busyReader struct {
	sink
	reached, goOn chan struct{}
}

func (r *busyReader) RecvHead(*Stream, []Field, bool) {
	close(r.reached)
	<-r.goOn
}

// A writer under way that fails: what it has not come to has not left.
func TestUnprocessedAfterWriteError(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	settled(t, c)
	left, release := holdWrite(t, c)
	p.ExpectOn(left.ID(), http2.FrameHeaders)
	r := newRecorder(t)
	s := mustOpen(t, c, true, r)
	failed := errors.New("the wire is cut")
	c.sock.writeFn = func(uintptr) bool { c.sock.err = failed; return true } // nobody else writes until release
	release()
	until(t, "the write has failed", func() bool { return c.Available() == 0 })
	p.Close()
	until(t, "the stream is told", func() bool { return r.stream() != nil })
	if err := s.Err(); err == nil || !err.Unprocessed || !errors.Is(err, failed) {
		t.Errorf("%+v, want a lost connection, Unprocessed", err)
	}
	until(t, "the other stream is told", left.Closed)
	if err := left.Err(); err == nil || err.Unprocessed {
		t.Errorf("%+v, want a lost connection, not Unprocessed", err)
	}
}

// A peer may send GOAWAY, or refuse a stream, that it does not know yet.
func TestRefusedBeforeItLeaves(t *testing.T) {
	for name, refuse := range map[string]func(p *wiretest.Conn, id uint32){
		"GOAWAY":     func(p *wiretest.Conn, _ uint32) { p.WriteGoAway(1, http2.ErrCodeNo, "") },
		"RST_STREAM": func(p *wiretest.Conn, id uint32) { p.WriteReset(id, http2.ErrCodeRefusedStream) },
	} {
		t.Run(name, func(t *testing.T) {
			c, p := clientAgainst(t, Config{})
			settled(t, c)
			first := mustOpen(t, c, false, newRecorder(t))
			c.Flush()
			p.ExpectOn(first.ID(), http2.FrameHeaders)
			_, release := holdWrite(t, c)
			r := newRecorder(t)
			s := mustOpen(t, c, true, r)
			refuse(p, s.ID())
			until(t, "the stream is told", func() bool { return r.stream() != nil })
			if err := s.Err(); err == nil || !err.Unprocessed {
				t.Errorf("%+v, want Unprocessed", err)
			}
			release()
			c.Flush()
			p.Barrier()
			silence(t, p, s.ID())
			if err := c.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Only who speaks another protocol has certainly understood nothing.
func TestUnprocessedByStrangers(t *testing.T) {
	for _, tt := range []struct {
		says        string
		unprocessed bool
	}{
		{"HTTP/1.1 400 Bad Request\r\n\r\n", true},
		{"\x15\x03\x01\x00\x02\x02\x16", true},              // a TLS alert
		{"SSH-2.0-OpenSSH_9.2p1\r\n", true},                 //
		{"\x00\x00\x08\x06\x00\x00\x00\x00\x00", false},     // PING
		{"\x00\x00\x01\x01\x05\x00\x00\x00\x03\x88", false}, // HEADERS on a stream that we have not opened
		{"\x00\x00", false},
	} {
		wiretest.CheckLeaks(t)
		mine, theirs := tcpPair(t)
		c := Client(mine, Config{})
		s := mustOpen(t, c, true, newRecorder(t))
		c.Flush()
		fr := http2.NewFramer(nil, theirs)
		if _, err := io.ReadFull(theirs, make([]byte, len(clientPreface))); err != nil {
			t.Fatal(err)
		}
		for seen := false; !seen; {
			f, err := fr.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			_, seen = f.(*http2.HeadersFrame)
		}
		if _, err := io.WriteString(theirs, tt.says); err != nil {
			t.Fatal(err)
		}
		_ = theirs.(*net.TCPConn).CloseWrite()
		wait(t, c.Done())
		if err := s.Err(); err == nil || err.Unprocessed != tt.unprocessed {
			t.Errorf("%q: %+v, want Unprocessed %t", tt.says, err, tt.unprocessed)
		}
		_ = theirs.Close()
	}
}

// TestNoCallIsSeenTwice lets calls go from one peer to the next as long as they are told Unprocessed, while random things end
// streams and connections: violations, refused SETTINGS, GOAWAYs, refusals, resets, closes and aborts of the peer, Close and resets
// of ours, at random moments between opens, writes and flushes of several goroutines. No call may be seen by two peers unless
// all but the last have refused it on the wire.
func TestNoCallIsSeenTwice(t *testing.T) {
	for _, tt := range []struct {
		name    string
		seeds   uint64
		connect func(t testing.TB) (net.Conn, net.Conn)
	}{
		{"tcp", 20, tcpPair},
		{"tls", 6, tlsPair},
		{"pipe", 1, func(testing.TB) (net.Conn, net.Conn) { return net.Pipe() }}, // it takes its time to close, as the next
		{"wrapped", 1, func(t testing.TB) (net.Conn, net.Conn) { a, b := tcpPair(t); return wrapped{a}, b }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			again := 0
			for seed := range tt.seeds {
				rnd := rand.New(rand.NewPCG(seed, 3))
				seen := sightings{calls: make(map[int][]*sighting)}
				left := make([]int, 40)
				for i := range left {
					left[i] = i
				}
				for n := 0; n < 6 && len(left) > 0; n++ {
					left = seen.round(t, rnd, tt.connect, left)
					again += len(left)
				}
				for call, by := range seen.calls {
					for i, s := range by {
						if !s.refused && i < len(by)-1 {
							t.Errorf("seed %d: call %d was seen by %d peers, and number %d (%s) has not refused it", seed, call, len(by), i+1, s.peer)
						}
					}
				}
			}
			if again == 0 {
				t.Error("no call was sent again")
			}
		})
	}
}

// sighting is a call that a peer has seen.
type sighting struct {
	peer    string
	stream  uint32
	refused bool
}

type sightings struct {
	mu    sync.Mutex
	calls map[int][]*sighting
}

// round sends calls to a new peer, and returns those that were told Unprocessed.
func (all *sightings) round(t *testing.T, rnd *rand.Rand, connect func(testing.TB) (net.Conn, net.Conn), calls []int) (again []int) {
	a, b := connect(t)
	peer := &chaos{
		conn: b, event: events[rnd.IntN(len(events))], after: rnd.IntN(12), blind: rnd.IntN(2) == 0, refuse: rnd.IntN(3),
		last: uint32(rnd.IntN(30)), all: all, mine: make(map[uint32]*sighting),
	}
	c := Client(a, Config{MaxPending: 64 << 10})
	peer.over = c.Done()
	var wg sync.WaitGroup
	wg.Go(peer.serve)
	var mu sync.Mutex
	told := make(map[int]bool)
	retry := func(call int, err *Error) {
		mu.Lock()
		defer mu.Unlock()
		if err.Unprocessed && !told[call] {
			told[call] = true
			again = append(again, call)
		}
	}
	work := make(chan int, len(calls))
	for _, call := range calls {
		work <- call
	}
	close(work)
	closeAt := rnd.IntN(3 * len(calls)) // often never
	var openers sync.WaitGroup
	for range 3 {
		rnd := rand.New(rand.NewPCG(rnd.Uint64(), 1))
		openers.Go(func() {
			for call := range work {
				r := &lateral{told: func(err *Error) { retry(call, err) }}
				s, err := c.OpenStream(withFields("x-call", strconv.Itoa(call)), false, r)
				if err != nil {
					retry(call, err)
					continue
				}
				if rnd.IntN(3) > 0 {
					_, _ = s.TryWrite(make([]byte, 1+rnd.IntN(20000)), rnd.IntN(2) == 0)
				}
				switch rnd.IntN(4) {
				case 0:
					c.Flush()
				case 1:
					c.FlushSoon()
				}
				if rnd.IntN(8) == 0 {
					s.Reset(Cancel)
				}
				if call == closeAt {
					c.Close(NoError, "")
				}
			}
		})
	}
	openers.Wait()
	c.Flush()
	_, _ = c.Ping(testContext(t)) // the peer has got all calls, or the connection is over
	c.Close(NoError, "")
	wait(t, c.Done())
	wg.Wait()
	_ = b.Close()
	mu.Lock()
	defer mu.Unlock()
	return again
}

// lateral is a receiver that tells why its stream was reset.
type lateral struct{ told func(*Error) }

func (*lateral) RecvHead(*Stream, []Field, bool)      {}
func (*lateral) RecvData(s *Stream, p []byte, _ bool) { s.Consumed(len(p)) }
func (*lateral) RecvTrailers(*Stream, []Field)        {}
func (l *lateral) RecvReset(_ *Stream, err *Error)    { l.told(err) }

// chaos is a peer that records the calls it sees, and does something when it has seen some.
type chaos struct {
	conn  net.Conn
	event string
	after int             // it comes behind so many calls
	blind bool            // and then nothing is read until the connection is over at the other end
	over  <-chan struct{} // which that tells
	last  uint32          // identifier for GOAWAY
	// refuse: every third call is refused, beginning with that one; none if it is 0.
	refuse int

	all  *sightings
	mine map[uint32]*sighting
	away bool // GOAWAY was sent
	seen int
	fr   *http2.Framer
	dec  *hpack.Decoder
}

var events = []string{"violation", "settings", "window", "goaway", "goaway, then violation", "half-close", "abort", "none"}

// serve reads until the end.
func (p *chaos) serve() {
	r := bufio.NewReader(p.conn)
	if _, err := io.ReadFull(r, make([]byte, len(clientPreface))); err != nil {
		return
	}
	p.fr, p.dec = http2.NewFramer(p.conn, r), hpack.NewDecoder(headerTableSize, nil)
	_ = p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	_ = p.fr.WriteWindowUpdate(0, 1<<20)
	var block bytes.Buffer
	for {
		f, err := p.fr.ReadFrame()
		if err != nil {
			return
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = p.fr.WriteSettingsAck()
			}
		case *http2.PingFrame:
			_ = p.fr.WritePing(true, f.Data)
		case *http2.HeadersFrame:
			block.Reset()
			block.Write(f.HeaderBlockFragment())
			p.see(f.StreamID, block.Bytes())
		}
	}
}

func (p *chaos) see(stream uint32, block []byte) {
	fields, err := p.dec.DecodeFull(block)
	if err != nil {
		panic(err)
	}
	var call int
	if _, err := fmt.Sscan(wiretest.Get(fields, "x-call"), &call); err != nil {
		panic(err)
	}
	s := &sighting{peer: p.event, stream: stream, refused: p.away && stream > p.last}
	p.mine[stream] = s
	p.all.mu.Lock()
	p.all.calls[call] = append(p.all.calls[call], s)
	p.all.mu.Unlock()
	p.seen++
	if p.refuse > 0 && p.seen%3 == p.refuse {
		s.refused = p.fr.WriteRSTStream(stream, http2.ErrCodeRefusedStream) == nil
	}
	if p.seen == p.after+1 {
		p.happen()
	}
}

func (p *chaos) happen() {
	over := true
	switch p.event {
	case "violation":
		_ = p.fr.WriteRawFrame(http2.FramePushPromise, 0, 1, make([]byte, 8))
	case "settings":
		_ = p.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1})
	case "window":
		_ = p.fr.WriteWindowUpdate(0, maxWindowLimit)
	case "goaway", "goaway, then violation":
		if p.fr.WriteGoAway(p.last, http2.ErrCodeNo, nil) == nil {
			p.away = true
			for stream, s := range p.mine {
				s.refused = s.refused || stream > p.last
			}
		}
		if over = p.event != "goaway"; over {
			_ = p.fr.WriteRawFrame(http2.FramePushPromise, 0, 1, make([]byte, 8))
		}
	case "half-close":
		if w, ok := p.conn.(interface{ CloseWrite() error }); ok {
			_ = w.CloseWrite()
		} else {
			_ = p.conn.Close()
		}
	case "abort":
		if tc := tcpOf(p.conn); tc != nil {
			_ = tc.SetLinger(0)
			_ = tc.Close()
		} else {
			_ = p.conn.Close()
		}
	case "none":
		over = false
	}
	if p.blind && over {
		<-p.over
	}
}
