package grpcproxy_test

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// http1 sends a request over HTTP/1.1 in raw bytes and returns the answer with its trailers.
func (r *rig) http1(request string) (*http.Response, string) {
	r.t.Helper()
	nc := wiretest.DialRaw(r.t, r.H2C)
	_ = nc.SetDeadline(time.Now().Add(timeout))
	if _, err := io.WriteString(nc, request); err != nil {
		r.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(nc), &http.Request{Method: http.MethodPost})
	if err != nil {
		r.t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp, string(body)
}

// gRPC needs HTTP/2, but what comes over HTTP/1.1 with gRPC's content-type is carried as far as HTTP/1.1 can: request and
// then answer, with the status in chunked trailers.
func TestWireHTTP1(t *testing.T) {
	r := newRig(t, rigOptions{})
	message := string(wiretest.Message([]byte("request")))
	head := "POST " + wirePath + " HTTP/1.1\r\nHost: api.example.com\r\nContent-Type: application/grpc\r\nTE: trailers\r\nConnection: TE\r\n"
	whole := head + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(message), message)
	chunked := head + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(message), message)

	type answer struct {
		resp *http.Response
		body string
	}
	call := func(r *rig, request string) (*rpc, chan answer) {
		got := make(chan answer, 1)
		go func() {
			defer close(got)
			resp, body := r.http1(request)
			got <- answer{resp, body}
		}()
		c := &rpc{r: r}
		c.take(0)
		if p := c.got(len(message), true); string(p) != message {
			r.t.Errorf("the upstream got %q", p)
		}
		return c, got
	}
	for name, request := range map[string]string{"content-length": whole, "chunked": chunked} {
		r.run(name, func(t *testing.T, r *rig) {
			c, got := call(r, request)
			sameFields(t, without(c.req.Fields, "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"), wiretest.Fields(
				":method", "POST", ":scheme", "http", ":path", wirePath, ":authority", "api.example.com",
				"content-type", "application/grpc", "te", "trailers", "via", "1.1 Caddy"))
			c.head("x-lead", "1")
			c.message("response")
			c.trailers("grpc-status", "5", "grpc-message", "m", "x-trail", "1")
			a := <-got
			if a.resp.StatusCode != 200 || a.resp.Header.Get("Content-Type") != "application/grpc" || a.resp.Header.Get("X-Lead") != "1" ||
				a.body != string(wiretest.Message([]byte("response"))) {
				t.Errorf("%v %v %q", a.resp.Status, a.resp.Header, a.body)
			}
			if tr := a.resp.Trailer; tr.Get("Grpc-Status") != "5" || tr.Get("Grpc-Message") != "m" || tr.Get("X-Trail") != "1" {
				t.Errorf("trailers %v", a.resp.Trailer)
			}
		})
	}
	r.run("Trailers-Only", func(t *testing.T, r *rig) {
		c, got := call(r, whole)
		c.up.WriteHeaders(c.sid, wiretest.Head("grpc-status", "5"), true)
		a := <-got
		if a.resp.StatusCode != 200 || a.resp.Header.Get("Grpc-Status") != "5" || a.body != "" {
			t.Errorf("%v %v %q", a.resp.Status, a.resp.Header, a.body)
		}
	})
	r.run("reset before the head", func(t *testing.T, r *rig) {
		c, got := call(r, whole)
		c.up.WriteReset(c.sid, http2.ErrCodeInternal)
		a := <-got
		if a.resp.StatusCode != 200 || a.resp.Header.Get("Grpc-Status") != "13" {
			t.Errorf("%v %v", a.resp.Status, a.resp.Header)
		}
	})
	r.run("reset after a message", func(t *testing.T, r *rig) {
		c, got := call(r, whole)
		c.head()
		c.message("response")
		c.up.WriteReset(c.sid, http2.ErrCodeInternal)
		a := <-got
		if a.resp.StatusCode != 200 || a.resp.Trailer.Get("Grpc-Status") != "13" {
			t.Errorf("%v %v", a.resp.Header, a.resp.Trailer)
		}
	})
	// HTTP/1.1 knows no answer before the request's end that both sides can rely on, but the proxy must not hang.
	r.run("answered before the request's end", func(t *testing.T, r *rig) {
		nc := wiretest.DialRaw(t, r.H2C)
		_ = nc.SetDeadline(time.Now().Add(timeout))
		fmt.Fprintf(nc, "%sTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", head, len(message), message)
		c := &rpc{r: r}
		c.take(0)
		c.got(len(message), false)
		c.up.WriteHeaders(c.sid, wiretest.Head("grpc-status", "8"), true)
		resp, err := http.ReadResponse(bufio.NewReader(nc), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := resp.Header.Get("Grpc-Status"); got != "8" {
			t.Errorf("grpc-status %q: %v", got, resp.Header)
		}
		if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeNo {
			t.Errorf("RST_STREAM(%v)", code)
		}
	})
	r.run("client goes away before the answer", func(t *testing.T, r *rig) {
		nc := wiretest.DialRaw(t, r.H2C)
		_ = nc.SetDeadline(time.Now().Add(timeout))
		_, _ = io.WriteString(nc, whole)
		c := &rpc{r: r}
		c.take(0)
		c.got(len(message), true)
		_ = nc.Close()
		c.cancelled()
	})
	r.complete()
}
