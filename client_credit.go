package grpcproxy

import (
	"context"
	"net"
	"net/http"
	"sync"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// What an HTTP/2 client may send before it is read. Go's server grants 1 MiB to each stream and to all streams of a
// connection together, so that a single upload whose upstream does not read stops every other call of its client. With these,
// it takes 32. An upload costs as much CPU time as with 1 MiB and is as fast; with 256 KiB it is a sixth dearer, with 64 KiB
// by half.
const (
	clientStreamWindow = 512 << 10
	clientConnWindow   = 16 << 20
)

// grantWindows has the server grant its clients more together than one by one. The server is made after its handlers, and
// reads the settings for each connection: the first one is early enough. Handlers of one server have it done once.
func (a *App) grantWindows(srv *caddyhttp.Server) {
	running.mu.Lock()
	defer running.mu.Unlock()
	if _, done := a.granted[srv]; done {
		return
	}
	if a.granted == nil {
		a.granted = make(map[*caddyhttp.Server]struct{})
	}
	a.granted[srv] = struct{}{}
	var once sync.Once
	srv.RegisterConnContext(func(ctx context.Context, _ net.Conn) context.Context {
		once.Do(func() {
			// Runs before anything of the connection does, and others wait for it here.
			if s, ok := ctx.Value(http.ServerContextKey).(*http.Server); ok {
				s.HTTP2 = withWindows(s.HTTP2)
			}
		})
		return ctx
	})
}

// withWindows fills in what is not set.
func withWindows(c *http.HTTP2Config) *http.HTTP2Config {
	filled := new(http.HTTP2Config)
	if c != nil {
		*filled = *c
	}
	if filled.MaxReceiveBufferPerStream == 0 {
		filled.MaxReceiveBufferPerStream = clientStreamWindow
	}
	if filled.MaxReceiveBufferPerConnection == 0 {
		filled.MaxReceiveBufferPerConnection = clientConnWindow
	}
	return filled
}
