package h2

import (
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// Blanks around values of fields are taken off in both roles, on the way in and on the way out, and never an error: RFC 9113
// section 8.2.1 has a message with them malformed, but grpc-go sends the status message "no such user: " as it is.
func TestBlanksAroundValues(t *testing.T) {
	t.Run("client", func(t *testing.T) {
		c, p := clientAgainst(t, Config{})
		r := newRecorder(t)
		s, err := c.OpenStream(append(requestHead[:len(requestHead):len(requestHead)], Field{Name: "x", Value: "\t a b "}, Field{Name: "y", Value: " "}), false, r)
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
