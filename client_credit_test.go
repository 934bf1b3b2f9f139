package grpcproxy

import (
	"net/http"
	"reflect"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// What is set already stays.
func TestWithWindows(t *testing.T) {
	for _, tt := range []struct{ have, want *http.HTTP2Config }{
		{nil, &http.HTTP2Config{MaxReceiveBufferPerStream: clientStreamWindow, MaxReceiveBufferPerConnection: clientConnWindow}},
		{
			&http.HTTP2Config{MaxConcurrentStreams: 7, MaxReceiveBufferPerStream: 100},
			&http.HTTP2Config{MaxConcurrentStreams: 7, MaxReceiveBufferPerStream: 100, MaxReceiveBufferPerConnection: clientConnWindow},
		},
		{
			&http.HTTP2Config{MaxReceiveBufferPerStream: 1, MaxReceiveBufferPerConnection: 2},
			&http.HTTP2Config{MaxReceiveBufferPerStream: 1, MaxReceiveBufferPerConnection: 2},
		},
	} {
		if got := withWindows(tt.have); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%+v becomes %+v, want %+v", tt.have, got, tt.want)
		}
	}
}

// Several handlers of a server set it up once; each server is set up.
func TestGrantWindowsOnce(t *testing.T) {
	var (
		a   App
		srv caddyhttp.Server
	)
	for range 3 {
		a.grantWindows(&srv)
	}
	a.grantWindows(new(caddyhttp.Server))
	if len(a.granted) != 2 {
		t.Errorf("%d servers are known, want 2", len(a.granted))
	}
}
