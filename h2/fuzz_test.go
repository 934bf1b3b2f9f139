package h2

import (
	"bytes"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// frames builds frames for seeds.
func frames(f func(fr *http2.Framer, block func(...string) []byte)) []byte {
	var out, hb bytes.Buffer
	fr := http2.NewFramer(&out, nil)
	fr.AllowIllegalWrites = true
	enc := hpack.NewEncoder(&hb)
	f(fr, func(nv ...string) []byte {
		hb.Reset()
		for _, f := range wiretest.Fields(nv...) {
			_ = enc.WriteField(f)
		}
		return append([]byte(nil), hb.Bytes()...)
	})
	return out.Bytes()
}

func seeds() [][]byte {
	req := []string{":method", "POST", ":scheme", "http", ":path", "/s/m", ":authority", "a"}
	return [][]byte{
		nil,
		[]byte("HTTP/1.1 200 OK\r\n\r\n"),
		frames(func(fr *http2.Framer, b func(...string) []byte) {
			_ = fr.WriteSettings()
			_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b(":status", "200"), EndHeaders: true})
			_ = fr.WriteData(1, false, []byte("hello"))
			_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b("grpc-status", "0"), EndHeaders: true, EndStream: true})
			_ = fr.WriteRSTStream(1, 0)
			_ = fr.WriteGoAway(1, 0, []byte("bye"))
		}),
		frames(func(fr *http2.Framer, b func(...string) []byte) {
			_ = fr.WriteSettings(http2.Setting{ID: 1, Val: 0}, http2.Setting{ID: 4, Val: 1}, http2.Setting{ID: 5, Val: 20000}, http2.Setting{ID: 3, Val: 7})
			_ = fr.WriteSettingsAck()
			block := b(req...)
			_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:3], PadLength: 4, Priority: http2.PriorityParam{Weight: 3}})
			_ = fr.WriteContinuation(1, true, block[3:])
			_ = fr.WriteDataPadded(1, true, []byte("hello"), make([]byte, 9))
			_ = fr.WriteWindowUpdate(1, 100)
			_ = fr.WriteWindowUpdate(0, 100)
			_ = fr.WritePing(false, [8]byte{1})
			_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: b(req...), EndHeaders: true, EndStream: true})
			_ = fr.WriteRSTStream(3, 8)
			_ = fr.WritePriority(5, http2.PriorityParam{})
			_ = fr.WriteRawFrame(0xfa, 0, 0, []byte("x"))
		}),
	}
}

// FuzzFrames: a peer that sends anything, cut anywhere, never makes an engine panic, hang or leak, in either role;
// each stream is told its end exactly once, and nothing stays held.
func FuzzFrames(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s, false, uint16(0))
		f.Add(s, true, uint16(7))
	}
	f.Fuzz(func(t *testing.T, data []byte, server bool, cut uint16) {
		mine, peer := net.Pipe()
		cfg := Config{MaxHeaderListSize: 8 << 10, InitialWindow: 1000, MaxFrameSize: 16 << 10, MaxPending: 4 << 10}
		var c *Conn
		var all []*fuzzReceiver
		if server {
			c = Server(mine, cfg, func(s *Stream, fields []Field, end bool) Receiver {
				if h := checkRequest(fields); h.malformed != "" {
					t.Errorf("malformed request accepted: %s", h.malformed)
				}
				r := &fuzzReceiver{t: t, s: s, ended: end}
				all = append(all, r)
				_ = s.WriteHeaders(responseHead, false)
				r.write(s)
				return r
			})
			data = append([]byte(clientPreface), data...)
		} else {
			c = Client(mine, cfg)
			for range 3 {
				r := &fuzzReceiver{t: t}
				s, err := c.OpenStream(requestHead, false, r)
				if err != nil {
					break // the connection is over already, or the seed forbids streams
				}
				r.s = s
				all = append(all, r)
			}
			c.Flush()
		}
		read := make(chan struct{})
		go func() {
			defer close(read)
			_, _ = io.Copy(io.Discard, peer)
		}()
		_ = peer.SetWriteDeadline(time.Now().Add(patienceOfTests))
		k := min(int(cut), len(data))
		for _, part := range [][]byte{data[:k], data[k:]} {
			if _, err := peer.Write(part); err != nil {
				if isTimeout(err) {
					t.Error("the engine stopped reading")
				}
				break
			}
		}
		peer.Close()
		select {
		case <-c.Done():
		case <-time.After(patienceOfTests):
			t.Fatal("the engine hangs")
		}
		<-read
		st := c.Stats()
		if st.Streams != 0 || st.Held != 0 {
			t.Errorf("left over: %+v", st)
		}
		for _, r := range all {
			if !r.s.Closed() {
				t.Error("a stream outlived its connection")
			}
			if !r.reset && !(r.ended && r.sent) && r.s.Err() == nil {
				t.Error("a stream was not told its end")
			}
		}
	})
}

// fuzzReceiver checks the rules of Receiver.
type fuzzReceiver struct {
	t                        *testing.T
	s                        *Stream
	head, ended, reset, sent bool
}

func (r *fuzzReceiver) write(s *Stream) {
	if n, err := s.TryWrite(make([]byte, 10), true); n == 10 && err == nil {
		r.sent = true
	}
}

func (r *fuzzReceiver) RecvHead(_ *Stream, f []Field, end bool) {
	if r.ended || r.reset || r.head {
		r.t.Error("head out of place")
	}
	if checkResponse(f).malformed != "" {
		r.t.Error("malformed head delivered")
	}
	r.head = checkResponse(f).status/100 != 1
	r.ended = end
}

func (r *fuzzReceiver) RecvData(s *Stream, p []byte, end bool) {
	if r.ended || r.reset {
		r.t.Error("data out of place")
	}
	r.ended = end
	s.Consumed(len(p))
}

func (r *fuzzReceiver) RecvTrailers(_ *Stream, f []Field) {
	if r.ended || r.reset || checkTrailers(f, false) != "" {
		r.t.Error("trailers out of place")
	}
	r.ended = true
}

func (r *fuzzReceiver) RecvReset(_ *Stream, err *Error) {
	if r.reset || err == nil || err.Error() == "" {
		r.t.Error("reset out of place")
	}
	r.reset = true
}

// FuzzParse holds our parsing of frames against http2.Framer's.
func FuzzParse(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		fr := http2.NewFramer(io.Discard, bytes.NewReader(data))
		fr.AllowIllegalReads = true // the order of frames is conn.handle's business
		for len(data) >= headerLen {
			h := parseHeader(data)
			if len(data) < headerLen+h.length {
				break
			}
			p := data[headerLen : headerLen+h.length]
			data = data[headerLen+h.length:]
			theirs, err := fr.ReadFrame()
			if theirs != nil {
				if th := theirs.Header(); th.Length != uint32(h.length) || th.Type != h.t || th.Flags != h.flags || th.StreamID != h.id {
					t.Fatalf("header %+v, http2 reads %v", h, th)
				}
			}
			var ours []byte
			var bad *Error
			switch h.t {
			case http2.FrameData:
				ours, bad = payload(h, p)
			case http2.FrameHeaders:
				ours, _, bad = fragment(h, p)
			default:
				if err != nil {
					return // the Framer is strict about frames we check when we handle them
				}
				continue
			}
			if h.id == 0 {
				return // an error for both, found elsewhere here
			}
			if (bad != nil) != (err != nil) {
				t.Fatalf("%+v: %v, http2 says %v", h, bad, err)
			}
			if err != nil {
				return
			}
			var want []byte
			switch fr := theirs.(type) {
			case *http2.DataFrame:
				want = fr.Data()
			case *http2.HeadersFrame:
				want = fr.HeaderBlockFragment()
			}
			if !bytes.Equal(ours, want) {
				t.Fatalf("%+v: %x, http2 reads %x", h, ours, want)
			}
		}
	})
}

// FuzzHeaderBlock: what the decoder accepts is encoded and decoded again without loss (but of blanks around values), and is either malformed or free of
// what must not get through.
func FuzzHeaderBlock(f *testing.F) {
	e := newEncoder()
	f.Add(blockOf(e, requestHead))
	f.Add(blockOf(e, responseHead))
	f.Add(blockOf(e, []Field{{Name: "grpc-timeout", Value: "1S"}, {Name: "x", Value: " "}, {Name: "te", Value: "gzip"}}))
	f.Add([]byte{0x3f, 0xe1, 0x1f, 0x82, 0x10, 1, 'a', 1, 'b'})
	f.Fuzz(func(t *testing.T, block []byte) {
		fields, err := hpack.NewDecoder(headerTableSize, nil).DecodeFull(block)
		if err != nil {
			return
		}
		want := slices.Clone(fields)
		for i := range want {
			want[i].Value = trimValue(want[i].Value)
		}
		e := newEncoder()
		d := hpack.NewDecoder(headerTableSize, nil)
		for range 2 { // the second time from the table
			again, err := d.DecodeFull(blockOf(e, fields))
			if err != nil || !sameFields(again, want) {
				t.Fatalf("%v became %v (%v)", fields, again, err)
			}
			for i := range fields {
				if fields[i].Sensitive && !again[i].Sensitive {
					t.Fatalf("%q is not never-indexed any more", fields[i].Name)
				}
			}
		}
		ok := checkRequest(fields).malformed == "" || checkResponse(fields).malformed == "" || checkTrailers(fields, true) == ""
		for _, f := range fields {
			if ok && (f.Name == "" || bytes.ContainsAny([]byte(f.Name), "ABCDEFGHIJKLMNOPQRSTUVWXYZ \r\n\x00") ||
				bytes.ContainsAny([]byte(f.Value), "\r\n\x00") || connectionSpecific(f.Name)) {
				t.Fatalf("accepted %q: %q", f.Name, f.Value)
			}
		}
	})
}

// BenchmarkParse is why frames are not read by http2.Framer: the frames of one small call, in both directions.
func BenchmarkParse(b *testing.B) {
	data := frames(func(fr *http2.Framer, block func(...string) []byte) {
		for _, nv := range [][]string{{":method", "POST"}, {":status", "200"}, {"grpc-status", "0"}} {
			_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block(nv...), EndHeaders: true})
			_ = fr.WriteData(1, false, make([]byte, 105))
		}
		_ = fr.WriteWindowUpdate(0, 1000)
	})
	b.Run("framer", func(b *testing.B) {
		r := bytes.NewReader(data)
		fr := http2.NewFramer(io.Discard, r)
		fr.SetReuseFrames()
		b.ReportAllocs()
		for b.Loop() {
			r.Reset(data)
			for {
				if _, err := fr.ReadFrame(); err != nil {
					break
				}
			}
		}
	})
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			for p := data; len(p) > 0; {
				h := parseHeader(p)
				if h.t == http2.FrameHeaders {
					_, _, _ = fragment(h, p[headerLen:headerLen+h.length])
				} else {
					_, _ = payload(h, p[headerLen:headerLen+h.length])
				}
				p = p[headerLen+h.length:]
			}
		}
	})
}
