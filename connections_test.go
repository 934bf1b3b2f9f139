package grpcproxy_test

import (
	"testing"

	"golang.org/x/net/http2"

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
