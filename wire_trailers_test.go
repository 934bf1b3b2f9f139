package grpcproxy_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// gRPC over HTTP/2: "Response → (Response-Headers *Length-Prefixed-Message Trailers) / Trailers-Only".
func TestWireTrailers(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, tt := range []struct {
		name     string
		trailers []string
	}{
		// net/http's way of sending trailers wants them announced; gRPC never announces them.
		{"unannounced", []string{"grpc-status", "0", "x-one", "1"}},
		// "Custom-Metadata header order is not guaranteed to be preserved except for values with duplicate header names."
		{"duplicates keep their order", []string{"grpc-status", "0", "x-many", "b", "x-many", "a", "x-many", "", "x-many", "b"}},
		// "Binary-Header → {Header-Name "-bin"} {base64 encoded value}": not ours to touch, padded or not.
		{"binary", []string{"grpc-status", "0", "x-bin", "AP8", "x-bin", "AP8=", "x-bin", "AP8,AQI="}},
		{"details of the upstream's own", []string{"grpc-status", "9", "grpc-message", "m", "grpc-status-details-bin", "CAkSAW0"}},
		// "Percent-Encoded … unencoded bytes … %x20-%x24 / %x26-%x7E".
		{"percent-encoded message", []string{"grpc-status", "2", "grpc-message", "%09 %25 100%25 %E2%82%AC ~!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}"}},
		// "When decoding invalid values, implementations MUST NOT error or throw away the message".
		{"message with invalid escapes", []string{"grpc-status", "2", "grpc-message", "%zz %1 %e2%82%ac 100%"}},
		{"message of raw UTF-8", []string{"grpc-status", "2", "grpc-message", "Gr\xc3\xb6\xc3\x9fe"}},
		{"empty message", []string{"grpc-status", "5", "grpc-message", ""}},
		{"pushback of the upstream's own", []string{"grpc-status", "14", "grpc-retry-pushback-ms", "250"}},
		{"name with dot and underscore", []string{"grpc-status", "0", "x.dot_under-line", "1"}},
		{"code without a name", []string{"grpc-status", "17"}},
		{"code far out", []string{"grpc-status", "99", "grpc-message", "m"}},
		{"64 KiB", []string{"grpc-status", "0", "x-large", strings.Repeat("v", 64<<10)}},
		{"64 KiB in many fields", append([]string{"grpc-status", "0"}, manyFields(64<<10)...)},
	} {
		r.run(tt.name, func(t *testing.T, r *rig) {
			c := r.unary()
			c.head("x-lead", "lead")
			c.message("response")
			c.trailers(tt.trailers...)
			h := c.result()
			if seq := dataOnce(h); seq != "HEADERS DATA HEADERS+END_STREAM" {
				t.Errorf("frames %s", seq)
			}
			sameFields(t, h.Head, wiretest.Head("x-lead", "lead"))
			sameFields(t, h.Trailers, wiretest.Fields(tt.trailers...))
		})
	}
}

// dataOnce is the sequence of frames without CONTINUATION, DATA frames in a row being one.
func dataOnce(h *wiretest.Half) string {
	names := slices.DeleteFunc(strings.Fields(h.Sequence()), func(s string) bool { return s == "CONTINUATION" })
	return strings.Join(slices.CompactFunc(names, func(a, b string) bool { return a == b && a == "DATA" }), " ")
}

func manyFields(size int) []string {
	var f []string
	for i := 0; size > 0; i++ {
		f = append(f, fmt.Sprintf("x-field-%d", i), strings.Repeat("v", 300))
		size -= 350
	}
	return f
}

// sameFields compares header blocks: the order counts only among fields of one name.
func sameFields(t *testing.T, got, want []hpack.HeaderField) {
	t.Helper()
	byName := func(a, b hpack.HeaderField) int { return strings.Compare(a.Name, b.Name) }
	got, want = slices.Clone(got), slices.Clone(want)
	slices.SortStableFunc(got, byName)
	slices.SortStableFunc(want, byName)
	if !slices.EqualFunc(got, want, func(a, b hpack.HeaderField) bool { return a.Name == b.Name && a.Value == b.Value }) {
		t.Errorf("got fields\n%.2000v\nwant\n%.2000v", got, want)
	}
}

// RFC 9113 section 6.5.2: SETTINGS_MAX_HEADER_LIST_SIZE is for the client to say; the proxy takes up to 1 MiB by default
// and more with max_response_header.
func TestWireLargeTrailers(t *testing.T) {
	allow := []http2.Setting{{ID: http2.SettingMaxHeaderListSize, Val: 4 << 20}}
	for _, tt := range []struct {
		name, block string
		size        int
	}{
		{"nearly 1 MiB by default", "", 1<<20 - 200},
		{"1 MiB with more allowed", "max_response_header 2MiB", 1 << 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, rigOptions{Block: tt.block, Client: wiretest.Options{Settings: allow}})
			c := r.unary()
			c.head()
			c.message("response")
			c.trailers("grpc-status", "0", "x-large", strings.Repeat("v", tt.size))
			sameFields(t, c.ok().Trailers, wiretest.Fields("grpc-status", "0", "x-large", strings.Repeat("v", tt.size)))
			r.complete() // the connections are in order
		})
	}
}

// Go's server drops trailers of some names, which the docs list. The others come through, also when they stand beside such.
func TestWireLostTrailers(t *testing.T) {
	r := newRig(t, rigOptions{})
	c := r.unary()
	c.head("www-authenticate", "lead")
	c.message("response")
	c.trailers("grpc-status", "16", "www-authenticate", "a", "if-match", "b", "x-mine", "c", "retry-after", "d")
	h := c.result()
	if got := wiretest.Get(h.Head, "www-authenticate"); got != "lead" {
		t.Errorf("in the head %q", got)
	}
	sameFields(t, h.Trailers, wiretest.Fields("grpc-status", "16", "x-mine", "c", "retry-after", "d"))
	only := r.unary()
	only.up.WriteHeaders(only.sid, wiretest.Head("grpc-status", "16", "www-authenticate", "a"), true)
	if h := only.result(); h.Sequence() != "HEADERS+END_STREAM" || wiretest.Get(h.Head, "www-authenticate") != "a" {
		t.Errorf("Trailers-Only: %s %v", h.Sequence(), h.Head)
	}
}

// An answer without messages whose trailers are a block of their own is no Trailers-Only, and does not become one. No
// empty DATA may come in between either.
func TestWireNoMessages(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, status := range []string{"0", "5"} {
		for _, together := range []bool{true, false} {
			r.run(fmt.Sprintf("status %s, at once %v", status, together), func(t *testing.T, r *rig) {
				c := r.unary()
				var head []hpack.HeaderField
				if together {
					c.up.Batch(func() {
						c.head("x-lead", "lead")
						c.trailers("grpc-status", status, "x-trail", "trail")
					})
				} else {
					c.head("x-lead", "lead")
					head = c.gotHead().Fields
					c.trailers("grpc-status", status, "x-trail", "trail")
				}
				h := c.result()
				trailers := h.Trailers
				want := "HEADERS HEADERS+END_STREAM"
				if together {
					head = h.Head
				} else {
					want, trailers = "HEADERS+END_STREAM", h.Head
				}
				if h.Sequence() != want {
					t.Errorf("frames %s, want %s", h.Sequence(), want)
				}
				sameFields(t, head, wiretest.Head("x-lead", "lead"))
				sameFields(t, trailers, wiretest.Fields("grpc-status", status, "x-trail", "trail"))
			})
		}
	}
}

// gRPC over HTTP/2: "Trailers-Only → HTTP-Status Content-Type Trailers", one HEADERS frame with END_STREAM. What the server
// adds to web pages (content-length, date, server, alt-svc, via) would be metadata to the application.
func TestWireTrailersOnly(t *testing.T) {
	// The TLS port makes Caddy offer HTTP/3 by alt-svc.
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	var o rigOptions
	o.Caddy.CertFile, o.Caddy.KeyFile = cert, key
	r := newRig(t, o)

	answer := func(c *rpc, fields ...string) {
		c.up.WriteHeaders(c.sid, wiretest.Head(fields...), true)
	}
	r.run("unary", func(t *testing.T, r *rig) {
		c := r.unary()
		answer(c, "grpc-status", "5", "grpc-message", "not%20here", "x-custom", "1", "x-custom", "2", "x-bin", "AP8")
		h := c.result()
		if h.Sequence() != "HEADERS+END_STREAM" {
			t.Errorf("frames %s", h.Sequence())
		}
		sameFields(t, h.Head, wiretest.Head("grpc-status", "5", "grpc-message", "not%20here", "x-custom", "1", "x-custom", "2", "x-bin", "AP8"))
	})
	r.run("OK", func(t *testing.T, r *rig) {
		c := r.unary()
		answer(c, "grpc-status", "0")
		sameFields(t, c.result().Head, wiretest.Head("grpc-status", "0"))
	})
	r.run("content-type kept", func(t *testing.T, r *rig) {
		c := r.unary()
		c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "200", "content-type", "application/grpc+proto", "grpc-status", "3"), true)
		sameFields(t, c.result().Head, wiretest.Fields(":status", "200", "content-type", "application/grpc+proto", "grpc-status", "3"))
	})
	// RFC 9113 section 8.1: a server that has answered early "MAY request that the client abort transmission of a request
	// without error by sending a RST_STREAM with an error code of NO_ERROR after sending a complete response".
	r.run("request still open", func(t *testing.T, r *rig) {
		c := r.streaming()
		answer(c, "grpc-status", "12")
		h := c.result()
		if h.Sequence() != "HEADERS+END_STREAM RST_STREAM(NO_ERROR)" {
			t.Errorf("frames %s", h.Sequence())
		}
		sameFields(t, h.Head, wiretest.Head("grpc-status", "12"))
		if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeNo {
			t.Errorf("the upstream got RST_STREAM(%v), want NO_ERROR: its answer was whole", code)
		}
	})
	// On TLS the server adds alt-svc, which must not get through either.
	r.run("over TLS", func(t *testing.T, r *rig) {
		r.client = wiretest.Dial(t, r.TLS, ca.ClientConfig())
		c := r.unary()
		answer(c, "grpc-status", "5")
		h := c.result()
		if h.Sequence() != "HEADERS+END_STREAM" {
			t.Errorf("frames %s", h.Sequence())
		}
		sameFields(t, h.Head, wiretest.Head("grpc-status", "5"))
	})
	// What the upstream itself sent as metadata stays.
	r.run("date and server of the upstream's own", func(t *testing.T, r *rig) {
		c := r.unary()
		answer(c, "grpc-status", "5", "date", "Tue, 15 Nov 1994 08:12:31 GMT", "server", "envoy", "via", "1.1 other")
		sameFields(t, c.result().Head, wiretest.Head("grpc-status", "5", "date", "Tue, 15 Nov 1994 08:12:31 GMT", "server", "envoy", "via", "1.1 other"))
	})
}

// The head of an answer with messages gets nothing from the proxy's server either.
func TestWireHead(t *testing.T) {
	r := newRig(t, rigOptions{})
	c := r.unary()
	c.head("x-custom", "1", "x-custom", "2", "x-bin", "AP8", "grpc-encoding", "gzip", "grpc-accept-encoding", "gzip,identity")
	sameFields(t, c.gotHead().Fields, wiretest.Head("x-custom", "1", "x-custom", "2", "x-bin", "AP8", "grpc-encoding", "gzip", "grpc-accept-encoding", "gzip,identity"))
	c.trailers()
	c.ok()
	// What concerns the upstream's connection only stays there.
	c = r.unary()
	c.head("trailer", "grpc-status", "alt-svc", `h3=":1"`, "proxy-authenticate", "Basic", "content-length", "13", "x-custom", "1")
	c.message("response")
	c.trailers("grpc-status", "0", "alt-svc", "clear", "x-trail", "1")
	h := c.ok()
	sameFields(t, h.Head, wiretest.Head("x-custom", "1"))
	sameFields(t, h.Trailers, wiretest.Fields("grpc-status", "0", "x-trail", "1"))
}
