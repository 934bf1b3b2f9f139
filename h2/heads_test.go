package h2

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// A stream that is reset before its HEADERS have left leaves no trace at the peer: neither HEADERS, nor DATA, nor RST_STREAM, nor
// use of a window. The streams around it arrive as they are, though their header blocks have fields in common with its own.
func TestResetBeforeItLeaves(t *testing.T) {
	for name, tt := range map[string]struct {
		fields []Field
		write  func(t *testing.T, s *Stream)
	}{
		"HEADERS": {withFields("x-mine", "1", "x-ours", "2"), func(*testing.T, *Stream) {}},
		"DATA": {withFields("x-mine", "1", "x-ours", "2"), func(t *testing.T, s *Stream) {
			if n, err := s.TryWrite(make([]byte, 40000), false); n != 40000 || err != nil {
				t.Fatal(n, err)
			}
		}},
		"CONTINUATION": {withFields("x-mine", strings.Repeat("\x00", 50000), "x-ours", "2"), func(*testing.T, *Stream) {}},
		"trailers": {withFields("x-mine", "1", "x-ours", "2"), func(t *testing.T, s *Stream) {
			if err := s.WriteHeaders([]Field{{Name: "x-ours", Value: "2"}}, true); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true})
			settled(t, c)
			before := c.Stats()
			first := mustOpen(t, c, false, newRecorder(t))
			if _, err := first.TryWrite([]byte("one"), false); err != nil {
				t.Fatal(err)
			}
			s, err := c.OpenStream(tt.fields, false, newRecorder(t))
			if err != nil {
				t.Fatal(err)
			}
			tt.write(t, s)
			last, err := c.OpenStream(withFields("x-ours", "2"), false, newRecorder(t))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := last.TryWrite([]byte("three"), true); err != nil {
				t.Fatal(err)
			}
			s.Reset(Cancel)
			if _, err := first.TryWrite([]byte("two"), true); err != nil {
				t.Fatal(err)
			}
			c.Flush()
			p.Barrier()
			if a := p.Collect(first.ID()); string(a.Data) != "onetwo" || len(a.Head) != len(requestHead) {
				t.Errorf("the stream before it: %s %v %q", a.Sequence(), a.Head, a.Data)
			}
			if b := p.Collect(last.ID()); string(b.Data) != "three" || b.Get("x-ours") != "2" || len(b.Head) != len(requestHead)+1 {
				t.Errorf("the stream behind it: %s %v %q", b.Sequence(), b.Head, b.Data)
			}
			silence(t, p, s.ID())
			until(t, "all is written", func() bool { return c.Stats().Pending == 0 })
			st := c.Stats()
			if used := before.SendWindow - st.SendWindow; used != int64(len("onetwothree")) {
				t.Errorf("%d bytes of the window are used, want those of the others", used)
			}
			if sent := st.FramesOut - before.FramesOut; sent != 5+1 { // HEADERS twice, DATA three times, the barrier's PING
				t.Errorf("%d frames are counted, want 6", sent)
			}
			if st.Streams != 2 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// What is reset before it has left does not pile up while the socket takes nothing, takes no room from others, and is never sent.
func TestDiscardedStreamsDoNotPileUp(t *testing.T) {
	cfg := Config{MaxPending: 64 << 10}
	c, p := clientAgainst(t, cfg, wiretest.Options{DiscardData: true})
	settled(t, c)
	under, release := holdWrite(t, c)
	window := c.Stats().SendWindow
	pad := strings.Repeat("x", 1000)
	var live []*Stream
	for i := range 5000 {
		s, err := c.OpenStream(withFields("x-pad", pad), false, newRecorderOf(t, 1))
		if err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
		if i%500 == 250 {
			live = append(live, s)
			continue
		}
		if _, err := s.TryWrite(make([]byte, 100), true); err != nil {
			t.Fatal(err)
		}
		c.Flush()
		s.Reset(Cancel)
		c.Flush()
	}
	c.mu.Lock()
	blocks := len(c.heads.queue)
	c.mu.Unlock()
	if st := c.Stats(); blocks > 100 || st.Pending > cfg.MaxPending/2 || st.SendWindow != window {
		t.Errorf("%d blocks wait, %d bytes in all, the window is %d of %d", blocks, st.Pending, st.SendWindow, window)
	}
	release()
	until(t, "all is sent", func() bool { return c.Stats().Pending == 0 })
	p.Barrier()
	for _, s := range append(live, under) {
		p.ExpectOn(s.ID(), http2.FrameHeaders)
	}
	for id := under.ID(); id <= under.ID()+2*5000; id += 2 {
		silence(t, p, id)
	}
}

// The peer may change the size of its table while blocks wait. What left, or was appended, before the acknowledgement goes by
// the old size, what comes behind it by the new one.
func TestTableSizeChangesWhileBlocksWait(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	settled(t, c)
	for i, size := range []uint32{0, 4096, 100, 4096, 4096} {
		var all []*Stream
		open := func() {
			s, err := c.OpenStream(withFields("x-a", "1", "x-round", strconv.Itoa(i)), true, newRecorder(t))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, s)
		}
		open()
		settings := c.Stats().SettingsIn
		p.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: size})
		until(t, "SETTINGS", func() bool { return c.Stats().SettingsIn == settings+1 })
		open()
		open()
		c.Flush()
		for _, s := range all {
			f := p.ExpectOn(s.ID(), http2.FrameHeaders)
			if f.Get("x-a") != "1" || f.Get("x-round") != strconv.Itoa(i) {
				t.Fatalf("round %d: %v", i, f.Fields)
			}
		}
	}
}

// TestRandomDiscards opens streams with random fields, writes, ends and resets them at random, and flushes now and then. What the
// peer decodes must be what was written, without the streams that were reset before a flush.
func TestRandomDiscards(t *testing.T) {
	for seed := range uint64(15) {
		rnd := rand.New(rand.NewPCG(seed, 9))
		c := newConn(nil, Config{MaxPending: 1 << 30}, true)
		c.sendWin, c.peerInitWindow, c.peerMaxStreams = 1<<30, 1<<30, 1<<30
		c.nextID = 1
		got := newTranscript()
		want := make(map[uint32]string)
		type sent struct {
			s    *Stream
			text string
			left bool
		}
		var open []*sent
		window := c.sendWin
		for range 400 {
			var o *sent
			if len(open) > 0 {
				o = open[rnd.IntN(len(open))]
			}
			switch k := rnd.IntN(10); {
			case k < 4 || o == nil:
				f := randomFields(rnd)
				s, err := c.OpenStream(f, false, nil)
				if err != nil {
					t.Fatal(err)
				}
				open = append(open, &sent{s: s, text: "H" + text(f)})
			case k < 6:
				p := bytes.Repeat([]byte{byte(rnd.Uint32())}, rnd.IntN(3000))
				if n, err := o.s.TryWrite(p, false); n != len(p) || err != nil {
					t.Fatal(n, err)
				}
				o.text += string(p)
			case k == 6:
				f := randomFields(rnd)
				if err := o.s.WriteHeaders(f, true); err != nil {
					t.Fatal(err)
				}
				o.text += "H" + text(f)
				want[o.s.id] = o.text
				open = slices.DeleteFunc(open, func(x *sent) bool { return x == o })
			case k < 9:
				o.s.Reset(Cancel)
				if o.left {
					want[o.s.id] = o.text + "RST"
				}
				open = slices.DeleteFunc(open, func(x *sent) bool { return x == o })
			default:
				got.take(t, c)
				for _, o := range open {
					o.left = true
				}
			}
		}
		got.take(t, c)
		for _, o := range open {
			want[o.s.id] = o.text
		}
		for id, w := range want {
			if g := got.streams[id]; g != w {
				t.Fatalf("seed %d, stream %d: got %.200q, want %.200q", seed, id, g, w)
			}
		}
		if len(got.streams) != len(want) {
			t.Errorf("seed %d: %d streams came, want %d", seed, len(got.streams), len(want))
		}
		if used := window - c.sendWin; used != got.data {
			t.Errorf("seed %d: %d bytes of the window are used, %d were sent", seed, used, got.data)
		}
		if st := c.Stats(); st.FramesOut != got.frames || st.Pending != 0 {
			t.Errorf("seed %d: %d frames were counted, %d sent; %d bytes pending", seed, st.FramesOut, got.frames, st.Pending)
		}
	}
}

func randomFields(rnd *rand.Rand) []Field {
	f := slices.Clone(requestHead)
	for range rnd.IntN(6) {
		v := strconv.Itoa(rnd.IntN(30))
		if rnd.IntN(50) == 0 {
			v = strings.Repeat(v, 20000) // more than one frame
		}
		f = append(f, Field{Name: "x-" + strconv.Itoa(rnd.IntN(10)), Value: v, Sensitive: rnd.IntN(10) == 0})
	}
	return f
}

// transcript is what a peer makes of the frames it gets.
type transcript struct {
	dec     *hpack.Decoder
	streams map[uint32]string
	block   []byte
	data    int64
	frames  uint64
	newest  uint32
}

func newTranscript() *transcript {
	return &transcript{dec: hpack.NewDecoder(headerTableSize, nil), streams: make(map[uint32]string)}
}

// take is what a flusher does.
func (r *transcript) take(t *testing.T, c *Conn) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.out == nil {
		return
	}
	if b := c.takeLocked(); b != nil {
		r.read(t, b.b)
		c.wroteLocked(len(b.b))
	}
}

func (r *transcript) read(t *testing.T, b []byte) {
	t.Helper()
	for len(b) > 0 {
		f := parseHeader(b)
		p := b[headerLen : headerLen+f.length]
		b = b[headerLen+f.length:]
		r.frames++
		switch f.t {
		case http2.FrameHeaders, http2.FrameContinuation:
			if f.t == http2.FrameHeaders && r.streams[f.id] == "" {
				if f.id <= r.newest {
					t.Fatalf("stream %d was opened after %d", f.id, r.newest)
				}
				r.newest = f.id
			}
			if r.block = append(r.block, p...); f.flags.Has(http2.FlagHeadersEndHeaders) {
				fields, err := r.dec.DecodeFull(r.block)
				if err != nil {
					t.Fatal(err)
				}
				r.block = r.block[:0]
				r.streams[f.id] += "H" + text(fields)
			}
		case http2.FrameData:
			r.data += int64(len(p))
			r.streams[f.id] += string(p)
		case http2.FrameRSTStream:
			r.streams[f.id] += "RST"
		default:
			t.Fatalf("a frame of type %v", f.t)
		}
		if f.id > r.newest {
			t.Fatalf("a %v frame on stream %d, which is idle", f.t, f.id)
		}
	}
}
