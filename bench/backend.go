package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// The methods of the benchmark's backend.
const (
	pathUnary    = "/bench.Bench/Unary"    // answers one message of 100 bytes at the end of the request
	pathPingPong = "/bench.Bench/PingPong" // echoes
	pathStream   = "/bench.Bench/Stream"   // answers streamTotal bytes
)

const (
	messageSize = 100
	streamTotal = 256 << 20
)

func message() []byte {
	m := make([]byte, 5+messageSize)
	m[4] = messageSize
	return m
}

var (
	head    = []h2.Field{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"}}
	trailer = []h2.Field{{Name: "grpc-status", Value: "0"}, {Name: "grpc-message", Value: ""}}
	answer  = message()
)

// startBackend runs a backend in a process of its own and returns its address.
func (b *bench) startBackend() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	cmd := exec.Command(self, "backend")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	cmd.Stderr = os.Stderr
	if err := b.spawn(cmd); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	return strings.TrimSpace(line), err
}

// runBackend serves until it is killed.
func runBackend() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(l.Addr())
	for {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		h2.Server(nc, h2.Config{MaxStreams: 1 << 20}, accept)
	}
}

func accept(s *h2.Stream, fields []h2.Field, end bool) h2.Receiver {
	for _, f := range fields {
		if f.Name == ":path" {
			switch f.Value {
			case pathPingPong:
				_ = s.WriteHeaders(head, false)
				return echo{}
			case pathStream:
				go stream(s)
				return sink{}
			}
		}
	}
	if end {
		respond(s)
	}
	return unaryReceiver{}
}

func respond(s *h2.Stream) {
	_ = s.WriteHeaders(head, false)
	write(s, answer, func() { _ = s.WriteHeaders(trailer, true) })
}

// write writes p and then calls end. It is called on a connection's reader, which must not wait for windows: where there
// is no room, a goroutine does.
func write(s *h2.Stream, p []byte, end func()) {
	if n, err := s.TryWrite(p, false); err == nil && n < len(p) {
		go func() {
			_ = s.Write(p[n:], false)
			end()
			s.Conn().Flush()
		}()
		return
	}
	end()
	s.Conn().FlushSoon()
}

type sink struct{}

func (sink) RecvHead(*h2.Stream, []h2.Field, bool)   {}
func (sink) RecvTrailers(*h2.Stream, []h2.Field)     {}
func (sink) RecvReset(s *h2.Stream, _ *h2.Error)     { s.Done() }
func (sink) RecvData(s *h2.Stream, p []byte, _ bool) { s.Consumed(len(p)) }

type unaryReceiver struct{ sink }

func (unaryReceiver) RecvData(s *h2.Stream, p []byte, end bool) {
	s.Consumed(len(p))
	if end {
		respond(s)
	}
}

type echo struct{ sink }

func (echo) RecvData(s *h2.Stream, p []byte, end bool) {
	s.Consumed(len(p))
	write(s, append([]byte(nil), p...), func() {
		if end {
			_ = s.WriteHeaders(trailer, true)
		}
	})
}

// stream sends one message of streamTotal bytes.
func stream(s *h2.Stream) {
	_ = s.WriteHeaders(head, false)
	n := uint32(streamTotal)
	_ = s.Write([]byte{0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, false)
	chunk := make([]byte, 64<<10)
	for range streamTotal / len(chunk) {
		if s.Write(chunk, false) != nil {
			return
		}
		s.Conn().Flush()
	}
	_ = s.WriteHeaders(trailer, true)
	s.Conn().Flush()
}
