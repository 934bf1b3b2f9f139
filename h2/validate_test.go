package h2

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// Blanks around values of fields are taken off in both roles, on the way in and on the way out, and never an error: RFC 9113
// section 8.2.1 has a message with them malformed, but grpc-go sends the status message "no such user: " as it is.
func TestBlanksAroundValues(t *testing.T) {
	t.Run("client", func(t *testing.T) {
		c, p := clientAgainst(t, Config{})
		r := newRecorder(t)
		s, err := c.OpenStream(append(slices.Clip(requestHead), Field{Name: "x", Value: "\t a b "}, Field{Name: "y", Value: " "}), false, r)
		if err != nil {
			t.Fatal(err)
		}
		c.Flush()
		if f := p.ExpectHeaders(); f.Get("x") != "a b" || len(wiretest.Values(f.Fields, "y")) != 1 || f.Get("y") != "" {
			t.Errorf("%q", f.Fields)
		}
		p.WriteHeaders(s.ID(), wiretest.Head("x", " a", "content-length", "1 "), false)
		r.want("head :status=200 content-type=application/grpc x=a content-length=1 false")
		p.WriteData(s.ID(), []byte("m"), false)
		r.want("data 1 false")
		p.WriteHeaders(s.ID(), wiretest.Fields("grpc-status", "5", "grpc-message", "no such user: ", "z", "\t"), true)
		r.want("trailers grpc-status=5 grpc-message=no such user: z=")
		if err := s.WriteHeaders([]Field{{Name: "x", Value: "end\t"}}, true); err != nil {
			t.Fatal(err)
		}
		c.Flush()
		if f := p.ExpectOn(s.ID(), http2.FrameHeaders); f.Get("x") != "end" {
			t.Errorf("%q", f.Fields)
		}
	})
	t.Run("server", func(t *testing.T) {
		a := newCalls(t)
		c, p := serverAgainst(t, Config{}, a.accept)
		id := p.Open(wiretest.Request("a", "/s/m", "x", " a b\t", "te", " trailers"), false)
		r, s, head := a.next()
		if want := ":method=POST :scheme=http :path=/s/m :authority=a content-type=application/grpc te=trailers x=a b te=trailers false"; head != want {
			t.Errorf("got %s, want %s", head, want)
		}
		p.WriteHeaders(id, wiretest.Fields("y", " "), true)
		r.want("trailers y=")
		// Again and again: the table of remembered fields must stay in step.
		for range 3 {
			if err := s.WriteHeaders([]Field{{Name: ":status", Value: "103"}, {Name: "x", Value: " a "}}, false); err != nil {
				t.Fatal(err)
			}
			c.Flush()
			if f := p.ExpectOn(id, http2.FrameHeaders); f.Get("x") != "a" {
				t.Errorf("%q", f.Fields)
			}
		}
	})
}

// Heads that are unusual and right are taken as they are.
func TestServerUnusualHeads(t *testing.T) {
	a := newCalls(t)
	_, p := serverAgainst(t, Config{}, a.accept)
	for _, fields := range [][]string{
		{":method", "OPTIONS", ":scheme", "https", ":path", "*", ":authority", "a"},
		{":method", "CONNECT", ":authority", "a:443"},
		{":method", "POST", ":scheme", "http", ":path", "//s/m?q={x}", ":authority", "[2001:db8::1]:8080"},
		{":method", "POST", ":scheme", "coap+tcp", ":path", "/\xc3\xa4", ":authority", "a_b.%C3%A4~c"},
		{":method", "POST", ":scheme", "http", ":path", "/", "host", "a:1"},
		{":method", "POST", ":scheme", "http", ":path", "/", "host", ""},
		{":method", "POST", ":scheme", "http", ":path", "/", ":authority", "a", "x", "a\tb\xff", "cookie", "a=b"},
	} {
		p.Open(wiretest.Fields(fields...), true)
		_, _, head := a.next()
		var want strings.Builder
		for i := 0; i < len(fields); i += 2 {
			want.WriteString(fields[i] + "=" + fields[i+1] + " ")
		}
		if head != want.String()+"true" {
			t.Errorf("got %q, want %q", head, want.String())
		}
	}
}

// RFC 9113 section 8.2.3: cookies that were split for compression's sake are one field for everybody else.
func TestServerJoinsCrumbs(t *testing.T) {
	a := newCalls(t)
	_, p := serverAgainst(t, Config{}, a.accept)
	fields := wiretest.Fields(":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a",
		"cookie", "a=b", "x", "1", "cookie", "c=d", "cookie", "e=f ", "y", "2")
	fields[6].Sensitive = true
	var got []Field
	c, p2 := serverAgainst(t, Config{}, func(s *Stream, f []Field, end bool) Receiver {
		got = append(got, f...)
		return a.accept(s, f, end)
	})
	for _, p := range []*wiretest.Conn{p, p2} {
		p.Open(fields, true)
		if _, _, head := a.next(); head != ":method=GET :scheme=http :path=/ :authority=a cookie=a=b; c=d; e=f x=1 y=2 true" {
			t.Error(head)
		}
	}
	if !got[4].Sensitive {
		t.Error("a crumb that must not be indexed has become a cookie that may")
	}
	if c.Err() != nil {
		t.Error(c.Err())
	}
}

// RFC 7540 section 5.3.1: a stream that depends on itself is a stream error. Upstreams may do what they like.
func TestStreamThatDependsOnItself(t *testing.T) {
	self := func(id uint32) []byte { return []byte{0x80, 0, 0, byte(id), 15} }
	a := newCalls(t)
	c, p := serverAgainst(t, Config{}, a.accept)
	headers := func(id uint32, fields []hpack.HeaderField, end http2.Flags) {
		p.WriteFrame(http2.FrameHeaders, http2.FlagHeadersPriority|http2.FlagHeadersEndHeaders|end, id, append(self(id), p.Encode(fields)...))
	}
	headers(1, wiretest.Request("a", "/s/m"), 0)
	if code := p.ExpectReset(1); code != http2.ErrCodeProtocol {
		t.Error(code)
	}
	p.WriteFrame(http2.FramePriority, 0, 1, self(1)) // it is over
	p.WriteHeaders(3, wiretest.Request("a", "/s/m"), false)
	r, _, _ := a.next()
	headers(3, wiretest.Fields("x", "y"), http2.FlagHeadersEndStream)
	r.want("reset protocol PROTOCOL_ERROR remote=false unprocessed=false")
	p.WriteHeaders(5, wiretest.Request("a", "/s/m"), false)
	r, _, _ = a.next()
	p.WriteFrame(http2.FramePriority, 0, 5, self(3)) // on another is fine
	p.WriteFrame(http2.FramePriority, 0, 5, self(5))
	r.want("reset protocol PROTOCOL_ERROR remote=false unprocessed=false")
	p.WriteHeaders(7, wiretest.Request("a", "/s/m"), true) // the table of fields is in step
	if _, _, head := a.next(); head != strings.TrimSpace(text(wiretest.Request("a", "/s/m")))+" true" {
		t.Error(head)
	}
	if c.Err() != nil {
		t.Error(c.Err())
	}
	p.WriteFrame(http2.FramePriority, 0, 9, self(9)) // there is nothing to reset
	expectGoAway(t, p, http2.ErrCodeProtocol)

	c, p = clientAgainst(t, Config{})
	r = newRecorder(t)
	s := mustOpen(t, c, false, r)
	c.Flush()
	p.ExpectHeaders()
	p.WriteFrame(http2.FramePriority, 0, s.ID(), self(s.ID()))
	p.WriteHeaders(s.ID(), wiretest.Head(), false)
	r.want("head :status=200 content-type=application/grpc false")
}
