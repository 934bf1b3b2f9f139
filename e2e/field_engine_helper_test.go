package e2e

import (
	"io"
	"net"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
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
