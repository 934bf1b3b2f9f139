package transport

import (
	"net"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// TestOutage: of an outage the log has its beginning, each new reason, and its end; and who has reason to think that it is
// over can say so.
func TestOutage(t *testing.T) {
	wiretest.CheckLeaks(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()
	core, logs := observer.New(zap.InfoLevel)
	e := endpoint(t, addr, Config{Logger: zap.New(core)})
	attempts := func(n int) {
		t.Helper()
		e.mu.Lock()
		n += e.backoff.failures
		e.mu.Unlock()
		eventually(t, "another attempt", func() bool {
			e.Retry()
			e.mu.Lock()
			defer e.mu.Unlock()
			return e.backoff.failures >= n
		})
		eventually(t, "the last attempt is over", func() bool { return !e.Dialing() })
	}
	said := func(want ...string) {
		t.Helper()
		var got []string
		for _, l := range logs.TakeAll() {
			text := l.Level.String() + " " + l.Message
			if err, ok := l.ContextMap()["error"].(string); ok {
				text += ": " + err
			}
			got = append(got, text)
		}
		if len(got) != len(want) {
			t.Fatalf("logged %q, want %q", got, want)
		}
		for i := range got {
			if len(got[i]) < len(want[i]) || got[i][:len(want[i])] != want[i] {
				t.Errorf("logged %q, want %q", got[i], want[i])
			}
		}
	}
	attempts(9)
	said("warn cannot connect to upstream: " + addr + ": connect failed: connection refused")
	if !e.link.Has(upstream.Backoff) {
		t.Error("not in backoff")
	}
	// The wait is of about ten seconds now.
	_, terr := e.OpenWait(t.Context(), request(), true, h2.NewBlocking())
	wantKind(t, terr, KindBackoff)

	other, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("the port was taken by somebody else: %v", err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := other.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\nDate: " + time.Now().String() + "\r\n\r\n"))
			_ = c.Close()
		}
	}()
	attempts(3)
	said("warn cannot connect to upstream: " + addr + ": the upstream does not speak HTTP/2")
	other.Close()
	<-served

	again, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("the port was taken by somebody else: %v", err)
	}
	wiretest.ListenOn(t, again).Serve(func(*wiretest.Conn) { <-t.Context().Done() })
	eventually(t, "connected", func() bool {
		e.Retry()
		return e.Conns() == 1
	})
	if !usable(e) {
		t.Error("connected and not usable")
	}
	said("info connected to upstream again")
	e.Retry() // nothing to do
	if e.Dialing() {
		t.Error("dialled without need")
	}
}

// TestOutages: each outage is told of, though the reason is that of the last one.
func TestOutages(t *testing.T) {
	wiretest.CheckLeaks(t)
	core, logs := observer.New(zap.InfoLevel)
	addr := "127.0.0.1:0"
	var e *Endpoint
	for round := range 3 {
		inner, err := net.Listen("tcp", addr)
		if err != nil {
			t.Skipf("the port was taken by somebody else: %v", err)
		}
		if addr = inner.Addr().String(); e == nil {
			e = endpoint(t, addr, Config{Logger: zap.New(core)})
		}
		end := make(chan struct{})
		wiretest.ListenOn(t, inner).Serve(func(c *wiretest.Conn) {
			answer(c, c.ExpectHeaders().Stream)
			<-end
			c.Close()
		})
		eventually(t, "connected", func() bool { e.Retry(); return e.Conns() == 1 })
		_, b := open(t, e)
		wantEnd(t, b)
		inner.Close()
		close(end)
		eventually(t, "the outage is told of", func() bool {
			return logs.FilterMessage("cannot connect to upstream").FilterLevelExact(zap.WarnLevel).Len() == round+1
		})
	}
}

// TestSuspect: a connection that is perhaps dead takes no new streams; those on it may go on.
func TestSuspect(t *testing.T) {
	wiretest.CheckLeaks(t)
	l, accepted := listen(t)
	e := endpoint(t, l.Addr(), Config{})
	s, old := open(t, e)
	c := <-accepted
	id := c.ExpectHeaders().Stream
	e.Suspect(s.Conn())
	_, b := open(t, e)
	next := <-accepted
	answer(next, next.ExpectHeaders().Stream)
	wantEnd(t, b)
	answer(c, id)
	wantEnd(t, old)
	_ = c.ExpectClosed()
	e.Suspect(s.Conn()) // it is not there any more
	if e.Conns() != 1 {
		t.Errorf("%d connections", e.Conns())
	}
}
