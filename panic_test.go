package grpcproxy_test

import (
	"context"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() {
	caddy.RegisterModule(faulty{})
	httpcaddyfile.RegisterHandlerDirective("test_faulty", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		h.Next()
		return faulty{Fault: h.RemainingArgs()[0]}, nil
	})
}

// faulty is a handler in front of the proxy that does harm.
type faulty struct {
	// Fault is what panics (read, head, write, flush, placeholder), timeout, for a request that ends after a while, late,
	// for one that reaches the proxy when its client is gone, or http3, for one that a server has not checked.
	Fault string `json:"fault"`
}

func (faulty) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_faulty", New: func() caddy.Module { return new(faulty) }}
}

func (f faulty) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if r.Header.Get("healthy") != "" {
		return next.ServeHTTP(w, r)
	}
	if f.Fault == "http3" {
		r.ProtoMajor, r.ProtoMinor, r.ContentLength = 3, 0, 100
	}
	if f.Fault == "late" {
		<-r.Context().Done()
		return next.ServeHTTP(w, r)
	}
	if f.Fault == "timeout" {
		ctx, cancel := context.WithTimeout(r.Context(), 100*time.Millisecond)
		defer cancel()
		return next.ServeHTTP(w, r.WithContext(ctx))
	}
	if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok && f.Fault == "placeholder" {
		repl.Map(func(key string) (any, bool) {
			if key == "test.panic" {
				panic(http.ErrAbortHandler)
			}
			return nil, false
		})
	}
	r.Body = faultyBody{r.Body, f.Fault}
	return next.ServeHTTP(&faultyWriter{&caddyhttp.ResponseWriterWrapper{ResponseWriter: w}, f.Fault}, r)
}

type faultyBody struct {
	io.ReadCloser
	fault string
}

func (b faultyBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.fault == "read" && n > 0 {
		panic(http.ErrAbortHandler)
	}
	return n, err
}

type faultyWriter struct {
	*caddyhttp.ResponseWriterWrapper
	fault string
}

func (w *faultyWriter) WriteHeader(status int) {
	w.panicIn("head")
	w.ResponseWriterWrapper.WriteHeader(status)
}

func (w *faultyWriter) Write(p []byte) (int, error) {
	w.panicIn("write")
	return w.ResponseWriterWrapper.Write(p)
}

func (w *faultyWriter) FlushError() error {
	w.panicIn("flush")
	return http.NewResponseController(w.ResponseWriter).Flush()
}

func (w *faultyWriter) panicIn(fault string) {
	if w.fault == fault {
		panic(http.ErrAbortHandler)
	}
}

// A panic of a handler in front frees everything: the upstream's stream, the count of calls, all goroutines. The client's
// stream is reset, by the server.
func TestPanics(t *testing.T) {
	for _, fault := range []string{"read", "head", "write", "flush"} {
		t.Run(fault, func(t *testing.T) {
			r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "route {\n\ttest_faulty " + fault + "\n\tgrpc_proxy UPSTREAMS\n}"}})
			shapes := []func() *rpc{
				func() *rpc { return r.unary() },
				func() *rpc { return r.streaming() },
			}
			if fault == "read" {
				shapes = []func() *rpc{func() *rpc {
					c := r.streaming()
					c.head()
					c.gotHead() // the answer has a goroutine of its own from here on
					c.client.WriteData(c.id, []byte("request"), false)
					return c
				}}
			}
			for _, begin := range shapes {
				c := begin()
				if fault != "read" {
					c.up.Batch(func() {
						c.head()
						c.message("response")
					})
				}
				if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
					t.Errorf("the upstream got RST_STREAM(%v)", code)
				}
				if h := c.result(); !h.Reset {
					t.Errorf("the client got %s", h.Sequence())
				}
			}
			eventually(t, "no call is counted", noneActive)
			c := r.unary("healthy", "yes")
			c.head()
			c.message("response")
			c.trailers()
			c.ok()
			for _, line := range r.Log("http.handlers.grpc_proxy") {
				if line["msg"] == "call failed" && line["status"] != "INTERNAL" {
					t.Errorf("%v", line)
				}
			}
		})
	}
}

// noneActive tells whether no upstream has a call.
func noneActive() bool {
	n := int64(0)
	upstream.States.Range(func(_ string, s *upstream.State) bool {
		n += s.Active()
		return true
	})
	return n == 0
}

// The same before there is a stream to the upstream.
func TestPanicWhileOpening(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "route {\n\ttest_faulty placeholder\n\tgrpc_proxy UPSTREAMS {\n\t\theader_up x {test.panic}\n\t}\n}"}})
	c := r.open()
	if h := c.result(); !h.Reset {
		t.Errorf("the client got %s", h.Sequence())
	}
	eventually(t, "no call is counted", noneActive)
	c = r.unary("healthy", "yes")
	c.head()
	c.message("response")
	c.trailers()
	c.ok()
}

// The same while the upstream does not read and the request waits for it.
func TestPanicWhileSending(t *testing.T) {
	r := newRig(t, rigOptions{
		Up:    wiretest.Options{HoldWindows: true},
		Caddy: proxytest.Options{Site: "route {\n\ttest_faulty write\n\tgrpc_proxy UPSTREAMS\n}"},
	})
	c := r.open()
	sent := make(chan error, 1)
	go func() {
		_, err := c.client.SendData(t.Context(), c.id, pattern(8<<20), true)
		sent <- err
	}()
	c.take(0)
	c.got(50<<10, false)
	c.head()
	c.message("response")
	if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
		t.Errorf("the upstream got RST_STREAM(%v)", code)
	}
	if h := c.result(); !h.Reset {
		t.Errorf("the client got %s", h.Sequence())
	}
	if err := <-sent; err == nil {
		t.Error("all of the request was taken")
	}
}
