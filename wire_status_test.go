package grpcproxy_test

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// Semantics 3.2: "DATA with END_STREAM and no trailers → INTERNAL".
func TestWireNoTrailers(t *testing.T) {
	r := newRig(t, rigOptions{})
	want := failure{code: codes.Internal, reason: "UPSTREAM_NO_TRAILERS", says: []string{"closed the stream without sending trailers"}}
	message := wiretest.Message([]byte("response"))
	r.run("END_STREAM on the message", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.up.WriteData(c.sid, message, true)
		r.checkTrailers(c.result(), "HEADERS DATA HEADERS+END_STREAM", want)
	})
	r.run("END_STREAM on empty DATA", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.message("response")
		c.up.WriteData(c.sid, nil, true)
		r.checkTrailers(c.result(), "HEADERS DATA HEADERS+END_STREAM", want)
	})
	r.run("no message at all", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.up.WriteData(c.sid, nil, true)
		r.checkTrailers(c.result(), "HEADERS HEADERS+END_STREAM", want)
	})
	r.run("inside a message", func(t *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.up.WriteData(c.sid, message[:8], true)
		if h := c.result(); !h.Reset || h.ResetCode != http2.ErrCodeInternal || h.Trailers != nil {
			t.Errorf("frames %s, want a reset", h.Sequence())
		}
	})
	// A status in a head that does not end the stream never counts, not even as the only one there is: else an answer that was cut
	// would be OK.
	for _, status := range []string{"0", "5"} {
		r.run("grpc-status "+status+" in the head", func(t *testing.T, r *rig) {
			c := r.unary()
			c.head("grpc-status", status, "grpc-message", "gone", "x-lead", "1")
			c.message("response")
			c.up.WriteData(c.sid, nil, true)
			h := c.result()
			sameFields(t, h.Head, wiretest.Head("x-lead", "1"))
			r.checkTrailers(h, "HEADERS DATA HEADERS+END_STREAM", want)
		})
	}
	r.run("grpc-status in the head, trailers without", func(t *testing.T, r *rig) {
		c := r.unary()
		c.head("grpc-status", "0")
		c.message("response")
		c.up.WriteHeaders(c.sid, nil, true)
		r.checkTrailers(c.result(), "HEADERS DATA HEADERS+END_STREAM", failure{code: codes.Unknown, reason: "UPSTREAM_NO_STATUS"})
	})
	r.run("grpc-status in both", func(t *testing.T, r *rig) {
		c := r.unary()
		c.head("grpc-status", "0", "grpc-message", "fine", "grpc-status-details-bin", "CAA")
		c.message("response")
		c.trailers("grpc-status", "9", "grpc-message", "not fine")
		h := c.result()
		sameFields(t, h.Head, wiretest.Head())
		sameFields(t, h.Trailers, wiretest.Fields("grpc-status", "9", "grpc-message", "not fine"))
	})
}

// An answer of which something is lost on the way is never OK, whatever status stands at its end.
func TestWireNoFalseOK(t *testing.T) {
	r := newRig(t, rigOptions{Block: "max_response_header 8KiB"})
	message := wiretest.Message([]byte("response"))
	for _, ct := range []string{"", "application/json", "application/grpc-web+proto"} {
		head := wiretest.Fields(":status", "200")
		if ct != "" {
			head = append(head, wiretest.Fields("content-type", ct)...)
		}
		want := failure{code: codes.Unknown, reason: "UPSTREAM_NOT_GRPC", says: []string{fmt.Sprintf("content-type %q", ct)}}
		r.run(fmt.Sprintf("content-type %q, a message", ct), func(_ *testing.T, r *rig) {
			c := r.unary()
			c.up.WriteHeaders(c.sid, head, false)
			c.up.WriteData(c.sid, message, false)
			c.trailers()
			r.checkFailure(c.result(), want)
		})
		r.run(fmt.Sprintf("content-type %q, a message, OK in the head", ct), func(_ *testing.T, r *rig) {
			c := r.unary()
			c.up.WriteHeaders(c.sid, append(slices.Clone(head), wiretest.Fields("grpc-status", "0")...), false)
			c.up.WriteData(c.sid, message, true)
			r.checkFailure(c.result(), want)
		})
		r.run(fmt.Sprintf("content-type %q, no message", ct), func(_ *testing.T, r *rig) {
			c := r.unary()
			c.up.WriteHeaders(c.sid, append(slices.Clone(head), wiretest.Fields("grpc-status", "0")...), true)
			r.checkFailure(c.result(), want)
		})
		// A status that is itself an error says more than that.
		r.run(fmt.Sprintf("content-type %q, an error", ct), func(t *testing.T, r *rig) {
			c := r.unary()
			c.up.WriteHeaders(c.sid, head, false)
			c.up.WriteData(c.sid, message, false)
			c.trailers("grpc-status", "5", "grpc-message", "gone")
			sameFields(t, c.result().Head, wiretest.Head("grpc-status", "5", "grpc-message", "gone"))
		})
	}
	r.run("another HTTP status", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "503", "content-type", "application/grpc"), false)
		c.up.WriteData(c.sid, message, false)
		c.trailers()
		r.checkFailure(c.result(), failure{code: codes.Unavailable, reason: "UPSTREAM_HTTP_STATUS", says: []string{"503"}})
	})
	for _, cut := range []int{1, 4, 5, len(message) - 1} {
		r.run(fmt.Sprintf("%d bytes of a message", cut), func(t *testing.T, r *rig) {
			c := r.unary()
			c.head()
			c.up.WriteData(c.sid, message, false)
			c.up.WriteData(c.sid, message[:cut], false)
			c.trailers()
			// Inside a message a status would vouch for half of it.
			if h := c.result(); !h.Reset || h.ResetCode != http2.ErrCodeInternal || h.Trailers != nil {
				t.Errorf("frames %s, want a reset", h.Sequence())
			}
		})
	}
	r.run("half a message, and an error", func(t *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.up.WriteData(c.sid, message[:8], false)
		c.trailers("grpc-status", "15")
		sameFields(t, c.result().Trailers, wiretest.Fields("grpc-status", "15"))
	})
	for _, length := range []string{"12", "14", "1000"} {
		r.run("content-length "+length, func(t *testing.T, r *rig) {
			c := r.unary()
			c.head("content-length", length)
			c.up.WriteData(c.sid, message, false)
			c.trailers()
			if h := c.result(); h.Get("grpc-status") != "13" {
				t.Errorf("%s %v %v", h.Sequence(), h.Head, h.Trailers)
			}
		})
	}
	r.run("two statuses", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.message("response")
		c.trailers("grpc-status", "0", "grpc-status", "13")
		r.checkTrailers(c.result(), "HEADERS DATA HEADERS+END_STREAM", failure{code: codes.Unknown, reason: "UPSTREAM_MALFORMED_STATUS", says: []string{`"0, 13"`}})
	})
	for _, code := range []http2.ErrCode{http2.ErrCodeNo, http2.ErrCodeCancel} {
		r.run(fmt.Sprintf("%v after the message", code), func(t *testing.T, r *rig) {
			c := r.unary()
			c.head("grpc-status", "0")
			c.message("response")
			c.up.WriteReset(c.sid, code)
			if h := c.result(); h.Get("grpc-status") == "0" {
				t.Errorf("%s %v %v", h.Sequence(), h.Head, h.Trailers)
			}
		})
	}
	r.run("metadata that is too large, after OK", func(t *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.message("response")
		c.trailers("grpc-status", "0", "x-large", strings.Repeat("v", 9<<10))
		if h := c.result(); h.Get("grpc-status") != "8" {
			t.Errorf("%s %v", h.Sequence(), h.Head)
		}
	})
}

// "Missing grpc-status in present trailers → UNKNOWN; unparsable → UNKNOWN": what else the upstream sent is kept.
func TestWireGarbledStatus(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, tt := range []struct {
		name   string
		fields []string
		want   failure
	}{
		{"missing", nil, failure{reason: "UPSTREAM_NO_STATUS", says: []string{"no grpc-status"}}},
		{"letters", []string{"grpc-status", "abc"}, failure{reason: "UPSTREAM_MALFORMED_STATUS", says: []string{`malformed grpc-status`, `"abc"`}}},
		{"negative", []string{"grpc-status", "-1"}, failure{reason: "UPSTREAM_MALFORMED_STATUS", says: []string{`malformed grpc-status`, `"-1"`}}},
		{"empty", []string{"grpc-status", ""}, failure{reason: "UPSTREAM_MALFORMED_STATUS", says: []string{`malformed grpc-status`, `""`}}},
		{"huge", []string{"grpc-status", "99999999999"}, failure{reason: "UPSTREAM_MALFORMED_STATUS", says: []string{`malformed grpc-status`, `"99999999999"`}}},
		{"sign", []string{"grpc-status", "+5"}, failure{reason: "UPSTREAM_MALFORMED_STATUS", says: []string{`"+5"`}}},
		{"name", []string{"grpc-status", "NOT_FOUND"}, failure{reason: "UPSTREAM_MALFORMED_STATUS", says: []string{`"NOT_FOUND"`}}},
	} {
		tt.want.code = codes.Unknown
		custom := append([]string{"x-custom", "1", "x-custom", "2", "x-bin", "AP8"}, tt.fields...)
		r.run(tt.name+" in trailers", func(t *testing.T, r *rig) {
			c := r.unary()
			c.head()
			c.message("response")
			c.trailers(custom...)
			h := c.result()
			if h.Sequence() != "HEADERS DATA HEADERS+END_STREAM" {
				t.Errorf("frames %s", h.Sequence())
			}
			r.checkStatus(h.Trailers, tt.want)
			sameFields(t, without(h.Trailers, "grpc-status", "grpc-message", "grpc-status-details-bin"), wiretest.Fields(custom[:6]...))
		})
		r.run(tt.name+" alone in trailers", func(_ *testing.T, r *rig) {
			c := r.unary()
			c.head()
			c.gotHead()
			c.up.WriteHeaders(c.sid, wiretest.Fields(tt.fields...), true)
			r.checkTrailers(c.result(), "HEADERS+END_STREAM", tt.want)
		})
		r.run(tt.name+" in Trailers-Only", func(t *testing.T, r *rig) {
			c := r.unary()
			c.up.WriteHeaders(c.sid, wiretest.Head(custom...), true)
			h := c.result()
			if h.Sequence() != "HEADERS+END_STREAM" {
				t.Errorf("frames %s", h.Sequence())
			}
			r.checkStatus(h.Head, tt.want)
			sameFields(t, without(h.Head, "grpc-status", "grpc-message", "grpc-status-details-bin"), wiretest.Head(custom[:6]...))
		})
	}
}

// doc/http-grpc-status-mapping.md, for answers without grpc-status; the body's first bytes are the message's end.
func TestWireHTTPStatus(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, tt := range []struct {
		status int
		want   codes.Code
		says   string
	}{
		{200, codes.Unknown, `not gRPC (content-type "text/html")`},
		{204, codes.Unknown, "HTTP status 204 (No Content)"},
		{302, codes.Unknown, "HTTP status 302 (Found)"},
		{400, codes.Internal, "HTTP status 400 (Bad Request)"},
		{401, codes.Unauthenticated, "HTTP status 401 (Unauthorized)"},
		{403, codes.PermissionDenied, "HTTP status 403 (Forbidden)"},
		{404, codes.Unimplemented, "HTTP status 404 (Not Found)"},
		{418, codes.Unknown, "HTTP status 418 (I'm a teapot)"},
		{429, codes.Unavailable, "HTTP status 429 (Too Many Requests)"},
		{431, codes.Internal, "HTTP status 431 (Request Header Fields Too Large)"},
		{500, codes.Unknown, "HTTP status 500 (Internal Server Error)"},
		{502, codes.Unavailable, "HTTP status 502 (Bad Gateway)"},
		{503, codes.Unavailable, "HTTP status 503 (Service Unavailable)"},
		{504, codes.Unavailable, "HTTP status 504 (Gateway Timeout)"},
		{599, codes.Unknown, "HTTP status 599"},
	} {
		want := failure{code: tt.want, reason: "UPSTREAM_HTTP_STATUS", says: []string{tt.says}}
		if tt.status == 200 {
			want.reason = "UPSTREAM_NOT_GRPC"
		}
		head := func(c *rpc, end bool) {
			c.up.WriteHeaders(c.sid, wiretest.Fields(":status", strconv.Itoa(tt.status), "content-type", "text/html", "server", "nginx"), end)
		}
		r.run(fmt.Sprintf("%d without a body", tt.status), func(_ *testing.T, r *rig) {
			c := r.unary()
			head(c, true)
			r.checkFailure(c.result(), want)
		})
		if tt.status == 204 {
			continue // has no body
		}
		r.run(fmt.Sprintf("%d with a body in pieces", tt.status), func(_ *testing.T, r *rig) {
			c := r.unary()
			head(c, false)
			for _, piece := range []string{"<html>\r\n<h1>", "", "Größe ", "100%</h1>", "\r\n</html>"} {
				c.up.WriteData(c.sid, []byte(piece), false)
			}
			c.up.WriteData(c.sid, nil, true)
			want := want
			want.says = []string{tt.says + ": <html> <h1>Größe 100%</h1> </html>"}
			r.checkFailure(c.result(), want)
		})
	}
}

// A body that is not gRPC's is not read to its end: the client is answered, the upstream's stream reset.
func TestWireHTTPHugeBody(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, end := range []bool{false, true} {
		r.run(fmt.Sprintf("ends: %v", end), func(t *testing.T, r *rig) {
			c := r.unary()
			c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "503", "content-type", "text/plain"), false)
			_, _ = c.up.SendData(t.Context(), c.sid, bytes.Repeat([]byte("x"), 300<<10), end)
			h := c.result()
			r.checkFailure(h, failure{code: codes.Unavailable, reason: "UPSTREAM_HTTP_STATUS", says: []string{"503 (Service Unavailable): xxx"}})
			// "Keep the upstream's first ≤ N bytes": 1 KiB, since it travels in a header field, and twice with the details.
			if m := wiretest.Get(h.Head, "grpc-message"); strings.Count(m, "x") != 1<<10 {
				t.Errorf("the message has %d bytes of the body", strings.Count(m, "x"))
			}
			if code := c.up.ExpectReset(c.sid); code != http2.ErrCodeCancel {
				t.Errorf("the upstream's stream was reset with %v, want CANCEL", code)
			}
		})
	}
	r.complete()
}

// An upstream that answers with HTML and then hangs or breaks has told enough.
func TestWireHTTPBrokenBody(t *testing.T) {
	r := newRig(t, rigOptions{})
	c := r.unary()
	c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "502", "content-type", "text/html"), false)
	c.up.WriteData(c.sid, []byte("<h1>Bad"), false)
	c.up.WriteReset(c.sid, http2.ErrCodeInternal)
	r.checkFailure(c.result(), failure{code: codes.Unavailable, reason: "UPSTREAM_HTTP_STATUS", says: []string{"502 (Bad Gateway): <h1>Bad"}})
}

// "This table is to be used only for clients that received a response that did not include grpc-status": with one, that
// one counts, unless it stands in a head that does not end the stream.
func TestWireHTTPWithStatus(t *testing.T) {
	r := newRig(t, rigOptions{})
	status := []string{"grpc-status", "8", "grpc-message", "no%20quota", "x-custom", "1"}
	check := func(t *testing.T, c *rpc, contentType string) {
		t.Helper()
		h := c.result()
		if !trailersOnly(h) {
			t.Errorf("frames %s, want Trailers-Only", h.Sequence())
		}
		sameFields(t, h.Head, wiretest.Fields(append([]string{":status", "200", "content-type", contentType}, status...)...))
	}
	for _, ct := range []string{"application/grpc", "text/html"} {
		head := wiretest.Fields(append([]string{":status", "503", "content-type", ct}, status...)...)
		r.run(ct+", in the head with END_STREAM", func(t *testing.T, r *rig) {
			c := r.unary()
			c.up.WriteHeaders(c.sid, head, true)
			check(t, c, "application/grpc")
		})
		r.run(ct+", in the head before a body", func(_ *testing.T, r *rig) {
			c := r.unary()
			c.up.WriteHeaders(c.sid, head, false)
			c.up.WriteData(c.sid, []byte("<html>"), true)
			r.checkFailure(c.result(), failure{code: codes.Unavailable, reason: "UPSTREAM_HTTP_STATUS", says: []string{"503 (Service Unavailable): <html>"}})
		})
		r.run(ct+", in trailers", func(t *testing.T, r *rig) {
			c := r.unary()
			c.up.WriteHeaders(c.sid, head[:2], false)
			c.up.WriteData(c.sid, []byte("<html>"), false)
			c.trailers(status...)
			check(t, c, "application/grpc")
		})
	}
	r.run("200 and another content-type", func(t *testing.T, r *rig) {
		c := r.unary()
		c.up.WriteHeaders(c.sid, wiretest.Fields(append([]string{":status", "200", "content-type", "application/json"}, status...)...), true)
		check(t, c, "application/grpc")
	})
}

// "Missing :status → per HTTP mapping", which is UNKNOWN; a 1xx head is not final.
func TestWireResponseHeads(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.run("no :status", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.up.WriteHeaders(c.sid, wiretest.Fields("content-type", "application/grpc"), false)
		c.up.WriteData(c.sid, wiretest.Message([]byte("response")), true)
		want := failure{code: codes.Unknown, reason: "UPSTREAM_HTTP_STATUS", says: []string{"without an HTTP status"}}
		r.checkFailure(c.result(), want)
	})
	r.run("no :status, but a grpc-status", func(t *testing.T, r *rig) {
		c := r.unary()
		c.up.WriteHeaders(c.sid, wiretest.Fields("content-type", "application/grpc", "grpc-status", "5"), true)
		sameFields(t, c.result().Head, wiretest.Head("grpc-status", "5"))
	})
	r.run("1xx before the head", func(t *testing.T, r *rig) {
		c := r.unary()
		c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "100"), false)
		c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "103", "link", "</a>", "grpc-status", "13"), false)
		c.head("x-lead", "1")
		c.message("response")
		c.trailers()
		h := c.ok()
		if h.Sequence() != "HEADERS DATA HEADERS+END_STREAM" {
			t.Errorf("frames %s", h.Sequence())
		}
		sameFields(t, h.Head, wiretest.Head("x-lead", "1"))
	})
	r.run("no content-type", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "200"), false)
		c.up.WriteData(c.sid, []byte("hello"), true)
		r.checkFailure(c.result(), failure{code: codes.Unknown, reason: "UPSTREAM_NOT_GRPC", says: []string{`content-type "")`, "hello"}})
	})
	// gRPC-Web is not gRPC: its trailers are in the body, and no gRPC client would find them.
	r.run("gRPC-Web", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "200", "content-type", "application/grpc-web+proto"), false)
		c.up.WriteData(c.sid, []byte("\x80\x00\x00\x00\x0fgrpc-status: 0\r\n"), true)
		r.checkFailure(c.result(), failure{code: codes.Unknown, reason: "UPSTREAM_NOT_GRPC", says: []string{"application/grpc-web+proto"}})
	})
}

// What breaks HTTP/2 itself is INTERNAL, and costs the stream only.
func TestWireMalformedAnswers(t *testing.T) {
	r := newRig(t, rigOptions{})
	want := func(says string) failure {
		return failure{code: codes.Internal, reason: "UPSTREAM_PROTOCOL_ERROR", says: []string{"the upstream broke the HTTP/2 protocol: PROTOCOL_ERROR: " + says}}
	}
	r.run("second HEADERS without END_STREAM", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.message("response")
		c.up.WriteHeaders(c.sid, wiretest.Fields("grpc-status", "0"), false)
		r.checkTrailers(c.result(), "HEADERS DATA HEADERS+END_STREAM", want("second HEADERS without END_STREAM"))
	})
	for _, tt := range []struct {
		name   string
		fields []string
		says   string
	}{
		{"upper case in a name", []string{"X-Upper", "1"}, "field name"},
		{"NUL in a value", []string{"x-nul", "a\x00b"}, "field value"},
		{"line break in a value", []string{"x-crlf", "a\r\nb"}, "field value"},
		{"connection", []string{"connection", "close"}, "connection-specific"},
		{"pseudo-header of a request", []string{":path", "/"}, "pseudo-header"},
	} {
		r.run(tt.name+" in the head", func(_ *testing.T, r *rig) {
			c := r.unary()
			c.head(tt.fields...)
			r.checkFailure(c.result(), want(tt.says))
		})
		r.run(tt.name+" in trailers", func(_ *testing.T, r *rig) {
			c := r.unary()
			c.head()
			c.gotHead()
			c.trailers(append([]string{"grpc-status", "0"}, tt.fields...)...)
			r.checkTrailers(c.result(), "HEADERS+END_STREAM", want(tt.says))
		})
	}
	r.complete()
	if n := r.ups[0].Accepted(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// gRPC over HTTP/2: "Servers may limit the size of Request-Headers … RESOURCE_EXHAUSTED" and likewise clients, which the
// proxy is here.
func TestWireOversizedMetadata(t *testing.T) {
	r := newRig(t, rigOptions{Block: "max_response_header 8KiB"})
	want := failure{code: codes.ResourceExhausted, reason: "UPSTREAM_METADATA_TOO_LARGE", says: []string{"response metadata is larger than accepted"}}
	large := strings.Repeat("v", 9<<10)
	r.run("head", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.head("x-large", large)
		r.checkFailure(c.result(), want)
	})
	r.run("Trailers-Only", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.up.WriteHeaders(c.sid, wiretest.Head("grpc-status", "0", "x-large", large), true)
		r.checkFailure(c.result(), want)
	})
	r.run("trailers", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.message("response")
		c.trailers("grpc-status", "0", "x-large", large)
		r.checkTrailers(c.result(), "HEADERS DATA HEADERS+END_STREAM", want)
	})
	r.complete()
	if n := r.ups[0].Accepted(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	// So large that reading it to its end is not worth it: that costs the connection, and the status is the same.
	r.run("far too large", func(_ *testing.T, r *rig) {
		c := r.unary()
		c.head()
		c.message("response")
		c.gotHead()
		c.gotMessage("response")
		c.trailers("grpc-status", "0", "x-large", strings.Repeat("v", 1<<20))
		r.ups[0].drop()
		r.checkTrailers(c.result(), "HEADERS+END_STREAM", want)
		r.complete()
	})
}

// "With expose_upstream": address in message and details, also where an answer had begun; the message stays decodable.
func TestWireExposeUpstream(t *testing.T) {
	r := newRig(t, rigOptions{Block: "expose_upstream"})
	addr := r.ups[0].Addr()
	c := r.unary()
	c.up.WriteReset(c.sid, http2.ErrCodeInternal)
	r.checkFailure(c.result(), failure{code: codes.Internal, reason: "UPSTREAM_STREAM_RESET", says: []string{"upstream " + addr + ": the upstream reset"}, upstream: addr})
	c = r.unary()
	c.head()
	c.message("response")
	c.up.WriteData(c.sid, nil, true)
	r.checkTrailers(c.result(), "HEADERS DATA HEADERS+END_STREAM", failure{code: codes.Internal, reason: "UPSTREAM_NO_TRAILERS", upstream: addr})
	c = r.unary()
	c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "503"), false)
	c.up.WriteData(c.sid, []byte("Größe"), true)
	h := c.result()
	r.checkFailure(h, failure{code: codes.Unavailable, reason: "UPSTREAM_HTTP_STATUS", says: []string{"Größe"}, upstream: addr})
	if raw := h.Get("grpc-message"); raw != grpcwire.EncodeMessage(grpcwire.DecodeMessage(raw)) || !strings.Contains(raw, "Gr%C3%B6%C3%9Fe") {
		t.Errorf("grpc-message %q is not percent-encoded", raw)
	}
}
