package h2

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// tcpPair returns both ends of a TCP connection over the loopback.
func tcpPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		got <- c
	}()
	client, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return client, <-got
}

// pair joins an engine in each role over TCP. Both are closed, and waited for, when the test ends.
func pair(t testing.TB, cc, sc Config, accept func(*Stream, []Field, bool) Receiver) (*Conn, *Conn) {
	t.Helper()
	a, b := tcpPair(t)
	return join(t, a, b, cc, sc, accept)
}

func join(t testing.TB, a, b net.Conn, cc, sc Config, accept func(*Stream, []Field, bool) Receiver) (*Conn, *Conn) {
	t.Helper()
	server := Server(b, sc, accept)
	client := Client(a, cc)
	t.Cleanup(func() {
		client.Close(NoError, "")
		server.Close(NoError, "")
		wait(t, client.Done())
		wait(t, server.Done())
	})
	return client, server
}

const patienceOfTests = 5 * time.Second

func wait(t testing.TB, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(patienceOfTests):
		t.Fatal("timed out")
	}
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patienceOfTests)
	t.Cleanup(cancel)
	return ctx
}

var requestHead = []Field{
	{Name: ":method", Value: "POST"},
	{Name: ":scheme", Value: "http"},
	{Name: ":path", Value: "/pkg.Svc/Method"},
	{Name: ":authority", Value: "example.com"},
	{Name: "content-type", Value: "application/grpc"},
	{Name: "te", Value: "trailers"},
}

var (
	responseHead = []Field{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"}}
	okTrailers   = []Field{{Name: "grpc-status", Value: "0"}, {Name: "grpc-message", Value: ""}}
)

// echo is a receiver of the server role that sends back what it gets.
type echo struct {
	mu   sync.Mutex // RecvWriteReady may run on the writer
	rest []byte
	end  bool
}

func (e *echo) RecvHead(*Stream, []Field, bool) { panic("RecvHead in the server role") }

func (e *echo) RecvData(s *Stream, p []byte, end bool) {
	e.push(s, p, end)
}

func (e *echo) RecvTrailers(s *Stream, _ []Field) { e.push(s, nil, true) }
func (e *echo) RecvReset(s *Stream, _ *Error)     { s.Done() }
func (e *echo) RecvWriteReady(s *Stream)          { e.push(s, nil, false) }

func (e *echo) push(s *Stream, p []byte, end bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.rest = append(e.rest, p...)
	e.end = e.end || end
	n, _ := s.TryWrite(e.rest, false)
	e.rest = e.rest[n:]
	s.Consumed(n)
	if len(e.rest) == 0 && e.end {
		_ = s.WriteHeaders(okTrailers, true)
	}
}

func acceptEcho(s *Stream, _ []Field, end bool) Receiver {
	_ = s.WriteHeaders(responseHead, false)
	e := &echo{}
	if end {
		e.push(s, nil, true)
	}
	return e
}

func TestEcho(t *testing.T) {
	client, _ := pair(t, Config{}, Config{}, acceptEcho)
	for _, size := range []int{0, 1, 100, 16 << 10, 1 << 20} {
		want := bytes.Repeat([]byte("abcdefg"), size/7+1)[:size]
		b := NewBlocking()
		s, err := client.OpenStream(requestHead, false, b)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if err := s.Write(want, true); err != nil {
				t.Error(err)
			}
			client.Flush()
		}()
		head, e := b.WaitHead(testContext(t))
		if e != nil {
			t.Fatal(e)
		}
		if head[0].Value != "200" {
			t.Fatalf("head %v", head)
		}
		got, e := io.ReadAll(b)
		if e != nil {
			t.Fatal(e)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%d bytes came back as %d", len(want), len(got))
		}
		if tr := b.Trailers(); len(tr) != 2 || tr[0].Value != "0" {
			t.Fatalf("trailers %v", tr)
		}
	}
}
