package main

import (
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// measure is one thing to measure about a proxy.
type measure struct {
	name, unit string
	run        func(b *bench, pid int, workers bool, addr string) (float64, error)
}

var further = map[string]measure{
	"pingpong": {"ping-pong 4x25", "µs/message", func(b *bench, pid int, workers bool, addr string) (float64, error) {
		return b.load(pid, workers, addr, 4, 25, pathPingPong)
	}},
	"stream": {"server stream", "s/GiB", streamLoad},
	"idle":   {"idle stream", "KiB", idleMemory},
	"crowd": {"unary 50x200", "µs/RPC", func(b *bench, pid int, workers bool, addr string) (float64, error) {
		return b.load(pid, workers, addr, 50, 200, pathUnary)
	}},
}

// unary makes the measurement for a shape such as 10x100.
func unary(shape string) (measure, error) {
	c, m, ok := strings.Cut(shape, "x")
	conns, err1 := strconv.Atoi(c)
	streams, err2 := strconv.Atoi(m)
	if !ok || err1 != nil || err2 != nil || conns < 1 || streams < 1 {
		return measure{}, fmt.Errorf("shape %q is not of the form 10x100", shape)
	}
	return measure{"unary " + shape, "µs/RPC", func(b *bench, pid int, workers bool, addr string) (float64, error) {
		return b.load(pid, workers, addr, conns, streams, pathUnary)
	}}, nil
}

func fields(addr, path string) []h2.Field {
	return []h2.Field{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: path},
		{Name: ":authority", Value: addr},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "user-agent", Value: "grpc-go/1.83.2"},
		{Name: "te", Value: "trailers"},
		{Name: "grpc-accept-encoding", Value: "gzip"},
	}
}

// generator keeps a number of calls, or of ping-pong streams, going on one connection, all on its reader.
type generator struct {
	conn   *h2.Conn
	fields []h2.Field
	path   string
	done   atomic.Int64
	failed atomic.Int64
	stop   atomic.Bool
}

type genCall struct {
	g  *generator
	ok bool
}

func (g *generator) next() {
	c := &genCall{g: g}
	s, err := g.conn.OpenStream(g.fields, false, c)
	if err != nil {
		g.failed.Add(1)
		return
	}
	write(s, answer, func() {
		if g.path != pathPingPong {
			_, _ = s.TryWrite(nil, true)
		}
	})
}

func (c *genCall) RecvHead(_ *h2.Stream, f []h2.Field, end bool) {
	c.ok = len(f) > 0 && f[0].Value == "200"
	if end {
		c.finish()
	}
}

func (c *genCall) RecvData(s *h2.Stream, p []byte, end bool) {
	s.Consumed(len(p))
	switch {
	case end:
		c.finish()
	case c.g.path == pathPingPong && !c.g.stop.Load():
		c.g.done.Add(1)
		write(s, answer, func() {})
	}
}
func (c *genCall) RecvTrailers(*h2.Stream, []h2.Field) { c.finish() }
func (c *genCall) RecvReset(_ *h2.Stream, err *h2.Error) {
	if !c.g.stop.Load() {
		c.g.failed.Add(1)
	}
}

func (c *genCall) finish() {
	if !c.ok {
		c.g.failed.Add(1)
	}
	c.g.done.Add(1)
	if !c.g.stop.Load() {
		c.g.next()
	}
}

func (b *bench) connect(addr string) (*h2.Conn, error) {
	nc, err := b.dial(addr)
	if err != nil {
		return nil, err
	}
	c := h2.Client(nc, h2.Config{})
	<-c.Ready()
	if err := c.Err(); err != nil {
		return nil, err
	}
	return c, nil
}

// load runs the calls and returns the proxy's CPU time per call in µs.
func (b *bench) load(pid int, workers bool, addr string, conns, streams int, path string) (float64, error) {
	gens := make([]*generator, conns)
	for i := range gens {
		c, err := b.connect(addr)
		if err != nil {
			return 0, err
		}
		defer c.Close(h2.NoError, "")
		gens[i] = &generator{conn: c, fields: fields(addr, path), path: path}
	}
	for _, g := range gens {
		for range streams {
			g.next()
		}
		g.conn.Flush()
	}
	sum := func() (done, failed int64) {
		for _, g := range gens {
			done += g.done.Load()
			failed += g.failed.Load()
		}
		return done, failed
	}
	// Warm up: stacks and heap have their size once every stream has been round a few times.
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if done, _ := sum(); done >= int64(5*conns*streams) {
			break
		}
	}
	time.Sleep(b.duration / 4)
	before, _ := sum()
	cpu0, err := cpu(pid, workers)
	if err != nil {
		return 0, err
	}
	time.Sleep(b.duration)
	cpu1, err := cpu(pid, workers)
	if err != nil {
		return 0, err
	}
	after, failed := sum()
	for _, g := range gens {
		g.stop.Store(true)
	}
	if failed > 0 || after == before {
		return 0, fmt.Errorf("%d calls failed, %d succeeded", failed, after-before)
	}
	return float64((cpu1 - cpu0).Microseconds()) / float64(after-before), nil
}

// streamLoad moves streamTotal bytes on each of four streams and returns CPU seconds per GiB.
func streamLoad(b *bench, pid int, workers bool, addr string) (float64, error) {
	const n = 4
	cpu0, err := cpu(pid, workers)
	if err != nil {
		return 0, err
	}
	done := make(chan error, n)
	for range n {
		c, err := b.connect(addr)
		if err != nil {
			return 0, err
		}
		defer c.Close(h2.NoError, "")
		s, oerr := c.OpenStream(fields(addr, pathStream), true, &drainReceiver{done: done})
		if oerr != nil {
			return 0, oerr
		}
		s.Conn().Flush()
	}
	for range n {
		if err := <-done; err != nil {
			return 0, err
		}
	}
	cpu1, err := cpu(pid, workers)
	return (cpu1 - cpu0).Seconds() / (n * streamTotal) * (1 << 30), err
}

type drainReceiver struct {
	done  chan error
	bytes int
}

func (d *drainReceiver) RecvHead(*h2.Stream, []h2.Field, bool) {}
func (d *drainReceiver) RecvData(s *h2.Stream, p []byte, _ bool) {
	d.bytes += len(p)
	s.Consumed(len(p))
}

func (d *drainReceiver) RecvTrailers(*h2.Stream, []h2.Field) {
	if d.bytes != streamTotal+5 {
		d.done <- fmt.Errorf("%d bytes came, want %d", d.bytes, streamTotal+5)
		return
	}
	d.done <- nil
}
func (d *drainReceiver) RecvReset(_ *h2.Stream, err *h2.Error) { d.done <- err }

// idleMemory opens 2,000 ping-pong streams that have moved one message each, and returns the proxy's memory per stream.
func idleMemory(b *bench, pid int, workers bool, addr string) (float64, error) {
	const conns, streams = 20, 100
	probe, err := b.connect(addr)
	if err != nil {
		return 0, err
	}
	defer probe.Close(h2.NoError, "")
	warm := &generator{conn: probe, fields: fields(addr, pathUnary), path: pathUnary}
	for range 50 {
		warm.next()
	}
	probe.Flush()
	time.Sleep(500 * time.Millisecond)
	warm.stop.Store(true)
	time.Sleep(500 * time.Millisecond)
	before, err := memory(pid, workers)
	if err != nil {
		return 0, err
	}
	var gens []*generator
	for range conns {
		c, err := b.connect(addr)
		if err != nil {
			return 0, err
		}
		defer c.Close(h2.NoError, "")
		g := &generator{conn: c, fields: fields(addr, pathPingPong), path: pathPingPong}
		g.stop.Store(true) // one message, no more
		for range streams {
			g.next()
		}
		g.conn.Flush()
		gens = append(gens, g)
	}
	time.Sleep(2 * time.Second)
	after, err := memory(pid, workers)
	for _, g := range gens {
		if g.failed.Load() > 0 {
			return 0, fmt.Errorf("%d streams failed", g.failed.Load())
		}
	}
	return float64(after-before) / (conns * streams) / 1024, err
}
