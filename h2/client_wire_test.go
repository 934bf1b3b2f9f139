package h2

import (
	"net"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

func TestClientUnary(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	r := newRecorder(t)
	s := mustOpen(t, c, false, r)
	if n, err := s.TryWrite([]byte("hello"), true); n != 5 || err != nil {
		t.Fatal(n, err)
	}
	if got := c.Stats().Pending; got == 0 {
		t.Error("something was sent before the flush")
	}
	c.Flush()
	f := p.ExpectHeaders()
	if f.Stream != 1 || f.EndStream() || f.Get(":path") != "/pkg.Svc/Method" || f.Get("te") != "trailers" {
		t.Fatalf("%v %v", f, f.Fields)
	}
	if d := p.Next(1); string(d.Data) != "hello" || !d.EndStream() {
		t.Fatal(d)
	}
	p.WriteHeaders(1, wiretest.Fields(":status", "103", "link", "x"), false)
	p.WriteHeaders(1, wiretest.Head(), false)
	p.WriteData(1, []byte("abc"), false)
	p.WriteDataPadded(1, []byte("de"), false, 10)
	p.WriteHeaders(1, wiretest.Fields("grpc-status", "0"), true)
	r.want("head :status=103 link=x false")
	r.want("head" + text(wiretest.Head()) + " false")
	r.want("data 3 false")
	r.want("data 2 false")
	r.want("trailers grpc-status=0")
	if !s.Closed() || s.Err() != nil || c.Streams() != 0 {
		t.Error(s.Closed(), s.Err(), c.Streams())
	}
	// RST_STREAM(NO_ERROR) after the end of both sides is nobody's business any more.
	p.WriteReset(1, http2.ErrCodeNo)
	p.Barrier()
	r.none()
}

func TestClientEndsOnHeadAndEmptyData(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	trailersOnly, empty := newRecorder(t), newRecorder(t)
	mustOpen(t, c, true, trailersOnly)
	mustOpen(t, c, true, empty)
	c.Flush()
	p.ExpectHeaders()
	p.ExpectHeaders()
	p.WriteHeaders(1, wiretest.Head("grpc-status", "5"), true)
	p.WriteHeaders(3, wiretest.Fields("content-type", "x"), false) // no :status: delivered as it is
	p.WriteData(3, nil, true)
	trailersOnly.want("head" + text(wiretest.Head("grpc-status", "5")) + " true")
	empty.want("head content-type=x false")
	empty.want("data 0 true")
}

func TestClientEarlyEndOfResponse(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	r := newRecorder(t)
	s := mustOpen(t, c, false, r)
	c.Flush()
	p.ExpectHeaders()
	p.Batch(func() {
		p.WriteHeaders(1, wiretest.Head("grpc-status", "3"), true)
		p.WriteReset(1, http2.ErrCodeNo)
	})
	r.want("head" + text(wiretest.Head("grpc-status", "3")) + " true")
	r.want("reset reset NO_ERROR remote=true unprocessed=false")
	if _, err := s.TryWrite([]byte("x"), true); err == nil || err.Kind != KindReset || err.Code != NoError {
		t.Errorf("write after the reset: %v", err)
	}
}

func TestClientReset(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	for _, tt := range []struct {
		code        http2.ErrCode
		unprocessed bool
		text        string
	}{
		{http2.ErrCodeRefusedStream, true, "stream reset by peer: REFUSED_STREAM"},
		{http2.ErrCodeCancel, false, "stream reset by peer: CANCEL"},
		{http2.ErrCode(99), false, "stream reset by peer: unknown error code 0x63"},
	} {
		r := newRecorder(t)
		s := mustOpen(t, c, false, r)
		c.Flush()
		p.ExpectHeaders()
		p.WriteReset(s.ID(), tt.code)
		p.Barrier()
		<-r.ev
		e := s.Err()
		if e == nil || e.Kind != KindReset || e.Code != tt.code || e.Unprocessed != tt.unprocessed || !e.Remote || e.Error() != tt.text {
			t.Errorf("%+v %q, want %q", e, e, tt.text)
		}
		// RFC 9113 section 5.4.2: RST_STREAM is never answered with RST_STREAM.
		s.Reset(Cancel)
		c.Flush()
		p.Barrier()
		if u := p.Untaken(s.ID()); len(u) != 0 {
			t.Errorf("after its reset: %v", u)
		}
	}
}

// What the peer sent before it knew of our RST_STREAM is ignored, but keeps tables and windows in step.
func TestClientFramesAfterOwnReset(t *testing.T) {
	c, p := clientAgainst(t, Config{InitialConnWindow: 65535})
	r := newRecorder(t)
	s := mustOpen(t, c, false, r)
	c.Flush()
	p.ExpectHeaders()
	s.Reset(Cancel)
	c.Flush()
	if code := p.ExpectReset(1); code != http2.ErrCodeCancel {
		t.Fatal(code)
	}
	p.WriteHeaders(1, wiretest.Head("x-new", "indexed"), false)
	for range 3 {
		p.WriteData(1, make([]byte, 16384), false)
	}
	if f := p.ExpectOn(0, http2.FrameWindowUpdate); f.Increment < 32768 {
		t.Errorf("%d given back", f.Increment)
	}
	p.WriteHeaders(1, wiretest.Fields("grpc-status", "0"), true)
	r2 := newRecorder(t)
	mustOpen(t, c, true, r2)
	c.Flush()
	p.ExpectHeaders()
	p.WriteHeaders(3, wiretest.Head("x-new", "indexed"), true)
	r2.want("head" + text(wiretest.Head("x-new", "indexed")) + " true")
	r.none()
	if u := p.Untaken(1); len(u) != 0 {
		t.Errorf("frames after RST_STREAM: %v", u)
	}
}

func TestClientMalformed(t *testing.T) {
	head := wiretest.Head()
	for name, f := range map[string]func(p *wiretest.Conn){
		"upper case":              func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Head("X-Up", "1"), false) },
		"connection":              func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Head("connection", "close"), false) },
		"keep-alive":              func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Head("keep-alive", "1"), false) },
		"upgrade":                 func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Head("upgrade", "x"), false) },
		"proxy-connection":        func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Head("proxy-connection", "x"), false) },
		"transfer-encoding":       func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Head("transfer-encoding", "chunked"), false) },
		"value with LF":           func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Head("x", "a\nb"), false) },
		"value with NUL":          func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Head("x", "a\x00b"), false) },
		"late status":             func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Fields("x", "a", ":status", "200"), false) },
		"two status":              func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Fields(":status", "200", ":status", "200"), false) },
		"bad status":              func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Fields(":status", "2x0"), false) },
		"status 101":              func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Fields(":status", "101"), false) },
		"request pseudo-header":   func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Fields(":path", "/"), false) },
		"1xx with END_STREAM":     func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Fields(":status", "100"), true) },
		"DATA before HEADERS":     func(p *wiretest.Conn) { p.WriteData(1, []byte("x"), false) },
		"content-length, no DATA": func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Head("content-length", "1"), true) },
		"bad content-length":      func(p *wiretest.Conn) { p.WriteHeaders(1, wiretest.Head("content-length", "-1"), true) },
		"WINDOW_UPDATE of 0":      func(p *wiretest.Conn) { p.WriteWindowUpdate(1, 0) },
		"pseudo-header in trailers": func(p *wiretest.Conn) {
			p.WriteHeaders(1, head, false)
			p.WriteHeaders(1, wiretest.Fields(":status", "200"), true)
		},
		"second HEADERS without END_STREAM": func(p *wiretest.Conn) {
			p.WriteHeaders(1, head, false)
			p.WriteHeaders(1, wiretest.Fields("x", "y"), false)
		},
		"content-length too small": func(p *wiretest.Conn) {
			p.WriteHeaders(1, wiretest.Head("content-length", "1"), false)
			p.WriteData(1, []byte("xy"), false)
		},
		"content-length too large": func(p *wiretest.Conn) {
			p.WriteHeaders(1, wiretest.Head("content-length", "3"), false)
			p.WriteData(1, []byte("xy"), true)
		},
		"content-length and trailers": func(p *wiretest.Conn) {
			p.WriteHeaders(1, wiretest.Head("content-length", "3"), false)
			p.WriteHeaders(1, wiretest.Fields("x", "y"), true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := clientAgainst(t, Config{})
			r := newRecorder(t)
			s := mustOpen(t, c, false, r)
			c.Flush()
			p.ExpectHeaders()
			f(p)
			if code := p.ExpectReset(1); code != http2.ErrCodeProtocol {
				t.Errorf("reset with %s", code)
			}
			until(t, "error", func() bool { return s.Err() != nil })
			if e := s.Err(); e.Kind != KindProtocol || e.Remote || e.Unprocessed || e.Debug == "" {
				t.Errorf("%+v", e)
			}
			// It is a stream error: the connection goes on.
			mustOpen(t, c, true, newRecorder(t))
			c.Flush()
			p.ExpectHeaders()
		})
	}
}

func TestClientHeadRequestHasNoBody(t *testing.T) {
	c, p := clientAgainst(t, Config{})
	r := newRecorder(t)
	if _, err := c.OpenStream(wiretest.Fields(":method", "HEAD", ":scheme", "http", ":path", "/"), true, r); err != nil {
		t.Fatal(err)
	}
	c.Flush()
	p.ExpectHeaders()
	p.WriteHeaders(1, wiretest.Fields(":status", "200", "content-length", "10"), true)
	r.want("head :status=200 content-length=10 true")
}

func TestClientConnectionErrors(t *testing.T) {
	for name, tt := range map[string]struct {
		send func(p *wiretest.Conn)
		code http2.ErrCode
	}{
		"frame too large":       {func(p *wiretest.Conn) { p.WriteData(1, make([]byte, 16385), false) }, http2.ErrCodeFrameSize},
		"DATA on stream 0":      {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameData, 0, 0, []byte("x")) }, http2.ErrCodeProtocol},
		"HEADERS on stream 0":   {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameHeaders, 4, 0, []byte{0x88}) }, http2.ErrCodeProtocol},
		"RST on stream 0":       {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameRSTStream, 0, 0, make([]byte, 4)) }, http2.ErrCodeProtocol},
		"PRIORITY on stream 0":  {func(p *wiretest.Conn) { p.WriteFrame(http2.FramePriority, 0, 0, make([]byte, 5)) }, http2.ErrCodeProtocol},
		"SETTINGS on a stream":  {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameSettings, 0, 1, nil) }, http2.ErrCodeProtocol},
		"PING on a stream":      {func(p *wiretest.Conn) { p.WriteFrame(http2.FramePing, 0, 1, make([]byte, 8)) }, http2.ErrCodeProtocol},
		"GOAWAY on a stream":    {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameGoAway, 0, 1, make([]byte, 8)) }, http2.ErrCodeProtocol},
		"SETTINGS of 5":         {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameSettings, 0, 0, make([]byte, 5)) }, http2.ErrCodeFrameSize},
		"SETTINGS ACK of 6":     {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameSettings, 1, 0, make([]byte, 6)) }, http2.ErrCodeFrameSize},
		"PING of 7":             {func(p *wiretest.Conn) { p.WriteFrame(http2.FramePing, 0, 0, make([]byte, 7)) }, http2.ErrCodeFrameSize},
		"RST of 3":              {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameRSTStream, 0, 1, make([]byte, 3)) }, http2.ErrCodeFrameSize},
		"WINDOW_UPDATE of 5":    {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameWindowUpdate, 0, 1, make([]byte, 5)) }, http2.ErrCodeFrameSize},
		"GOAWAY of 7":           {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameGoAway, 0, 0, make([]byte, 7)) }, http2.ErrCodeFrameSize},
		"WINDOW_UPDATE 0":       {func(p *wiretest.Conn) { p.WriteWindowUpdate(0, 0) }, http2.ErrCodeProtocol},
		"window overflow":       {func(p *wiretest.Conn) { p.WriteWindowUpdate(0, 1<<31-1) }, http2.ErrCodeFlowControl},
		"initial window":        {func(p *wiretest.Conn) { p.WriteSettings(http2.Setting{ID: 4, Val: 1 << 31}) }, http2.ErrCodeFlowControl},
		"MAX_FRAME_SIZE small":  {func(p *wiretest.Conn) { p.WriteSettings(http2.Setting{ID: 5, Val: 16383}) }, http2.ErrCodeProtocol},
		"MAX_FRAME_SIZE large":  {func(p *wiretest.Conn) { p.WriteSettings(http2.Setting{ID: 5, Val: 1 << 24}) }, http2.ErrCodeProtocol},
		"ENABLE_PUSH":           {func(p *wiretest.Conn) { p.WriteSettings(http2.Setting{ID: 2, Val: 1}) }, http2.ErrCodeProtocol},
		"PUSH_PROMISE":          {func(p *wiretest.Conn) { p.WriteFrame(http2.FramePushPromise, 4, 1, []byte{0, 0, 0, 2, 0x88}) }, http2.ErrCodeProtocol},
		"idle stream: DATA":     {func(p *wiretest.Conn) { p.WriteData(9, nil, false) }, http2.ErrCodeProtocol},
		"idle stream: HEADERS":  {func(p *wiretest.Conn) { p.WriteHeaders(9, wiretest.Head(), false) }, http2.ErrCodeProtocol},
		"idle stream: RST":      {func(p *wiretest.Conn) { p.WriteReset(9, http2.ErrCodeCancel) }, http2.ErrCodeProtocol},
		"idle stream: WINDOW":   {func(p *wiretest.Conn) { p.WriteWindowUpdate(9, 1) }, http2.ErrCodeProtocol},
		"even stream":           {func(p *wiretest.Conn) { p.WriteHeaders(2, wiretest.Head(), false) }, http2.ErrCodeProtocol},
		"padding too long":      {func(p *wiretest.Conn) { p.WriteFrame(http2.FrameData, 8, 1, []byte{5, 0, 0}) }, http2.ErrCodeProtocol},
		"CONTINUATION alone":    {func(p *wiretest.Conn) { p.WriteContinuation(1, []byte{0x88}, true) }, http2.ErrCodeProtocol},
		"bad HPACK index":       {func(p *wiretest.Conn) { p.WriteHeaderBlock(1, []byte{0xff, 0x7f}, false, true) }, http2.ErrCodeCompression},
		"truncated HPACK":       {func(p *wiretest.Conn) { p.WriteHeaderBlock(1, []byte{0x40, 0x05, 'a'}, false, true) }, http2.ErrCodeCompression},
		"table size above ours": {func(p *wiretest.Conn) { p.WriteHeaderBlock(1, []byte{0x3f, 0xe1, 0x7f, 0x88}, false, true) }, http2.ErrCodeCompression},
		"frame inside a block": {func(p *wiretest.Conn) {
			p.WriteHeaderBlock(1, []byte{0x88}, false, false)
			p.WritePing(false, [8]byte{})
		}, http2.ErrCodeProtocol},
		"unknown frame inside a block": {func(p *wiretest.Conn) {
			p.WriteHeaderBlock(1, []byte{0x88}, false, false)
			p.WriteFrame(0xfa, 0, 1, nil)
		}, http2.ErrCodeProtocol},
		"CONTINUATION of another stream": {func(p *wiretest.Conn) {
			p.WriteHeaderBlock(1, []byte{0x88}, false, false)
			p.WriteContinuation(3, nil, true)
		}, http2.ErrCodeProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := clientAgainst(t, Config{})
			<-c.Ready()
			r := newRecorder(t)
			mustOpen(t, c, false, r)
			c.Flush()
			p.ExpectHeaders()
			tt.send(p)
			f := expectGoAway(t, p, tt.code)
			if len(f.Data) == 0 {
				t.Error("no debug text")
			}
			wait(t, c.Done())
			r.want("reset protocol " + tt.code.String() + " remote=false unprocessed=false")
			if e := c.Err(); e.Kind != KindProtocol || !strings.HasPrefix(e.Error(), "peer broke the protocol: "+tt.code.String()+": ") {
				t.Errorf("%v", e)
			}
		})
	}
}

func TestClientGoAway(t *testing.T) {
	var told *Error
	c, p := clientAgainst(t, Config{OnGoAway: func(_ *Conn, e *Error) { told = e }})
	low, high := newRecorder(t), newRecorder(t)
	mustOpen(t, c, true, low)
	mustOpen(t, c, true, high)
	c.Flush()
	p.ExpectHeaders()
	p.ExpectHeaders()
	select {
	case <-c.Leaving():
		t.Fatal("leaving before GOAWAY")
	default:
	}
	p.WriteGoAway(1<<31-1, http2.ErrCodeNo, "")
	p.Barrier()
	wait(t, c.Leaving())
	if c.Available() != 0 || !c.Draining() {
		t.Error("streams available after GOAWAY")
	}
	if _, err := c.OpenStream(requestHead, true, low); err == nil || err.Kind != KindGoAway || !err.Unprocessed {
		t.Errorf("open after GOAWAY: %v", err)
	}
	low.none()
	p.WriteGoAway(1, http2.ErrCodeNo, "max_age")
	high.want("reset goaway NO_ERROR remote=true unprocessed=true")
	p.WriteHeaders(1, wiretest.Head("grpc-status", "0"), true)
	low.want("head" + text(wiretest.Head("grpc-status", "0")) + " true")
	wait(t, c.Done()) // the last stream has ended
	if e := c.Err(); e.Kind != KindGoAway || e.Debug != "max_age" || e.Error() != `peer sent GOAWAY NO_ERROR "max_age"` {
		t.Errorf("%v", e)
	}
	if told == nil || told.Debug != "max_age" {
		t.Errorf("told %v", told)
	}
	if err := p.ExpectClosed(); err == nil {
		t.Error("no end")
	}
}

func TestClientConnectionLost(t *testing.T) {
	t.Run("after GOAWAY with an error", func(t *testing.T) {
		c, p := clientAgainst(t, Config{})
		r := newRecorder(t)
		mustOpen(t, c, true, r)
		c.Flush()
		p.ExpectHeaders()
		p.WriteGoAway(1, http2.ErrCodeEnhanceYourCalm, "too_many_pings")
		p.Close()
		r.want("reset connection_lost ENHANCE_YOUR_CALM remote=true unprocessed=false")
		wait(t, c.Done())
		if e := c.Err(); !strings.HasPrefix(e.Error(), `connection lost after GOAWAY ENHANCE_YOUR_CALM "too_many_pings"`) {
			t.Errorf("%q", e)
		}
	})
	t.Run("reset", func(t *testing.T) {
		c, p := clientAgainst(t, Config{})
		r := newRecorder(t)
		s := mustOpen(t, c, true, r)
		c.Flush()
		p.ExpectHeaders()
		p.Barrier()
		until(t, "what the reader answered is flushed", func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return !c.inBatch && !c.flushing
		})
		unsent := newRecorder(t)
		mustOpen(t, c, true, unsent) // never flushed
		p.Abort()
		r.want("reset connection_lost NO_ERROR remote=true unprocessed=false")
		unsent.want("reset connection_lost NO_ERROR remote=true unprocessed=true")
		wait(t, c.Done())
		// The reader or a write, whichever comes first, tells.
		if e := s.Err().Error(); !strings.HasPrefix(strings.Replace(e, "write tcp", "read tcp", 1), "connection lost: read tcp 127.0.0.1:") || !strings.HasSuffix(e, "connection reset by peer") {
			t.Errorf("%q", e)
		}
		if _, err := c.OpenStream(requestHead, true, r); err == nil || err.Kind != KindConnLost || !err.Unprocessed {
			t.Errorf("open afterwards: %v", err)
		}
	})
}

func TestClientNotHTTP2(t *testing.T) {
	for name, tt := range map[string]struct{ say, want string }{
		"HTTP/1.1":  {"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n", `"HTTP/1.1 400 Bad Request  Content-Type: text/plain"`},
		"TLS alert": {"\x15\x03\x01\x00\x02\x02\x46", "it sent a TLS alert, so it expects TLS"},
		"banner":    {"220 mail.example.com ESMTP\r\n", `"220 mail.example.com ESMTP"`},
		"short":     {"no", `"no"`},
	} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			l := wiretest.Listen(t)
			nc, err := net.Dial("tcp", l.Addr())
			if err != nil {
				t.Fatal(err)
			}
			r := newRecorder(t)
			c := Client(nc, Config{})
			mustOpen(t, c, true, r)
			c.Flush()
			raw := l.AcceptRaw()
			if _, err := raw.Write([]byte(tt.say)); err != nil {
				t.Fatal(err)
			}
			_ = raw.(*net.TCPConn).CloseWrite()
			wait(t, c.Ready())
			wait(t, c.Done())
			r.want("reset not_http2 PROTOCOL_ERROR remote=true unprocessed=true")
			if e := c.Err(); e.Kind != KindNotHTTP2 || e.Debug != tt.want {
				t.Errorf("%v", e)
			}
			raw.Close()
		})
	}
}
