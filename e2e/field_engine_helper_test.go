package e2e

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// ruleBreaker is an upstream that answers the first call of each connection with a frame that ends the connection.
// It reads on until its peer has closed, and remembers the calls that it has seen by their metadata "x-call".
type ruleBreaker struct {
	net.Listener

	mu     sync.Mutex
	seen   map[string]bool
	ending int // connections on which the frame was sent and that are not closed yet
}

func startRuleBreaker(t *testing.T) *ruleBreaker {
	t.Helper()
	l, _ := listen(t)
	b := &ruleBreaker{Listener: l, seen: make(map[string]bool)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer nc.Close()
				b.serve(nc)
			})
		}
	})
	t.Cleanup(func() { // after Caddy has stopped, which closes the connections
		_ = l.Close()
		wg.Wait()
	})
	return b
}

func (b *ruleBreaker) serve(nc net.Conn) {
	if _, err := io.ReadFull(nc, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	fr := http2.NewFramer(nc, nc)
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = fr.WriteSettings()
	for broken := false; ; {
		f, err := fr.ReadFrame()
		if err != nil {
			return
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = fr.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				_ = fr.WritePing(true, f.Data)
			}
		case *http2.MetaHeadersFrame:
			for _, field := range f.Fields {
				if field.Name == "x-call" {
					b.mu.Lock()
					b.seen[field.Value] = true
					b.mu.Unlock()
				}
			}
			if !broken {
				broken = true
				b.mu.Lock()
				b.ending++
				b.mu.Unlock()
				defer func() {
					b.mu.Lock()
					defer b.mu.Unlock()
					b.ending--
				}()
				_ = fr.WriteRawFrame(http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, f.StreamID, []byte{0, 0, 0, 2})
			}
		}
	}
}

// settled tells whether all is read of connections that are to end.
func (b *ruleBreaker) settled() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.ending == 0
}

func (b *ruleBreaker) saw(call string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.seen[call]
}

// fillUp makes an upload to an upstream that reads nothing after its head, until neither the sockets nor the proxy take any more
// of it. It returns the upstream's connection, and a channel that is closed when the upload has ended.
func fillUp(t *testing.T, ctx context.Context, c testgrpc.TestServiceClient, up *wiretest.Listener) (conn *wiretest.Conn, ended chan struct{}) {
	t.Helper()
	s, err := c.StreamingInputCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	conn = up.Accept()
	conn.ExpectHeaders()
	conn.Pause()
	_ = conn.NetConn().(*net.TCPConn).SetReadBuffer(128 << 10)
	conn.WriteWindowUpdate(0, 1<<30)
	var sent atomic.Int64
	ended = make(chan struct{})
	go func() {
		defer close(ended)
		req := &testgrpc.StreamingInputCallRequest{Payload: &testgrpc.Payload{Body: make([]byte, 64<<10)}}
		for s.Send(req) == nil {
			sent.Add(1)
		}
	}()
	last, same := int64(0), 0
	eventually(t, "the upload has come to a halt", func() bool {
		now := sent.Load()
		if now == last && now > 0 {
			same++
		} else {
			last, same = now, 0
		}
		return same == 30
	})
	return conn, ended
}
