package direct

import (
	"net"
	"strings"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// Too much metadata is a status for gRPC clients, and HTTP's 431 for others.
func TestOversized(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan *h2.Conn, 1)
	go func() {
		nc, err := l.Accept()
		if err != nil {
			close(served)
			return
		}
		served <- h2.Server(nc, h2.Config{MaxHeaderListSize: 1 << 10, OnOversized: Oversized}, func(*h2.Stream, []h2.Field, bool) h2.Receiver { return nil })
	}()
	p := wiretest.Dial(t, l.Addr().String(), nil)
	defer func() {
		if c := <-served; c != nil {
			c.Close(h2.NoError, "")
			<-c.Done()
		}
	}()
	large := strings.Repeat("x", 2<<10)
	for contentType, want := range map[string]string{"application/grpc": "8", "application/grpc+proto": "8", "text/plain": ""} {
		id := p.Open(wiretest.Fields(":method", "POST", ":scheme", "http", ":path", "/a/b", ":authority", "a", "content-type", contentType, "x-large", large), true)
		h := p.Collect(id)
		status, got := wiretest.Get(h.Head, ":status"), wiretest.Get(h.Head, "grpc-status")
		if got != want || (want == "") != (status == "431") || want != "" && wiretest.Get(h.Head, "content-type") != contentType {
			t.Errorf("%s: %v", contentType, h.Head)
		}
	}
}
