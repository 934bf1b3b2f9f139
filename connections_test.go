package grpcproxy_test

import (
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestMinConns: connections are made when the configuration starts, without a call.
func TestMinConns(t *testing.T) {
	r := newRig(t, rigOptions{Block: "min_conns 2"})
	r.ups[0].Accept()
	r.ups[0].Accept()
}

// TestQueueFullStatus: the status of calls beyond the queue can be chosen.
func TestQueueFullStatus(t *testing.T) {
	for word, want := range map[string]string{"": "14", "queue_full_status resource_exhausted": "8"} {
		t.Run(word, func(t *testing.T) {
			r := newRig(t, rigOptions{
				Block: "max_conns 1\nqueue_size 1\n" + word,
				Up:    wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}},
			})
			first := r.unary() // takes the only stream
			ids := []uint32{
				r.client.Open(wiretest.Request(r.H2C, "/test.Service/Method"), true),
				r.client.Open(wiretest.Request(r.H2C, "/test.Service/Method"), true),
			}
			// One of the two waits, the other one is turned away.
			refused := r.client.Expect("a refusal", func(f wiretest.Frame) bool {
				return f.Type == http2.FrameHeaders && (f.Stream == ids[0] || f.Stream == ids[1])
			})
			if got := refused.Get("grpc-status"); got != want {
				t.Errorf("status %s (%s), want %s", got, refused.Get("grpc-message"), want)
			}
			first.head()
			first.trailers("grpc-status", "0")
			waiting := ids[0] + ids[1] - refused.Stream
			next := first.up.ExpectHeaders()
			first.up.WriteHeaders(next.Stream, wiretest.Head("grpc-status", "0"), true)
			if h := r.client.Collect(waiting); h.Get("grpc-status") != "0" {
				t.Errorf("the call that waited ended with %s", h.Get("grpc-status"))
			}
		})
	}
}

// TestMaxConnsOfTwoHandlers: handlers that reach an upstream in the same way share its connections, whatever else they differ in.
// The larger max_conns holds, and when it goes the smaller one does.
func TestMaxConnsOfTwoHandlers(t *testing.T) {
	const small = "grpc_proxy UPSTREAMS {\nmax_conns 1\nfail_duration 10s\n}"
	r := newRig(t, rigOptions{
		Caddy: proxytest.Options{Site: "@large path /large.Service/*\ngrpc_proxy @large UPSTREAMS {\nmax_conns 2\n}\n" + small},
		Up:    wiretest.Options{Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1}}},
	})
	differ := func() (lines []map[string]any) {
		for _, line := range r.Log("http.handlers.grpc_proxy") {
			if strings.Contains(line["msg"].(string), "the largest max_conns holds") {
				lines = append(lines, line)
			}
		}
		return lines
	}
	if lines := differ(); len(lines) != 1 || lines[0]["upstream"] != r.ups[0].Addr() || lines[0]["max_conns"].(float64)+lines[0]["other_max_conns"].(float64) != 3 {
		t.Errorf("the log says %v", lines)
	}
	first := r.unary()
	r.ups[0].drop()
	second := r.unary() // for which there is a second connection
	if err := r.Load(strings.ReplaceAll(small, "UPSTREAMS", r.ups[0].Addr())); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*rpc{second, first} {
		c.head()
		c.trailers()
		c.ok()
	}
	second.up.ExpectClosed()
	r.ups[0].conn = first.up
	r.client = wiretest.Dial(t, r.H2C, nil)
	r.complete()
	if n := r.ups[0].Accepted(); n != 2 {
		t.Errorf("%d connections were made", n)
	}
	if n := len(differ()); n != 1 {
		t.Errorf("%d lines in the log after the reload", n)
	}
}
