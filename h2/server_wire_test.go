package h2

import (
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

func TestServerUnary(t *testing.T) {
	a := newCalls(t)
	c, p := serverAgainst(t, Config{}, a.accept)
	if f := p.ExpectSettings(); len(f.Settings) == 0 || f.Settings[0] != (http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 250}) {
		t.Errorf("SETTINGS %v", f.Settings)
	}
	p.ExpectSettingsAck()
	id := p.Open(wiretest.Request("example.com", "/s/m", "grpc-timeout", "1S"), false)
	p.WriteData(id, []byte("hello"), true)
	r, s, head := a.next()
	if want := strings.TrimSpace(text(wiretest.Request("example.com", "/s/m", "grpc-timeout", "1S"))) + " false"; head != want {
		t.Errorf("head %q, want %q", head, want)
	}
	r.want("data 5 true")
	if err := s.WriteHeaders(responseHead, false); err != nil {
		t.Fatal(err)
	}
	if n, err := s.TryWrite([]byte("abc"), false); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	if err := s.WriteHeaders(okTrailers, true); err != nil {
		t.Fatal(err)
	}
	c.Flush()
	if h := p.CollectAll(id); h.Sequence() != "HEADERS DATA HEADERS+END_STREAM" || string(h.Data) != "abc" || h.Get("grpc-status") != "0" {
		t.Errorf("%s %q", h.Sequence(), h.Data)
	}
	if err := s.WriteHeaders(okTrailers, true); err == nil {
		t.Error("a second end was accepted")
	}
}

// RFC 9113 section 8.1: a server that is done early says END_STREAM, then RST_STREAM(NO_ERROR).
func TestServerEndsEarly(t *testing.T) {
	c, p := serverAgainst(t, Config{}, func(s *Stream, _ []Field, _ bool) Receiver {
		_ = s.WriteHeaders([]Field{{Name: ":status", Value: "200"}, {Name: "grpc-status", Value: "12"}}, true)
		s.Reset(NoError)
		return nil
	})
	id := p.Open(wiretest.Request("a", "/s/m"), false)
	p.WriteData(id, []byte("in flight"), false)
	if h := p.CollectAll(id); h.Sequence() != "HEADERS+END_STREAM RST_STREAM(NO_ERROR)" {
		t.Error(h.Sequence())
	}
	p.WriteData(id, []byte("still in flight"), false)
	p.WriteHeaders(id, wiretest.Fields("late", "trailer"), true)
	p.Barrier()
	if c.Err() != nil || len(p.Untaken(id)) != 0 {
		t.Error(c.Err(), p.Untaken(id))
	}
}

// The two frames leave together, whoever flushes meanwhile: a client that has seen the end and asks with a PING has had the reset
// when that is answered. Where the request has ended there is no reset.
func TestServerWriteLast(t *testing.T) {
	a := newCalls(t)
	c, p := serverAgainst(t, Config{}, a.accept)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				c.Flush()
			}
		}
	}()
	for i := range 200 {
		id := p.Open(wiretest.Request("a", "/s/m"), i%2 == 1)
		_, s, _ := a.next()
		if err := s.WriteLast(responseHead); err != nil {
			t.Fatal(err)
		}
		want := "HEADERS+END_STREAM RST_STREAM(NO_ERROR)"
		if i%2 == 1 {
			want = "HEADERS+END_STREAM"
		}
		if h := p.CollectAll(id); h.Sequence() != want {
			t.Fatalf("%s, want %s", h.Sequence(), want)
		}
		if err := s.WriteLast(okTrailers); err == nil {
			t.Fatal("a second end was accepted")
		}
	}
	close(stop)
	<-stopped
}

func TestServerAcceptReturnsNil(t *testing.T) {
	for name, tt := range map[string]struct {
		accept func(s *Stream)
		want   string
	}{
		"nothing done": {func(*Stream) {}, "RST_STREAM(REFUSED_STREAM)"},
		"answered":     {func(s *Stream) { _ = s.WriteHeaders(responseHead, true) }, "HEADERS+END_STREAM RST_STREAM(NO_ERROR)"},
		"begun":        {func(s *Stream) { _ = s.WriteHeaders(responseHead, false) }, "HEADERS RST_STREAM(INTERNAL_ERROR)"},
		"reset":        {func(s *Stream) { s.Reset(Cancel) }, "RST_STREAM(CANCEL)"},
	} {
		t.Run(name, func(t *testing.T) {
			_, p := serverAgainst(t, Config{}, func(s *Stream, _ []Field, _ bool) Receiver { tt.accept(s); return nil })
			if h := p.CollectAll(p.Open(wiretest.Request("a", "/s/m"), false)); h.Sequence() != tt.want {
				t.Error(h.Sequence())
			}
		})
	}
}

func TestServerTrailersAndReset(t *testing.T) {
	a := newCalls(t)
	c, p := serverAgainst(t, Config{}, a.accept)
	id := p.Open(wiretest.Request("a", "/s/m"), false)
	p.WriteData(id, []byte("x"), false)
	p.WriteHeaders(id, wiretest.Fields("trailer", "1"), true)
	r, s, _ := a.next()
	r.want("data 1 false")
	r.want("trailers trailer=1")
	p.WriteReset(id, http2.ErrCodeCancel)
	r.want("reset reset CANCEL remote=true unprocessed=false")
	if err := s.WriteHeaders(responseHead, false); err == nil || err.Kind != KindReset {
		t.Error(err)
	}
	c.Flush()
	p.Barrier()
	if u := p.Untaken(id); len(u) != 0 {
		t.Errorf("frames after the client's RST_STREAM: %v", u)
	}
}

func TestServerMalformedRequests(t *testing.T) {
	good := []string{":method", "POST", ":scheme", "http", ":path", "/s/m", ":authority", "a"}
	with := func(more ...string) []hpack.HeaderField { return wiretest.Fields(append(good[:8:8], more...)...) }
	for name, fields := range map[string][]hpack.HeaderField{
		"no method":              wiretest.Fields(":scheme", "http", ":path", "/"),
		"no scheme":              wiretest.Fields(":method", "GET", ":path", "/"),
		"no path":                wiretest.Fields(":method", "GET", ":scheme", "http"),
		"empty path":             wiretest.Fields(":method", "GET", ":scheme", "http", ":path", ""),
		"two paths":              wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/", ":path", "/"),
		"unknown pseudo-header":  wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/", ":foo", "x"),
		"status":                 wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/", ":status", "200"),
		"pseudo-header late":     wiretest.Fields(":method", "GET", ":scheme", "http", "x", "y", ":path", "/"),
		"protocol":               wiretest.Fields(":method", "CONNECT", ":scheme", "http", ":path", "/", ":authority", "a", ":protocol", "x"),
		"CONNECT with path":      wiretest.Fields(":method", "CONNECT", ":path", "/", ":authority", "a"),
		"CONNECT, no authority":  wiretest.Fields(":method", "CONNECT"),
		"CONNECT, no port":       wiretest.Fields(":method", "CONNECT", ":authority", "a"),
		"CONNECT, empty port":    wiretest.Fields(":method", "CONNECT", ":authority", "a:"),
		"path without a slash":   wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "s/m", ":authority", "a"),
		"path with a scheme":     wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "http://a/s/m", ":authority", "a"),
		"* without OPTIONS":      wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "*", ":authority", "a"),
		"blank in path":          wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/s m", ":authority", "a"),
		"ESC in path":            wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/\x1b[2J", ":authority", "a"),
		"DEL in path":            wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/\x7f", ":authority", "a"),
		"blank in scheme":        wiretest.Fields(":method", "POST", ":scheme", "ht tp", ":path", "/", ":authority", "a"),
		"control in scheme":      wiretest.Fields(":method", "POST", ":scheme", "http\x01", ":path", "/", ":authority", "a"),
		"digit before scheme":    wiretest.Fields(":method", "POST", ":scheme", "1http", ":path", "/", ":authority", "a"),
		"blank in authority":     wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/", ":authority", "a b"),
		"control in authority":   wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/", ":authority", "a\x02"),
		"path in authority":      wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/", ":authority", "a/b"),
		"query in authority":     wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/", ":authority", "a?b"),
		"fragment in authority":  wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/", ":authority", "a#b"),
		"empty authority":        wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/", ":authority", ""),
		"port without a host":    wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/", ":authority", ":80"),
		"host that is none":      wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/", "host", "a b"),
		"ESC in value":           with("x", "\x1b[2J"),
		"DEL in value":           with("x", "a\x7f"),
		"method with a blank":    wiretest.Fields(":method", "G T", ":scheme", "http", ":path", "/"),
		"userinfo":               wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/", ":authority", "u@a"),
		"host differs":           with("host", "b"),
		"two hosts":              with("host", "a", "host", "b"),
		"te":                     with("te", "gzip"),
		"connection":             with("connection", "x"),
		"transfer-encoding":      with("transfer-encoding", "chunked"),
		"upper case":             with("X-A", "1"),
		"blank in name":          with("x a", "1"),
		"empty name":             with("", "1"),
		"colon in name":          with("x:a", "1"),
		"CR in value":            with("x", "a\rb"),
		"blank at path's end":    wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/ ", ":authority", "a"),
		"two content-lengths":    with("content-length", "1", "content-length", "2"),
		"content-length, no end": with("content-length", "1x"),
	} {
		t.Run(name, func(t *testing.T) {
			a := newCalls(t)
			c, p := serverAgainst(t, Config{}, a.accept)
			id := p.Open(fields, false)
			if h := p.CollectAll(id); h.Sequence() != "RST_STREAM(PROTOCOL_ERROR)" {
				t.Error(h.Sequence())
			}
			select {
			case h := <-a.heads:
				t.Errorf("accepted %s", h)
			default:
			}
			p.Open(wiretest.Request("a", "/s/m", "host", "A"), true)
			a.next()
			if c.Err() != nil {
				t.Error(c.Err())
			}
		})
	}
}

func TestServerContentLength(t *testing.T) {
	a := newCalls(t)
	_, p := serverAgainst(t, Config{}, a.accept)
	open := func(length string, end bool) uint32 {
		return p.Open(wiretest.Request("a", "/s/m", "content-length", length), end)
	}
	id := open("3", false)
	p.WriteData(id, []byte("ab"), false)
	p.WriteData(id, []byte("c"), true)
	r, _, _ := a.next()
	r.want("data 2 false")
	r.want("data 1 true")
	for name, send := range map[string]func() uint32{
		"end on HEADERS": func() uint32 { return open("3", true) },
		"too much":       func() uint32 { id := open("3", false); p.WriteData(id, []byte("abcd"), false); return id },
		"too little":     func() uint32 { id := open("3", false); p.WriteData(id, []byte("ab"), true); return id },
		"trailers":       func() uint32 { id := open("3", false); p.WriteHeaders(id, wiretest.Fields("x", "y"), true); return id },
	} {
		id := send()
		if code := p.ExpectReset(id); code != http2.ErrCodeProtocol {
			t.Errorf("%s: %s", name, code)
		}
	}
}

func TestServerFramesAfterTheEnd(t *testing.T) {
	for name, tt := range map[string]struct {
		send func(p *wiretest.Conn, id uint32)
		code http2.ErrCode
	}{
		"DATA":    {func(p *wiretest.Conn, id uint32) { p.WriteData(id, []byte("x"), true) }, http2.ErrCodeStreamClosed},
		"HEADERS": {func(p *wiretest.Conn, id uint32) { p.WriteHeaders(id, wiretest.Fields("x", "y"), true) }, http2.ErrCodeStreamClosed},
	} {
		t.Run(name+" half-closed", func(t *testing.T) {
			a := newCalls(t)
			_, p := serverAgainst(t, Config{}, a.accept)
			id := p.Open(wiretest.Request("a", "/s/m"), true)
			r, _, _ := a.next()
			tt.send(p, id)
			if code := p.ExpectReset(id); code != tt.code {
				t.Error(code)
			}
			r.want("reset protocol STREAM_CLOSED remote=false unprocessed=false")
		})
		t.Run(name+" closed", func(t *testing.T) {
			c, p := serverAgainst(t, Config{}, func(s *Stream, _ []Field, _ bool) Receiver {
				_ = s.WriteHeaders(responseHead, true)
				return nil
			})
			id := p.Open(wiretest.Request("a", "/s/m"), true)
			p.Collect(id)
			tt.send(p, id)
			if name == "DATA" {
				if code := p.ExpectReset(id); code != tt.code {
					t.Error(code)
				}
				return
			}
			expectGoAway(t, p, tt.code)
			wait(t, c.Done())
		})
	}
}

func TestServerConnectionErrors(t *testing.T) {
	for name, tt := range map[string]struct {
		send func(p *wiretest.Conn)
		code http2.ErrCode
	}{
		"even stream":  {func(p *wiretest.Conn) { p.WriteHeaders(2, wiretest.Request("a", "/"), true) }, http2.ErrCodeProtocol},
		"DATA on idle": {func(p *wiretest.Conn) { p.WriteData(5, nil, true) }, http2.ErrCodeProtocol},
		"RST on idle":  {func(p *wiretest.Conn) { p.WriteReset(5, 0) }, http2.ErrCodeProtocol},
		"PUSH_PROMISE": {func(p *wiretest.Conn) { p.WriteFrame(http2.FramePushPromise, 4, 1, make([]byte, 5)) }, http2.ErrCodeProtocol},
		"ENABLE_PUSH":  {func(p *wiretest.Conn) { p.WriteSettings(http2.Setting{ID: 2, Val: 2}) }, http2.ErrCodeProtocol},
		"lower stream, never used": {func(p *wiretest.Conn) {
			p.WriteHeaders(5, wiretest.Request("a", "/"), true)
			p.WriteHeaders(3, wiretest.Request("a", "/"), true)
		}, http2.ErrCodeProtocol},
		"initial window makes a window overflow": {func(p *wiretest.Conn) {
			p.WriteHeaders(1, wiretest.Request("a", "/"), false)
			p.WriteWindowUpdate(1, 1<<31-1-65535)
			p.WriteSettings(http2.Setting{ID: 4, Val: 65536})
		}, http2.ErrCodeFlowControl},
	} {
		t.Run(name, func(t *testing.T) {
			a := newCalls(t)
			c, p := serverAgainst(t, Config{}, a.accept)
			tt.send(p)
			expectGoAway(t, p, tt.code)
			wait(t, c.Done())
		})
	}
}

// Stream errors of flow control: RFC 9113 section 6.9.1 lets them be either kind.
func TestServerStreamWindowOverflow(t *testing.T) {
	a := newCalls(t)
	_, p := serverAgainst(t, Config{}, a.accept)
	id := p.Open(wiretest.Request("a", "/s/m"), false)
	p.WriteWindowUpdate(id, 1<<31-1)
	if code := p.ExpectReset(id); code != http2.ErrCodeFlowControl {
		t.Error(code)
	}
	r, _, _ := a.next()
	r.want("reset protocol FLOW_CONTROL_ERROR remote=false unprocessed=false")
}

func TestServerIgnores(t *testing.T) {
	a := newCalls(t)
	c, p := serverAgainst(t, Config{}, a.accept)
	p.WriteFrame(http2.FramePriority, 0, 7, []byte{0, 0, 0, 0, 1})
	p.WriteFrame(0xfa, 0xff, 9, []byte("unknown"))
	p.WriteSettings(http2.Setting{ID: 0xfa, Val: 1})
	p.WriteSettingsAck()
	// Reserved bit, priority and padding on HEADERS.
	block := p.Encode(wiretest.Request("a", "/s/m"))
	payload := append([]byte{3, 0, 0, 0, 0, 16}, append(block, 0, 0, 0)...)
	p.WriteFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersPriority|http2.FlagHeadersPadded, 1, payload)
	r, _, _ := a.next()
	p.WriteDataPadded(1, []byte("x"), true, 255)
	r.want("data 1 true")
	p.Barrier()
	if st := c.Stats(); st.Ignored != 2 || c.Err() != nil {
		t.Errorf("%+v %v", st, c.Err())
	}
}

func TestServerContinuation(t *testing.T) {
	a := newCalls(t)
	_, p := serverAgainst(t, Config{}, a.accept)
	fields := wiretest.Request("a", "/s/m", "x-long", strings.Repeat("z", 40000))
	p.WriteHeadersSplit(1, fields, true, 1000)
	_, s, head := a.next()
	if head != strings.TrimSpace(text(fields))+" true" {
		t.Error("another head arrived")
	}
	// And the other way: the answer needs more than one frame of the peer's size.
	if err := s.WriteHeaders([]Field{{Name: ":status", Value: "200"}, {Name: "x-long", Value: strings.Repeat("\xff", 40000)}}, true); err != nil {
		t.Fatal(err)
	}
	s.Conn().Flush()
	if h := p.CollectAll(1); h.Sequence() != "HEADERS+END_STREAM CONTINUATION CONTINUATION" || len(wiretest.Get(h.Head, "x-long")) != 40000 {
		t.Error(h.Sequence())
	}
}

func TestServerDrain(t *testing.T) {
	a := newCalls(t)
	c, p := serverAgainst(t, Config{}, a.accept, wiretest.Options{NoPingAck: true})
	first := p.Open(wiretest.Request("a", "/s/m"), true)
	_, s1, _ := a.next()
	c.Shutdown()
	if f := expectGoAway(t, p, http2.ErrCodeNo); f.LastStream != 1<<31-1 {
		t.Errorf("first GOAWAY names %d", f.LastStream)
	}
	ping := p.ExpectPing()
	// A stream the client opened before it knew.
	second := p.Open(wiretest.Request("a", "/s/m"), true)
	_, s2, _ := a.next()
	p.WritePing(true, [8]byte(ping.Data))
	if f := expectGoAway(t, p, http2.ErrCodeNo); f.LastStream != second {
		t.Errorf("second GOAWAY names %d, want %d", f.LastStream, second)
	}
	third := p.Open(wiretest.Request("a", "/s/m"), false)
	p.WriteData(third, []byte("x"), true)
	for _, s := range []*Stream{s1, s2} {
		if err := s.WriteHeaders(responseHead, true); err != nil {
			t.Fatal(err)
		}
	}
	c.Flush()
	for _, id := range []uint32{first, second} {
		if h := p.Collect(id); h.Sequence() != "HEADERS+END_STREAM" {
			t.Error(h.Sequence())
		}
	}
	wait(t, c.Done())
	if err := p.ExpectClosed(); err == nil || err.Error() != "EOF" {
		t.Errorf("closed with %v: the last answers may be lost", err)
	}
	if u := p.Untaken(third); len(u) != 0 {
		t.Errorf("answer above the last identifier: %v", u)
	}
	if e := c.Err(); e.Kind != KindLocal || e.Code != NoError {
		t.Error(e)
	}
}

func TestServerPreface(t *testing.T) {
	wiretest.CheckLeaks(t)
	addr, conns := serve(t, Config{}, acceptEcho)
	nc := wiretest.DialRaw(t, addr)
	if _, err := nc.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	c := <-conns
	wait(t, c.Done())
	if e := c.Err(); e.Kind != KindNotHTTP2 || e.Debug != `"GET / HTTP/1.1"` {
		t.Error(e)
	}
	nc.Close()
	p := wiretest.Dial(t, addr, nil, wiretest.Options{NoSettings: true})
	p.WritePing(false, [8]byte{})
	expectGoAway(t, p, http2.ErrCodeProtocol)
}

// However the preface, and what follows, is cut into reads.
func TestServerPrefaceInPieces(t *testing.T) {
	wiretest.CheckLeaks(t)
	start := clientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	for cut := 1; cut < len(start); cut++ {
		a, b := tcpPair(t)
		c := Server(b, Config{}, acceptEcho)
		for _, part := range []string{start[:cut], start[cut:]} {
			before := c.Stats().BytesIn
			if _, err := a.Write([]byte(part)); err != nil {
				t.Fatal(err)
			}
			until(t, "read", func() bool { return c.Stats().BytesIn == before+uint64(len(part)) })
		}
		wait(t, c.Ready())
		if c.Err() != nil {
			t.Fatalf("cut at %d: %v", cut, c.Err())
		}
		a.Close()
		wait(t, c.Done())
	}
}

// The preface, and more, may have been read by somebody else.
func TestServerPrefix(t *testing.T) {
	a, b := tcpPair(t)
	client := Client(a, Config{})
	prefix := make([]byte, 5)
	if _, err := b.Read(prefix); err != nil {
		t.Fatal(err)
	}
	server := Server(b, Config{PeerPrefix: prefix}, acceptEcho)
	wait(t, client.Ready())
	r := newRecorder(t)
	mustOpen(t, client, true, r)
	client.Flush()
	r.want("head" + text(responseHead) + " false")
	r.want("trailers" + text(okTrailers))
	closeAndWait(t, client)
	closeAndWait(t, server)
}
