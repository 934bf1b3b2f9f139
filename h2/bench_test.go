package h2

import (
	"context"
	"crypto/tls"
	"net"
	"runtime"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// benchCall is a client's receiver for one call at a time.
type benchCall struct {
	done chan struct{}
	n    int
}

func (b *benchCall) RecvHead(*Stream, []Field, bool)      {}
func (b *benchCall) RecvData(s *Stream, p []byte, _ bool) { b.n += len(p); s.Consumed(len(p)) }
func (b *benchCall) RecvTrailers(*Stream, []Field)        { b.done <- struct{}{} }
func (b *benchCall) RecvReset(_ *Stream, err *Error)      { panic(err) }

// benchServe answers each call with as many bytes as it got, all calls with one receiver.
type benchServe struct{}

func (benchServe) RecvHead(*Stream, []Field, bool) {}
func (benchServe) RecvData(s *Stream, p []byte, end bool) {
	if end {
		_ = s.WriteHeaders(responseHead, false)
		_, _ = s.TryWrite(p, false)
		_ = s.WriteHeaders(okTrailers, true)
	}
	s.Consumed(len(p))
}
func (benchServe) RecvTrailers(*Stream, []Field) {}
func (benchServe) RecvReset(s *Stream, _ *Error) { s.Done() }

func acceptBench(*Stream, []Field, bool) Receiver { return benchServe{} }

// BenchmarkUnary is one call after the other: HEADERS and DATA there, HEADERS, DATA and trailers back. Allocations are
// those of both roles together.
func BenchmarkUnary(b *testing.B) {
	run := func(b *testing.B, cn, sn net.Conn) {
		client, _ := join(b, cn, sn, Config{}, Config{}, acceptBench)
		msg := make([]byte, 105)
		call := &benchCall{done: make(chan struct{}, 1)}
		<-client.Ready()
		b.ReportAllocs()
		b.ResetTimer()
		for range b.N {
			s, err := client.OpenStream(requestHead, false, call)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := s.TryWrite(msg, true); err != nil {
				b.Fatal(err)
			}
			client.Flush()
			<-call.done
		}
		b.StopTimer()
	}
	b.Run("plain", func(b *testing.B) {
		cn, sn := tcpPair(b)
		run(b, cn, sn)
	})
	b.Run("tls", func(b *testing.B) {
		cn, sn := tlsPair(b)
		run(b, cn, sn)
	})
}

// BenchmarkUnaryParallel has 100 calls in flight on one connection, so that reads and writes carry many frames.
func BenchmarkUnaryParallel(b *testing.B) {
	cn, sn := tcpPair(b)
	client, _ := join(b, cn, sn, Config{}, Config{}, acceptBench)
	msg := make([]byte, 105)
	<-client.Ready()
	const width = 100
	left := b.N
	finished := make(chan struct{})
	r := &chainCall{msg: msg, left: &left, finished: finished}
	b.ReportAllocs()
	b.ResetTimer()
	for range min(width, b.N) {
		r.next(client)
	}
	client.Flush()
	<-finished
	b.StopTimer()
}

// chainCall starts the next call when one ends.
type chainCall struct {
	msg      []byte
	left     *int
	started  int
	ended    int
	finished chan struct{}
}

func (r *chainCall) next(c *Conn) {
	s, err := c.OpenStream(requestHead, false, r)
	if err != nil {
		panic(err)
	}
	r.started++
	if _, err := s.TryWrite(r.msg, true); err != nil {
		panic(err)
	}
}
func (r *chainCall) RecvHead(*Stream, []Field, bool)      {}
func (r *chainCall) RecvData(s *Stream, p []byte, _ bool) { s.Consumed(len(p)) }
func (r *chainCall) RecvTrailers(s *Stream, _ []Field) {
	if r.started < *r.left {
		r.next(s.Conn())
	}
	if r.ended++; r.ended == *r.left {
		close(r.finished)
	}
}
func (r *chainCall) RecvReset(_ *Stream, err *Error) { panic(err) }

// BenchmarkStreamData sends DATA on one stream as fast as windows and sockets allow; an op is one frame of 16 KiB.
func BenchmarkStreamData(b *testing.B) {
	run := func(b *testing.B, cn, sn net.Conn) {
		done := make(chan struct{})
		client, _ := join(b, cn, sn, Config{}, Config{}, func(*Stream, []Field, bool) Receiver { return &sink{done: done} })
		<-client.Ready()
		s, err := client.OpenStream(requestHead, false, NewBlocking())
		if err != nil {
			b.Fatal(err)
		}
		msg := make([]byte, 16<<10)
		b.SetBytes(int64(len(msg)))
		b.ReportAllocs()
		b.ResetTimer()
		for i := range b.N {
			if err := s.Write(msg, i == b.N-1); err != nil {
				b.Fatal(err)
			}
		}
		client.Flush()
		<-done
		b.StopTimer()
	}
	b.Run("plain", func(b *testing.B) {
		cn, sn := tcpPair(b)
		run(b, cn, sn)
	})
	b.Run("tls", func(b *testing.B) {
		cn, sn := tlsPair(b)
		run(b, cn, sn)
	})
}

type sink struct {
	n    int
	done chan struct{}
}

func (*sink) RecvHead(*Stream, []Field, bool) {}
func (k *sink) RecvData(s *Stream, p []byte, end bool) {
	k.n += len(p)
	s.Consumed(len(p))
	if end {
		close(k.done)
	}
}
func (*sink) RecvTrailers(*Stream, []Field) {}
func (*sink) RecvReset(s *Stream, _ *Error) { s.Done() }

// BenchmarkIdle measures what an idle connection and an idle stream pin, one role each; an op is meaningless.
func BenchmarkIdle(b *testing.B) {
	heap := func() float64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapInuse + m.StackInuse)
	}
	const conns, streams = 100, 100
	for range b.N {
		before := heap()
		var all []*Conn
		for range conns {
			c, _ := pair(b, Config{}, Config{}, acceptBench)
			<-c.Ready()
			all = append(all, c)
		}
		idle := heap()
		b.ReportMetric((idle-before)/conns/2, "B/conn")
		for _, c := range all {
			for range streams {
				if _, err := c.OpenStream(requestHead, false, benchServe{}); err != nil {
					b.Fatal(err)
				}
			}
			if _, err := c.Ping(context.Background()); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric((heap()-idle)/conns/streams/2, "B/stream")
	}
}

// tlsPair is tcpPair with a finished TLS handshake.
func tlsPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	a, b := tcpPair(t)
	ca := wiretest.NewCA(t)
	cfg := ca.ClientConfig()
	cfg.ServerName = "localhost"
	cc, sc := tls.Client(a, cfg), tls.Server(b, ca.ServerConfig())
	shaken := make(chan error, 1)
	go func() { shaken <- sc.Handshake() }()
	if err := cc.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-shaken; err != nil {
		t.Fatal(err)
	}
	return cc, sc
}
