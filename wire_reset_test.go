package grpcproxy_test

import (
	"encoding/base64"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// resets is the table of PROTOCOL-HTTP2.md, "HTTP2 Transport Mapping, Errors", completed: STREAM_CLOSED and
// HTTP_1_1_REQUIRED as in grpc-go, codes that do not exist as UNKNOWN.
var resets = []struct {
	code http2.ErrCode
	want codes.Code
	says string
}{
	{http2.ErrCodeNo, codes.Internal, "NO_ERROR before the end of its answer"},
	{http2.ErrCodeProtocol, codes.Internal, "PROTOCOL_ERROR"},
	{http2.ErrCodeInternal, codes.Internal, "INTERNAL_ERROR"},
	{http2.ErrCodeFlowControl, codes.Internal, "FLOW_CONTROL_ERROR"},
	{http2.ErrCodeSettingsTimeout, codes.Internal, "SETTINGS_TIMEOUT"},
	{http2.ErrCodeStreamClosed, codes.Internal, "STREAM_CLOSED"},
	{http2.ErrCodeFrameSize, codes.Internal, "FRAME_SIZE_ERROR"},
	{http2.ErrCodeRefusedStream, codes.Unavailable, "REFUSED_STREAM"},
	{http2.ErrCodeCancel, codes.Canceled, "CANCEL"},
	{http2.ErrCodeCompression, codes.Internal, "COMPRESSION_ERROR"},
	{http2.ErrCodeConnect, codes.Internal, "CONNECT_ERROR"},
	{http2.ErrCodeEnhanceYourCalm, codes.ResourceExhausted, "ENHANCE_YOUR_CALM: it asks for less bandwidth or load"},
	{http2.ErrCodeInadequateSecurity, codes.PermissionDenied, "INADEQUATE_SECURITY"},
	{http2.ErrCodeHTTP11Required, codes.Internal, "HTTP_1_1_REQUIRED"},
	{http2.ErrCode(0x63), codes.Unknown, "unknown error code 0x63"},
	{http2.ErrCode(0xffffffff), codes.Unknown, "unknown error code 0xffffffff"},
}

// TestWireReset: RST_STREAM of the upstream is a status of the call, whenever it comes.
func TestWireReset(t *testing.T) {
	r := newRig(t, rigOptions{})
	for _, tt := range resets {
		want := failure{code: tt.want, reason: "UPSTREAM_STREAM_RESET", says: []string{"reset the stream with " + tt.says}}
		r.run("before the head/"+tt.code.String(), func(_ *testing.T, r *rig) {
			c := r.unary()
			c.up.WriteReset(c.sid, tt.code)
			want := want
			if tt.code == http2.ErrCodeRefusedStream {
				// "REFUSED_STREAM: not processed, transparently retriable", once.
				c.take(0)
				c.up.WriteReset(c.sid, tt.code)
				want.attempts = 2
			}
			r.checkFailure(c.result(), want)
		})
		r.run("before the head, request open/"+tt.code.String(), func(_ *testing.T, r *rig) {
			if tt.code == http2.ErrCodeRefusedStream {
				return // TestWireRefused
			}
			c := r.streaming()
			c.up.WriteReset(c.sid, tt.code)
			r.checkFailure(c.result(), want)
		})
		// "To downstream, after response headers were sent: send trailers with the mapped status, not RST."
		r.run("after the head/"+tt.code.String(), func(_ *testing.T, r *rig) {
			c := r.unary()
			c.head()
			c.gotHead()
			c.up.WriteReset(c.sid, tt.code)
			r.checkTrailers(c.result(), "HEADERS+END_STREAM", want)
		})
		r.run("after a message/"+tt.code.String(), func(_ *testing.T, r *rig) {
			c := r.streaming()
			c.up.Batch(func() {
				c.head()
				c.message("response")
				c.up.WriteReset(c.sid, tt.code)
			})
			r.checkTrailers(c.result(), "HEADERS DATA HEADERS+END_STREAM RST_STREAM(NO_ERROR)", want)
		})
		// "Keep track of framing, and prefer RST INTERNAL_ERROR when cut mid-message": a status would vouch for half a
		// message.
		r.run("inside a message/"+tt.code.String(), func(t *testing.T, r *rig) {
			c := r.unary()
			c.head()
			c.gotHead()
			c.up.WriteData(c.sid, wiretest.Message([]byte("response"))[:9], false)
			c.client.ExpectOn(c.id, http2.FrameData)
			c.up.WriteReset(c.sid, tt.code)
			if got := c.result().Sequence(); got != "RST_STREAM(INTERNAL_ERROR)" {
				t.Errorf("frames %s, want a reset", got)
			}
		})
	}
	r.complete() // resets are the streams' business: the connection is the same
	if n := r.ups[0].Accepted(); n != 1 {
		t.Errorf("%d connections to the upstream, want 1", n)
	}
}

// checkTrailers makes sure that an answer that had begun ends with trailers made by the proxy.
func (r *rig) checkTrailers(h *wiretest.Half, sequence string, want failure) {
	r.t.Helper()
	if h.Sequence() != sequence {
		r.t.Fatalf("frames %s, want %s (%v)", h.Sequence(), sequence, h.Err)
	}
	fields := h.Trailers
	if fields == nil {
		fields = h.Head // the head was taken before
	}
	names := []string{"grpc-message", "grpc-status"}
	if want.hasDetails() {
		names = append(names, "grpc-status-details-bin")
	}
	if got := fieldNames(fields); !slices.Equal(got, names) {
		r.t.Errorf("trailers %v", fields)
	}
	r.checkStatus(fields, want)
}

// The boundary between messages is the framing's, not that of DATA frames: half a prefix is inside a message, a message
// in many pieces ends where its length says.
func TestWireMessageBoundary(t *testing.T) {
	r := newRig(t, rigOptions{})
	message := wiretest.Message([]byte("response"))
	for _, tt := range []struct {
		name     string
		data     []byte
		boundary bool
	}{
		{"nothing", nil, true},
		{"one byte of the prefix", message[:1], false},
		{"prefix", message[:5], false},
		{"all but one byte", message[:len(message)-1], false},
		{"whole message", message, true},
		{"empty message", wiretest.Message(nil), true},
		{"message and one byte", append(slices.Clip(message), 0), false},
		{"three messages", append(append(append([]byte{}, message...), wiretest.Message(nil)...), message...), true},
	} {
		r.run(tt.name, func(t *testing.T, r *rig) {
			c := r.unary()
			c.head()
			for i := range tt.data {
				c.up.WriteData(c.sid, tt.data[i:i+1], false)
			}
			c.up.WriteReset(c.sid, http2.ErrCodeInternal)
			h := c.result()
			if string(h.Data) != string(tt.data) && tt.boundary {
				t.Errorf("got %q, want %q", h.Data, tt.data)
			}
			if tt.boundary {
				r.checkStatus(h.Trailers, failure{code: codes.Internal, reason: "UPSTREAM_STREAM_RESET"})
			} else if !h.Reset || h.ResetCode != http2.ErrCodeInternal || h.Trailers != nil {
				t.Errorf("frames %s, want a reset", h.Sequence())
			}
		})
	}
}

// "Connection lost → UNAVAILABLE". The upstream may have acted on the call: it is not sent again.
func TestWireConnectionLost(t *testing.T) {
	want := failure{code: codes.Unavailable, reason: "UPSTREAM_CONNECTION_LOST", says: []string{"connection lost: "}}
	r := newRig(t, rigOptions{})
	for _, how := range []struct {
		name string
		lose func(*wiretest.Conn)
	}{
		{"closed", func(c *wiretest.Conn) { c.Close() }},
		{"TCP reset", func(c *wiretest.Conn) { c.Abort() }},
	} {
		lose := func(c *rpc) {
			how.lose(c.up)
			r.ups[0].drop()
		}
		r.run(how.name+" before the head", func(_ *testing.T, r *rig) {
			c := r.unary()
			lose(c)
			r.checkFailure(c.result(), want)
			r.complete() // on a new connection
		})
		r.run(how.name+" after the head", func(_ *testing.T, r *rig) {
			c := r.unary()
			c.head()
			c.gotHead()
			lose(c)
			r.checkTrailers(c.result(), "HEADERS+END_STREAM", want)
			r.complete()
		})
		r.run(how.name+" after a message", func(_ *testing.T, r *rig) {
			c := r.streaming()
			c.head()
			c.message("response")
			c.gotHead()
			c.gotMessage("response")
			lose(c)
			r.checkTrailers(c.result(), "HEADERS+END_STREAM RST_STREAM(NO_ERROR)", want)
			r.complete()
		})
		r.run(how.name+" inside a message", func(t *testing.T, r *rig) {
			c := r.unary()
			c.head()
			c.up.WriteData(c.sid, wiretest.Message([]byte("response"))[:7], false)
			c.gotHead()
			c.client.ExpectOn(c.id, http2.FrameData)
			lose(c)
			if got := c.result().Sequence(); got != "RST_STREAM(INTERNAL_ERROR)" {
				t.Errorf("frames %s, want a reset", got)
			}
			r.complete()
		})
	}
}

// What an upstream says in GOAWAY is for operators: it may name hosts, versions and the like. Clients learn the error code.
func TestWireGoAwayText(t *testing.T) {
	const said = "pod backend-7 (10.1.2.3) is overloaded"
	for _, tt := range []struct {
		name, block, says string
	}{
		{"as it is", "verbose_logs", ""},
		{"with expose_upstream", "verbose_logs\nexpose_upstream", ` (it says "` + said + `")`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, rigOptions{Block: tt.block})
			check := func(c *rpc, message string) {
				t.Helper()
				h := c.result()
				got := grpcwire.DecodeMessage(h.Get("grpc-message"))
				want := message + tt.says
				if tt.says != "" {
					want = strings.Replace(want, message, "upstream "+r.ups[0].Addr()+": "+message, 1)
				}
				if got != want {
					t.Errorf("grpc-message %q, want %q", got, want)
				}
				if raw, err := base64.RawStdEncoding.DecodeString(h.Get("grpc-status-details-bin")); err != nil || tt.says == "" && strings.Contains(string(raw), "pod") {
					t.Errorf("the details have %q, %v", raw, err)
				}
			}
			c := r.unary()
			c.up.WriteGoAway(c.sid, http2.ErrCodeEnhanceYourCalm, said)
			c.up.Close()
			r.ups[0].drop()
			check(c, "connection lost after GOAWAY ENHANCE_YOUR_CALM: the upstream closed it")
			c = r.unary()
			c.head()
			c.gotHead()
			c.up.WriteGoAway(0, http2.ErrCodeNo, said)
			r.ups[0].drop()
			check(c, "the upstream is shutting down and did not process the call")
			eventually(t, "the log has it", func() bool {
				n := 0
				for _, l := range r.Log("http.handlers.grpc_proxy") {
					if text, _ := l["error"].(string); l["msg"] == "call failed" && strings.Contains(text, said) {
						n++
					}
				}
				return n == 2
			})
		})
	}
}
