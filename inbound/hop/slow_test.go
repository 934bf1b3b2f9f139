package hop

import (
	"bytes"
	"context"
	"net/http"
	"slices"
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// stalls serves a path whose uploads nobody reads, one whose answers are large, and echoes anything else.
func stalls(g *gate) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/stall":
			g.wait(r)
		case "/large":
			_, _ = w.Write(make([]byte, 2<<20))
		default:
			serveBodies(w, r)
		}
	}
}

// upload sends as much as is taken of a stream that nobody reads.
func upload(t *testing.T, c *wiretest.Conn, g *gate) {
	t.Helper()
	id := c.Open(head("POST", "/stall"), false)
	g.next(t)
	send(t, c, id, make([]byte, serverConfig.InitialWindow), false)
}

// echoes makes small requests, each of which must be answered.
func echoes(t *testing.T, c *wiretest.Conn) {
	t.Helper()
	body := string(pattern(2000, 1))
	for range 10 {
		if h := post(c, "/", body); string(h.Data) != body {
			t.Fatalf("%d bytes, %s", len(h.Data), h.Sequence())
		}
		if h := get(c, "/?n=2000"); len(h.Data) != 2000 {
			t.Fatalf("%d bytes, %s", len(h.Data), h.Sequence())
		}
	}
}

// Uploads that nobody reads stop no others of the same client, from the first moment on. Go's server grants them all one window of 1
// MiB.
func TestStalledUploads(t *testing.T) {
	for name, n := range map[string]int{"1": 1, "20": 20, "40": 40} {
		t.Run(name, func(t *testing.T) {
			g := newGate()
			r := newRig(t, stalls(g))
			c := r.raw()
			for range n {
				upload(t, c, g)
			}
			echoes(t, c)
			if n > 1 {
				until(t, "tight connection", func() bool { return r.inner().Tight() })
				echoes(t, c)
			}
			close(g.open)
			r.idle()
			echoes(t, c)
			if d := r.dials(); d > maxConns {
				t.Errorf("%d connections in the process", d)
			}
		})
	}
}

// Neither do answers that their client does not read.
func TestSlowReaders(t *testing.T) {
	r := newRig(t, stalls(newGate()))
	c := r.raw(wiretest.Options{HoldWindows: true, DiscardData: true})
	c.WriteWindowUpdate(0, 1<<30)
	for range 40 {
		id := c.Open(head("GET", "/large"), true)
		for n := 0; n < firstWindow; {
			n += c.ExpectOn(id, http2.FrameData).Length
		}
	}
	for range 20 {
		if h := get(c, "/?n=2000"); h.DataLen != 2000 {
			t.Fatalf("%d bytes, %s", h.DataLen, h.Sequence())
		}
	}
	if d := r.dials(); d != 1 {
		t.Errorf("%d connections in the process", d)
	}
}

// Both at once, with an upload and a download that move.
func TestIsolation(t *testing.T) {
	g := newGate()
	r := newRig(t, stalls(g))
	c := r.raw(wiretest.Options{HoldWindows: true})
	c.WriteWindowUpdate(0, 1<<30)
	for range 20 {
		upload(t, c, g)
		c.Open(head("GET", "/large"), true)
	}
	moves := c.Open(head("POST", "/"), false)
	c.WriteWindowUpdate(moves, 1<<30)
	body := pattern(2<<20, 2)
	sent := make(chan error, 1)
	go func() {
		_, err := c.SendData(context.Background(), moves, body, true)
		sent <- err
	}()
	echoes(t, c)
	if h := c.Collect(moves); sum(h.Data) != sum(body) || h.Get("x-sum") != sum(body) {
		t.Errorf("%d bytes, %s", len(h.Data), h.Sequence())
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// An upload that moves does not cost connections.
func TestUploadsMove(t *testing.T) {
	r := newRig(t, serveBodies)
	c := r.raw()
	for range 10 {
		id := c.Open(head("POST", "/"), false)
		send(t, c, id, make([]byte, 300_000), true)
		if h := c.Collect(id); h.DataLen != 300_000 {
			t.Fatalf("%d bytes, %s", h.DataLen, h.Sequence())
		}
	}
	if d := r.dials(); d != 1 {
		t.Errorf("%d connections in the process", d)
	}
}

// An answer that ends before the request, to a client that reads slowly: the server is done with the stream long before the client is.
func TestEarlyAnswerSlowReader(t *testing.T) {
	body := pattern(200_000, 7)
	g := newGate()
	cfg := serverConfig
	cfg.MaxWindow = cfg.InitialWindow // so that what is held matters
	r := newRigWith(t, cfg, func(w http.ResponseWriter, r *http.Request) {
		g.wait(r)
		if r.URL.Path == "/trailers" {
			w.Header().Set("Trailer", "X-A")
			defer w.Header().Set("X-A", "1")
		}
		_, _ = w.Write(body)
	})
	for _, path := range []string{"/", "/trailers"} {
		c := r.raw(wiretest.Options{HoldWindows: true})
		c.WriteWindowUpdate(0, 1<<20)
		id := c.Open(head("POST", path), false)
		g.next(t)
		// More comes than Go's server takes of what nobody reads.
		ctx, cancel := context.WithCancel(t.Context())
		sent := start(func() (int, error) { return c.SendData(ctx, id, make([]byte, 2<<20), false) })
		until(t, "upload that waits here", func() bool { return r.conn.Stats().Held > int64(cfg.InitialWindow)/2 })
		cancel()
		must(t, sent)
		g.open <- struct{}{}
		var got []byte
		for len(got) < firstWindow {
			got = append(got, c.ExpectOn(id, http2.FrameData).Data...)
		}
		r.idle()
		c.Barrier()
		if f := c.Untaken(id); slices.ContainsFunc(f, func(f wiretest.Frame) bool { return f.Type == http2.FrameRSTStream }) {
			t.Fatalf("%v", f)
		}
		// More of the request may come: it is taken, and forgotten.
		send(t, c, id, make([]byte, 2<<20), false)
		// Windows come in odd pieces.
		for n := 1; len(got) < len(body); n = (n*3 + 1) % 30000 {
			c.WriteWindowUpdate(id, uint32(n))
			for want := min(len(body), len(got)+n); len(got) < want; {
				got = append(got, c.ExpectOn(id, http2.FrameData).Data...)
			}
		}
		if !bytes.Equal(got, body) {
			t.Errorf("%d bytes that are not the answer", len(got))
		}
		if code := c.ExpectReset(id); code != http2.ErrCodeNo {
			t.Error(code)
		}
		if path == "/trailers" {
			c.ExpectOn(id, http2.FrameHeaders) // the head
			if f := c.ExpectOn(id, http2.FrameHeaders); f.Get("x-a") != "1" || !f.EndStream() {
				t.Errorf("%v", f)
			}
		}
	}
}

// An answer that a slow reader leaves here is given up when too much is held, though all of it has come from the server.
func TestMemory(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(make([]byte, 200_000)) })
	c := r.raw(wiretest.Options{HoldWindows: true})
	c.WriteWindowUpdate(0, 1<<20)
	id := c.Open(head("GET", "/"), true)
	for n := 0; n < firstWindow; {
		n += c.ExpectOn(id, http2.FrameData).Length
	}
	r.idle()
	h2.ProcessBudget.SetLimit(1)
	defer h2.ProcessBudget.SetLimit(h2.DefaultBudgetLimit)
	if code := c.ExpectReset(id); code != http2.ErrCodeEnhanceYourCalm {
		t.Error(code)
	}
}
