package transport

import (
	"net"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// unaryServer answers every request at its end.
type unaryServer struct{}

var okHead = []h2.Field{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"}, {Name: "grpc-status", Value: "0"}}

func (unaryServer) RecvHead(*h2.Stream, []h2.Field, bool) {}
func (unaryServer) RecvData(*h2.Stream, []byte, bool)     {}
func (unaryServer) RecvTrailers(*h2.Stream, []h2.Field)   {}
func (unaryServer) RecvReset(*h2.Stream, *h2.Error)       {}
func (unaryServer) accept(s *h2.Stream, _ []h2.Field, _ bool) h2.Receiver {
	_ = s.WriteHeaders(okHead, true)
	return unaryServer{}
}

// signal tells when the answer came.
type signal chan struct{}

func (c signal) RecvHead(*h2.Stream, []h2.Field, bool) { c <- struct{}{} }
func (signal) RecvData(*h2.Stream, []byte, bool)       {}
func (signal) RecvTrailers(*h2.Stream, []h2.Field)     {}
func (c signal) RecvReset(*h2.Stream, *h2.Error)       { c <- struct{}{} }

func benchEndpoint(b *testing.B) *Endpoint {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			h2.Server(nc, h2.Config{MaxStreams: 1 << 20}, unaryServer{}.accept)
		}
	}()
	e := NewEndpoint(upstream.Address{Network: "tcp", Dial: l.Addr().String()}, Config{})
	b.Cleanup(func() { _ = e.Destruct() })
	return e
}

// BenchmarkOpenToWire measures from the choice of the endpoint to its HEADERS in the socket, system call included.
func BenchmarkOpenToWire(b *testing.B) {
	e := benchEndpoint(b)
	fields, done := request(), make(signal, 1)
	call := func() {
		s, err := e.OpenWait(b.Context(), fields, true, done)
		if err != nil {
			b.Fatal(err)
		}
		s.Conn().Flush()
	}
	call()
	<-done
	b.ReportAllocs()
	for b.Loop() {
		call()
		b.StopTimer()
		<-done
		b.StartTimer()
	}
}

// BenchmarkUnaryParallel is whole calls from many goroutines over shared connections.
func BenchmarkUnaryParallel(b *testing.B) {
	e := benchEndpoint(b)
	b.SetParallelism(50)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		fields, done := request(), make(signal, 1)
		for pb.Next() {
			s, err := e.OpenWait(b.Context(), fields, true, done)
			if err != nil {
				b.Error(err)
				return
			}
			s.Conn().FlushSoon()
			<-done
		}
	})
}
