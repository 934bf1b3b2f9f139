package hop

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

func TestMethods(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("X-Seen", fmt.Sprint(r.Method, " ", r.URL, " ", r.Host, " ", r.RemoteAddr, " ", r.Proto))
		w.Header().Set("Content-Length", "2")
		_, _ = io.WriteString(w, "ok")
	})
	c := r.raw()
	for _, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"} {
		h := c.CollectAll(c.Open(head(method, "/a/b%20c?d=e"), true))
		want := "HEADERS DATA+END_STREAM"
		if method == "HEAD" {
			want = "HEADERS+END_STREAM"
		}
		ordered(t, h, "200", want)
		if got, want := h.Get("x-seen"), method+" /a/b%20c?d=e a.example 127.0.0.1:50000 HTTP/2.0"; got != want {
			t.Errorf("the server saw %q, want %q", got, want)
		}
		if h.Get("content-length") != "2" {
			t.Errorf("%s: %v", method, h.Head)
		}
	}
	if n := r.dials(); n != 1 {
		t.Errorf("%d connections in the process", n)
	}
}

func TestBodies(t *testing.T) {
	r := newRig(t, serveBodies)
	c := r.client()
	for _, n := range []int{0, 1, 100_000, 10 << 20} {
		body := pattern(n, uint32(n))
		req, _ := http.NewRequest(http.MethodPost, "http://"+r.addr, io.MultiReader(bytes.NewReader(body)))
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || sum(got) != sum(body) || resp.Trailer.Get("X-Sum") != sum(body) || resp.Trailer.Get("X-Len") != fmt.Sprint(n) {
			t.Errorf("%d bytes: %d bytes, trailers %v, %v", n, len(got), resp.Trailer, err)
		}
	}
}

// An empty body can end with the head, with empty DATA, or with trailers.
func TestEmptyBody(t *testing.T) {
	r := newRig(t, serveBodies)
	c := r.raw()
	for name, end := range map[string]func(id uint32){
		"DATA":     func(id uint32) { c.WriteData(id, nil, true) },
		"trailers": func(id uint32) { c.WriteHeaders(id, wiretest.Fields("x-a", "1"), true) },
	} {
		id := c.Open(head("POST", "/", "trailer", "x-a"), false)
		end(id)
		h := c.CollectAll(id)
		ordered(t, h, "200", "HEADERS HEADERS+END_STREAM")
		if h.Get("x-len") != "0" || name == "trailers" && h.Get("echo-x-a") != "1" {
			t.Errorf("%s: %v", name, h.Trailers)
		}
	}
	ordered(t, c.CollectAll(c.Open(head("POST", "/"), true)), "200", "HEADERS HEADERS+END_STREAM")
}

func TestTrailers(t *testing.T) {
	r := newRig(t, serveBodies)
	body := pattern(300_000, 1)
	req, _ := http.NewRequest(http.MethodPost, "http://"+r.addr, io.MultiReader(bytes.NewReader(body)))
	req.Trailer = http.Header{"X-A": {"1", "2"}, "X-B": {"3"}}
	resp, err := r.client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if a, b := resp.Trailer["Echo-X-A"], resp.Trailer.Get("Echo-X-B"); fmt.Sprint(a) != "[1 2]" || b != "3" || resp.Trailer.Get("X-Sum") != sum(body) {
		t.Errorf("%v", resp.Trailer)
	}
}

// Trailers of 64 KiB need CONTINUATION, both ways.
func TestLargeTrailers(t *testing.T) {
	r := newRig(t, serveBodies)
	c := r.raw()
	large := strings.Repeat("0123456789abcdef", 4<<10)
	id := c.Open(head("POST", "/", "trailer", "x-a"), false)
	c.WriteData(id, []byte("hello"), false)
	c.WriteHeaders(id, wiretest.Fields("x-a", large), true)
	h := c.CollectAll(id)
	if string(h.Data) != "hello" || h.Get("echo-x-a") != large || !h.Ended || h.Reset {
		t.Errorf("%q, %d bytes of trailer, %s", h.Data, len(h.Get("echo-x-a")), h.Sequence())
	}
}

func TestInformational(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, _ *http.Request) {
		for _, link := range []string{"</a>", "</b>"} {
			w.Header().Set("Link", link)
			w.WriteHeader(http.StatusEarlyHints)
		}
		w.Header().Del("Link")
		w.WriteHeader(http.StatusNoContent)
	})
	h := get(r.raw(), "/")
	ordered(t, h, "204", "HEADERS HEADERS HEADERS+END_STREAM")
	if len(h.Informational) != 2 || wiretest.Get(h.Informational[0], ":status") != "103" || wiretest.Get(h.Informational[1], "link") != "</b>" {
		t.Errorf("%v", h.Informational)
	}
}

func TestExpectContinue(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		serveBodies(w, r)
	})
	c := r.raw()
	id := c.Open(head("POST", "/", "expect", "100-continue"), false)
	if f := c.ExpectOn(id, http2.FrameHeaders); f.Get(":status") != "100" {
		t.Fatalf("%v", f.Fields)
	}
	c.WriteData(id, []byte("hello"), true)
	if h := c.CollectAll(id); string(h.Data) != "hello" || wiretest.Get(h.Head, ":status") != "200" {
		t.Errorf("%q, %v", h.Data, h.Head)
	}
	id = c.Open(head("POST", "/no", "expect", "100-continue"), false)
	ordered(t, c.CollectAll(id), "403", "HEADERS+END_STREAM RST_STREAM(NO_ERROR)")
}

func TestFullDuplex(t *testing.T) {
	r := newRig(t, serveBodies)
	c := r.raw()
	id := c.Open(head("POST", "/"), false)
	for i := range 20 {
		msg := fmt.Sprint("message ", i)
		c.WriteData(id, []byte(msg), false)
		if f := c.ExpectOn(id, http2.FrameData); string(f.Data) != msg {
			t.Fatalf("%q, want %q", f.Data, msg)
		}
	}
	c.WriteData(id, nil, true)
	if h := c.CollectAll(id); !h.Ended || h.Reset {
		t.Error(h.Sequence())
	}
}

func TestClientReset(t *testing.T) {
	g := newGate()
	r := newRig(t, func(_ http.ResponseWriter, r *http.Request) { g.wait(r) })
	c := r.raw()
	for _, end := range []bool{true, false} {
		id := c.Open(head("POST", "/"), end)
		req := g.next(t)
		c.WriteReset(id, http2.ErrCodeCancel)
		<-req.Context().Done() // or the test never ends
		c.Barrier()
		if f := c.Untaken(id); len(f) > 0 {
			t.Errorf("after its reset the client got %v", f)
		}
	}
	r.idle()
}

// What a handler reads fails when the client gives the upload up.
func TestClientResetUpload(t *testing.T) {
	began, failed := make(chan struct{}), make(chan error, 1)
	r := newRig(t, func(_ http.ResponseWriter, r *http.Request) {
		close(began)
		_, err := io.Copy(io.Discard, r.Body)
		failed <- err
	})
	c := r.raw()
	id := c.Open(head("POST", "/"), false)
	send(t, c, id, make([]byte, 100_000), false)
	<-began // a stream that is reset before it has left for the server is never sent
	c.WriteReset(id, http2.ErrCodeCancel)
	if err := <-failed; err == nil {
		t.Error("the handler read to the end of a body that was cut")
	}
}

func TestAbort(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/late" {
			_, _ = flushing{w}.Write([]byte("hello"))
		}
		panic(http.ErrAbortHandler)
	})
	c := r.raw()
	for path, want := range map[string]string{"/": "RST_STREAM(INTERNAL_ERROR)", "/late": "HEADERS DATA RST_STREAM(INTERNAL_ERROR)"} {
		for _, end := range []bool{true, false} {
			if h := c.CollectAll(c.Open(head("POST", path), end)); h.Sequence() != want {
				t.Errorf("%s: %q, want %q", path, h.Sequence(), want)
			}
		}
	}
}

// RFC 9113 section 8.1: "a server MAY request that the client abort transmission of a request without error by sending a RST_STREAM
// with an error code of NO_ERROR after sending a complete response".
func TestEarlyAnswer(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/trailers" {
			w.Header().Set("Trailer", "X-A")
			defer w.Header().Set("X-A", "1")
		}
		if r.URL.Path != "/empty" {
			_, _ = io.WriteString(w, "hello")
		}
	})
	c := r.raw()
	for path, want := range map[string]string{
		"/":         "HEADERS DATA+END_STREAM",
		"/empty":    "HEADERS+END_STREAM",
		"/trailers": "HEADERS DATA HEADERS+END_STREAM",
	} {
		for _, sent := range []int{0, 1, 100_000} {
			id := c.Open(head("POST", path), false)
			if sent > 0 {
				// The rest may not be wanted any more.
				_, _ = c.SendData(context.Background(), id, make([]byte, sent), false)
			}
			ordered(t, untilReset(c, id), "200", want+" RST_STREAM(NO_ERROR)")
		}
	}
	// The connection has lost nothing.
	for range 5 {
		id := c.Open(head("POST", "/"), false)
		_, _ = c.SendData(context.Background(), id, make([]byte, 250_000), false)
		ordered(t, untilReset(c, id), "200", "HEADERS DATA+END_STREAM RST_STREAM(NO_ERROR)")
	}
}

// A server that takes no more of what a head may have is not asked.
func TestHeadTooLarge(t *testing.T) {
	r := newRig(t, func(http.ResponseWriter, *http.Request) {})
	r.cur.Load().MaxHeaderBytes = 4 << 10
	c := r.raw()
	ordered(t, get(c, "/"), "200", "HEADERS+END_STREAM")
	large := strings.Repeat("a", 6<<10)
	ordered(t, c.CollectAll(c.Open(head("GET", "/", "x-a", large), true)), "431", "HEADERS+END_STREAM")
	ordered(t, c.CollectAll(c.Open(head("POST", "/", "x-a", large), false)), "431", "HEADERS+END_STREAM RST_STREAM(NO_ERROR)")
	ordered(t, get(c, "/"), "200", "HEADERS+END_STREAM")
}

// Streams beyond what one connection of Go's server takes go on a second one.
func TestManyStreams(t *testing.T) {
	g := newGate()
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		g.wait(r)
		_, _ = io.WriteString(w, r.URL.Path)
	})
	c := r.raw()
	const n = 300
	var ids []uint32
	for i := range n {
		ids = append(ids, c.Open(head("GET", fmt.Sprint("/", i)), true))
	}
	for range n {
		g.next(t)
	}
	if d := r.dials(); d < 2 || d > 4 {
		t.Errorf("%d connections in the process", d)
	}
	close(g.open)
	for i, id := range ids {
		if h := c.Collect(id); string(h.Data) != fmt.Sprint("/", i) {
			t.Errorf("stream %d: %q, %s", id, h.Data, h.Sequence())
		}
	}
}

// The server in the process ends its connection: the client's stays, and sees nothing of it.
func TestServerLeaves(t *testing.T) {
	g := newGate()
	answer := func(name string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/wait" {
				g.wait(r)
			}
			_, _ = io.WriteString(w, name)
		}
	}
	r := newRig(t, answer("old"))
	c := r.raw()
	runs := c.Open(head("GET", "/wait"), true)
	g.next(t)
	if h := get(c, "/"); string(h.Data) != "old" {
		t.Fatalf("%q", h.Data)
	}
	old, conn := r.cur.Load(), r.inner()
	r.cur.Store(newWeb(t, answer("new")))
	left := make(chan error, 1)
	go func() { left <- old.Shutdown(context.Background()) }()
	<-conn.Leaving()
	for range 3 {
		if h := get(c, "/"); string(h.Data) != "new" {
			t.Errorf("%q, %s", h.Data, h.Sequence())
		}
	}
	close(g.open)
	if h := c.Collect(runs); string(h.Data) != "old" {
		t.Errorf("%q, %s", h.Data, h.Sequence())
	}
	if err := <-left; err != nil {
		t.Error(err)
	}
	<-conn.Done()
	if h := get(c, "/"); string(h.Data) != "new" {
		t.Errorf("%q, %s", h.Data, h.Sequence())
	}
	if n := r.dials(); n != 1 {
		t.Errorf("%d connections to the new server", n)
	}
	for _, f := range c.Untaken(0) {
		if f.Type == http2.FrameGoAway {
			t.Errorf("%v", f)
		}
	}
}

// The server's connection breaks: its streams are over, the client's connection is not.
func TestServerBreaks(t *testing.T) {
	g := newGate()
	r := newRig(t, func(_ http.ResponseWriter, r *http.Request) { g.wait(r) })
	c := r.raw()
	id := c.Open(head("GET", "/"), true)
	g.next(t)
	old := r.cur.Load()
	r.cur.Store(newWeb(t, serveBodies))
	_ = old.Close()
	if code := c.ExpectReset(id); code != http2.ErrCodeInternal {
		t.Error(code)
	}
	if h := post(c, "/", "hello"); string(h.Data) != "hello" {
		t.Errorf("%q, %s", h.Data, h.Sequence())
	}
}

func TestNoServer(t *testing.T) {
	r := newRig(t, serveBodies)
	c := r.raw()
	s := r.cur.Swap(nil)
	for _, end := range []bool{true, false} {
		id := c.Open(head("POST", "/"), end)
		if !end {
			c.WriteData(id, []byte("hello"), true)
		}
		if h := c.CollectAll(id); h.Sequence() != "RST_STREAM(REFUSED_STREAM)" {
			t.Error(h.Sequence())
		}
	}
	r.cur.Store(s)
	if h := post(c, "/", "hello"); string(h.Data) != "hello" {
		t.Errorf("%q, %s", h.Data, h.Sequence())
	}
	// The server goes between the dial and the stream.
	_ = s.Close()
	<-s.served
	<-r.inner().Done()
	id := c.Open(head("GET", "/"), true)
	_ = (<-s.far.ends).Close()
	if h := c.CollectAll(id); !h.Reset {
		t.Error(h.Sequence())
	}
}

// All ends when the client's connection does, in whatever way.
func TestClientLost(t *testing.T) {
	for name, lose := range map[string]func(*wiretest.Conn){"FIN": (*wiretest.Conn).Close, "RST": (*wiretest.Conn).Abort} {
		t.Run(name, func(t *testing.T) {
			g := newGate()
			r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/slow" {
					_, _ = w.Write(make([]byte, 1<<20))
				}
				g.wait(r)
			})
			c := r.raw(wiretest.Options{HoldWindows: true})
			for i := range 20 {
				c.Open(head("GET", "/"), true)
				c.Open(head("POST", "/"), false)
				id := c.Open(head("POST", "/"), false)
				c.WriteData(id, make([]byte, 1000), i%2 == 0)
				g.next(t)
				g.next(t)
				g.next(t)
			}
			slow := c.Open(head("GET", "/slow"), true)
			c.ExpectOn(slow, http2.FrameData)
			conn := r.inner()
			lose(c)
			until(t, "end of all contexts", func() bool { return g.over.Load() >= 60 })
			<-r.conn.Done()
			<-conn.Done()
		})
	}
}
