package grpcproxy_test

import (
	"maps"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// accessLog waits for the n-th line of the access log.
func (r *rig) accessLog(n int) map[string]any {
	r.t.Helper()
	var lines []map[string]any
	eventually(r.t, "the call is in the access log", func() bool {
		lines = r.Log("http.log.access")
		return len(lines) >= n
	})
	if len(lines) != n {
		r.t.Fatalf("%d lines in the access log, want %d", len(lines), n)
	}
	return lines[n-1]
}

// One result per call, "computed once at the end from trailers", goes into the access log and into placeholders.
func TestWireAccessLog(t *testing.T) {
	r := newRig(t, rigOptions{Caddy: proxytest.Options{
		AccessLog: true,
		Site: `
			log_append p_upstream {http.grpc_proxy.upstream.address}
			log_append p_service {http.grpc_proxy.service}
			log_append p_method {http.grpc_proxy.method}
			log_append p_status {http.grpc_proxy.status}
			log_append p_code {http.grpc_proxy.status_code}
			log_append p_source {http.grpc_proxy.status_source}
			log_append p_ended {http.grpc_proxy.ended_by}
			log_append p_reason {http.grpc_proxy.reason}
			log_append p_attempts {http.grpc_proxy.attempts}
			log_append p_latency {http.grpc_proxy.latency}
			log_append p_host {upstream_hostport}
			grpc_proxy UPSTREAMS`,
	}})
	addr := r.ups[0].Addr()
	r.complete()
	line := 1
	for _, tt := range []struct {
		name string
		call func(r *rig)
		want map[string]any
	}{
		{
			"OK",
			func(r *rig) {
				c := r.open()
				c.client.WriteData(c.id, wiretest.Message([]byte("one")), false)
				c.client.WriteData(c.id, wiretest.Message([]byte("three")), true)
				c.take(0)
				c.got(18, true)
				c.head()
				c.message("response")
				c.message("")
				c.message("again")
				c.trailers()
				c.ok()
			},
			map[string]any{
				"grpc_status": "OK", "grpc_ended_by": "upstream", "grpc_status_source": "wire", "grpc_attempts": 1.0, "upstream": addr,
				"grpc_messages_sent": 2.0, "grpc_bytes_sent": 18.0, "grpc_messages_received": 3.0, "grpc_bytes_received": 28.0,
				"p_status": "OK", "p_code": "0",
			},
		},
		{
			"status in trailers",
			func(r *rig) {
				c := r.unary()
				c.head()
				c.message("response")
				c.trailers("grpc-status", "5", "grpc-message", "Gr%C3%B6%C3%9Fe")
				c.result()
			},
			map[string]any{
				"grpc_status": "NOT_FOUND", "grpc_message": "Größe", "grpc_ended_by": "upstream", "grpc_status_source": "wire", "upstream": addr,
				"grpc_messages_sent": 1.0, "grpc_bytes_sent": 12.0, "grpc_messages_received": 1.0, "grpc_bytes_received": 13.0,
				"p_status": "NOT_FOUND", "p_code": "5", "p_source": "wire", "p_reason": "",
			},
		},
		{
			"Trailers-Only",
			func(r *rig) {
				c := r.unary()
				c.up.WriteHeaders(c.sid, wiretest.Head("grpc-status", "16"), true)
				c.result()
			},
			map[string]any{"grpc_status": "UNAUTHENTICATED", "grpc_ended_by": "upstream", "grpc_messages_received": 0.0, "grpc_bytes_received": 0.0},
		},
		{
			"HTTP status",
			func(r *rig) {
				c := r.unary()
				c.up.WriteHeaders(c.sid, wiretest.Fields(":status", "503"), true)
				c.result()
			},
			map[string]any{
				"grpc_status": "UNAVAILABLE", "grpc_ended_by": "upstream", "grpc_status_source": "http", "grpc_reason": "UPSTREAM_HTTP_STATUS",
				"p_source": "http", "p_reason": "UPSTREAM_HTTP_STATUS",
			},
		},
		{
			"reset before the head",
			func(r *rig) {
				c := r.unary()
				c.up.WriteReset(c.sid, http2.ErrCodeEnhanceYourCalm)
				c.result()
			},
			map[string]any{
				"grpc_status": "RESOURCE_EXHAUSTED", "grpc_ended_by": "upstream", "grpc_status_source": "proxy", "grpc_reason": "UPSTREAM_STREAM_RESET", "upstream": addr,
			},
		},
		{
			"reset inside a message",
			func(r *rig) {
				c := r.unary()
				c.head()
				c.up.WriteData(c.sid, wiretest.Message([]byte("response"))[:6], false)
				c.gotHead()
				c.client.ExpectOn(c.id, http2.FrameData)
				c.up.WriteReset(c.sid, http2.ErrCodeInternal)
				c.result()
			},
			map[string]any{"grpc_status": "INTERNAL", "grpc_reason": "UPSTREAM_STREAM_RESET", "grpc_messages_received": 0.0, "grpc_bytes_received": 6.0},
		},
		{
			"refused and sent again",
			func(r *rig) {
				c := r.unary()
				c.up.WriteReset(c.sid, http2.ErrCodeRefusedStream)
				c.take(0)
				c.answerOK()
			},
			map[string]any{"grpc_status": "OK", "grpc_attempts": 2.0, "p_attempts": 2.0, "grpc_bytes_sent": 12.0, "grpc_messages_sent": 1.0},
		},
		{
			"client cancels",
			func(r *rig) {
				c := r.streaming()
				c.head()
				c.message("response")
				c.gotHead()
				c.gotMessage("response")
				c.client.WriteReset(c.id, http2.ErrCodeCancel)
				c.cancelled()
			},
			map[string]any{
				"grpc_status": "CANCELLED", "grpc_ended_by": "client", "grpc_status_source": "proxy", "grpc_reason": "CLIENT_GONE", "upstream": addr,
				"grpc_messages_received": 1.0, "grpc_bytes_received": 13.0, "p_ended": "client",
			},
		},
		{
			"deadline",
			func(r *rig) {
				r.unary("grpc-timeout", "50m").result()
			},
			map[string]any{
				"grpc_status": "DEADLINE_EXCEEDED", "grpc_ended_by": "deadline", "grpc_status_source": "proxy", "grpc_reason": "DEADLINE_AT_PROXY", "upstream": addr,
				"p_status": "DEADLINE_EXCEEDED", "p_code": "4",
			},
		},
		{
			"malformed timeout",
			func(r *rig) {
				c := r.open("grpc-timeout", "x")
				c.result()
			},
			map[string]any{"grpc_status": "INTERNAL", "grpc_ended_by": "proxy", "grpc_attempts": 0.0, "upstream": "", "grpc_reason": "MALFORMED_TIMEOUT"},
		},
	} {
		r.run(tt.name, func(t *testing.T, r *rig) {
			tt.call(r)
			line++
			got := r.accessLog(line)
			want := map[string]any{"grpc_service": "test.Service", "grpc_method": "Method", "p_service": "test.Service", "p_method": "Method", "status": 200.0}
			if tt.want["upstream"] == addr {
				want["p_upstream"], want["p_host"] = addr, addr
			}
			maps.Copy(want, tt.want)
			if tt.name == "reset inside a message" {
				// The handler ended by a panic, as net/http wants it: there was no chance for log_append.
				for _, k := range []string{"status", "p_service", "p_method"} {
					delete(want, k)
				}
			}
			for k, v := range want {
				if got[k] != v {
					t.Errorf("%s is %v (%T), want %v", k, got[k], got[k], v)
				}
			}
			latency, ok := got["grpc_latency"].(float64)
			if duration, _ := got["duration"].(float64); !ok || latency <= 0 || latency > duration+0.01 {
				t.Errorf("grpc_latency %v, duration %v", got["grpc_latency"], got["duration"])
			}
			if fb, ok := got["grpc_first_byte"].(float64); ok && (fb <= 0 || fb > latency) {
				t.Errorf("grpc_first_byte %v of grpc_latency %v", fb, latency)
			}
		})
	}
}

// "Logs always name endpoint addresses", also for what the client is told without them.
func TestWireFailureLog(t *testing.T) {
	r := newRig(t, rigOptions{Block: "verbose_logs"})
	c := r.unary()
	c.up.WriteReset(c.sid, http2.ErrCodeInternal)
	c.result()
	var line map[string]any
	eventually(t, "the failure is logged", func() bool {
		for _, l := range r.Log("http.handlers.grpc_proxy") {
			if l["msg"] == "call failed" {
				line = l
			}
		}
		return line != nil
	})
	for k, want := range map[string]any{
		"level": "info", "path": wirePath, "status": "INTERNAL", "reason": "UPSTREAM_STREAM_RESET", "ended_by": "upstream",
		"upstream": r.ups[0].Addr(), "attempts": 1.0,
	} {
		if line[k] != want {
			t.Errorf("%s is %v, want %v", k, line[k], want)
		}
	}
	if d, _ := line["duration"].(float64); d <= 0 || d > timeout.Seconds() {
		t.Errorf("duration %v", time.Duration(d*float64(time.Second)))
	}
}
