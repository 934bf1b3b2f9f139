package h2

import (
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestLostDuringWrite: the peer can have read a call, and be gone, before the system call that sent it has returned. Such
// a call may have been acted on: it is not Unprocessed, or it would be sent, and acted on, twice.
func TestLostDuringWrite(t *testing.T) {
	wiretest.CheckLeaks(t)
	c, p := clientAgainst(t, Config{})
	if !c.sock.canTry {
		t.Skip("sockets cannot be tried here")
	}
	until(t, "SETTINGS are through", func() bool { st := c.Stats(); return st.SettingsAcked && st.PeerSettings && st.Pending == 0 })
	r := newRecorder(t)
	mustOpen(t, c, true, r)

	write, returns := c.sock.writeFn, make(chan struct{})
	c.sock.writeFn = func(fd uintptr) bool {
		done := write(fd)
		<-returns
		return done
	}
	go c.Flush()
	p.ExpectHeaders()
	p.Close()
	until(t, "the stream is reset", func() bool { return r.stream() != nil })
	err := r.stream().Err()
	close(returns)
	if err == nil || err.Kind != KindConnLost || err.Unprocessed {
		t.Errorf("%+v, want a lost connection, not Unprocessed", err)
	}
}
