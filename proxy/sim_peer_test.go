package proxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// simPeer is an upstream of the simulation. It does nothing by itself but to read, and checks what it reads.
type simPeer struct {
	w     *simWorld
	addr  string
	mu    sync.Mutex
	mode  dialMode
	most  uint32 // MAX_CONCURRENT_STREAMS
	win   uint32 // INITIAL_WINDOW_SIZE
	conns []*simConn
}

// dialMode is how a peer takes connections.
type dialMode uint8

const (
	accepts dialMode = iota
	refuses
	hangs
	silent // accepts them, and says nothing before it has something to say
	dialModes
)

func (p *simPeer) dial(ctx context.Context) (net.Conn, error) {
	p.mu.Lock()
	mode := p.mode
	p.mu.Unlock()
	switch mode {
	case refuses:
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	case hangs:
		<-ctx.Done()
		return nil, ctx.Err()
	case accepts, silent, dialModes:
	}
	near, far := net.Pipe()
	c := &simConn{p: p, nc: far, sendWin: 65535, initWin: 65535, recvInit: 65535, streams: make(map[uint32]*simStream)}
	c.wmu = make(chan struct{}, 1)
	c.fr = http2.NewFramer(far, far)
	c.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.enc = hpack.NewEncoder(&c.block)
	p.mu.Lock()
	c.index = len(p.conns)
	p.conns = append(p.conns, c)
	p.mu.Unlock()
	go c.read(mode != silent)
	return near, nil
}

func (p *simPeer) set(mode dialMode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mode = mode
}

func (p *simPeer) all() []*simConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]*simConn(nil), p.conns...)
}

// simConn is a connection of a peer's.
type simConn struct {
	p     *simPeer
	index int // among the peer's
	nc    net.Conn

	wmu    chan struct{} // holds one while somebody writes: to wait for a mutex keeps a bubble's time from passing
	fr     *http2.Framer
	enc    *hpack.Encoder
	block  bytes.Buffer
	spoken bool
	later  []func() // is written when it speaks

	mu      sync.Mutex
	dead    bool
	last    uint32 // the highest stream that has come
	shut    bool   // GOAWAY was sent
	shutOut uint32 // and shuts out streams above this one
	sendWin int64
	initWin int64
	// settled is the window that it has told, and recvInit the one that the proxy has acknowledged.
	settled, recvInit int64
	streams           map[uint32]*simStream
	order             []*simStream
}

// simStream is a stream of a peer's.
type simStream struct {
	c      *simConn
	id     uint32
	flight *simFlight

	acts sync.Mutex // is held while the peer does something on it

	// Guarded by c.mu.
	got     int
	ended   bool // END_STREAM has come
	reset   bool // by the proxy
	win     int64
	sendWin int64

	answer      []byte
	sent        int
	head        bool // was sent
	foreign     bool
	over        bool // nothing more is sent
	answered    bool // over, and in order
	unprocessed bool // and the proxy was told so
}

func (c *simConn) speak() {
	c.wmu <- struct{}{}
	defer func() { <-c.wmu }()
	if c.spoken {
		return
	}
	c.spoken = true
	c.p.mu.Lock()
	most, win := c.p.most, c.p.win
	c.p.mu.Unlock()
	c.mu.Lock()
	c.settled = int64(win)
	c.mu.Unlock()
	_ = c.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: most}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: win})
	_ = c.fr.WriteWindowUpdate(0, 1<<30)
	for _, f := range c.later {
		f()
	}
	c.later = nil
}

// allow changes the limit of streams.
func (c *simConn) allow(most uint32) {
	c.speak()
	c.write(func() { _ = c.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: most}) })
}

func (c *simConn) write(f func()) {
	c.wmu <- struct{}{}
	defer func() { <-c.wmu }()
	if !c.spoken {
		c.later = append(c.later, f)
		return
	}
	f()
}

func (c *simConn) fields(kv ...string) []byte {
	c.block.Reset()
	for i := 0; i < len(kv); i += 2 {
		_ = c.enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	return c.block.Bytes()
}

func (c *simConn) close() {
	c.mu.Lock()
	c.dead = true
	c.mu.Unlock()
	c.nc.Close()
}

func (c *simConn) read(speak bool) {
	defer c.close()
	var preface [len(http2.ClientPreface)]byte
	if _, err := io.ReadFull(c.nc, preface[:]); err != nil {
		return
	}
	if speak {
		c.speak()
	}
	for {
		f, err := c.fr.ReadFrame()
		if err != nil {
			if se := new(http2.StreamError); errors.As(err, se) {
				c.p.w.errorf("peer %s: stream error %v", c.p.addr, err)
				continue
			}
			return
		}
		c.take(f)
	}
}

func (c *simConn) take(f http2.Frame) {
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if f.IsAck() {
			c.mu.Lock()
			win := c.settled
			for _, s := range c.streams {
				s.win += win - c.recvInit
			}
			c.recvInit = win
			c.mu.Unlock()
			return
		}
		if v, ok := f.Value(http2.SettingInitialWindowSize); ok {
			c.mu.Lock()
			for _, s := range c.streams {
				s.sendWin += int64(v) - c.initWin
			}
			c.initWin = int64(v)
			c.mu.Unlock()
		}
		c.write(func() { _ = c.fr.WriteSettingsAck() })
	case *http2.PingFrame:
		if !f.IsAck() {
			c.write(func() { _ = c.fr.WritePing(true, f.Data) })
		}
	case *http2.MetaHeadersFrame:
		c.opened(f)
	case *http2.DataFrame:
		c.data(f)
	case *http2.WindowUpdateFrame:
		c.mu.Lock()
		if s := c.streams[f.StreamID]; s != nil {
			s.sendWin += int64(f.Increment)
		} else if f.StreamID == 0 {
			c.sendWin += int64(f.Increment)
		}
		c.mu.Unlock()
	case *http2.RSTStreamFrame:
		c.mu.Lock()
		if s := c.streams[f.StreamID]; s != nil {
			s.reset = true
		}
		c.mu.Unlock()
	}
}

func (c *simConn) opened(f *http2.MetaHeadersFrame) {
	id := -1
	for _, h := range f.RegularFields() {
		if h.Name == "x-flight" {
			id, _ = strconv.Atoi(h.Value)
		}
	}
	fl := c.p.w.flight(id)
	if fl == nil {
		c.p.w.errorf("peer %s: a stream of no flight: %v", c.p.addr, f.Fields)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.streams[f.StreamID] != nil {
		c.p.w.errorf("peer %s: a second header block on stream %d", c.p.addr, f.StreamID)
		return
	}
	s := &simStream{c: c, id: f.StreamID, flight: fl, win: c.recvInit, sendWin: c.initWin, ended: f.StreamEnded()}
	s.unprocessed = c.shut && s.id > c.shutOut // it has crossed the GOAWAY
	s.over = s.unprocessed
	c.streams[s.id] = s
	c.order = append(c.order, s)
	c.last = s.id
	fl.begun(s)
}

func (c *simConn) data(f *http2.DataFrame) {
	p := f.Data()
	c.mu.Lock()
	s := c.streams[f.StreamID]
	if s == nil {
		c.mu.Unlock()
		c.p.w.errorf("peer %s: DATA on stream %d, which nobody has opened", c.p.addr, f.StreamID)
		return
	}
	switch rest := s.flight.given(); {
	case s.ended:
		c.p.w.errorf("%s: DATA after END_STREAM", s)
	case s.got+len(p) > len(rest) || !bytes.Equal(p, rest[s.got:s.got+len(p)]):
		c.p.w.errorf("%s: %d bytes at %d are not the request's (%d bytes)", s, len(p), s.got, len(rest))
	}
	s.got += len(p)
	if s.win -= int64(len(p)); s.win < 0 && len(p) > 0 {
		c.p.w.errorf("%s: more than its window", s)
	}
	if f.StreamEnded() {
		s.ended = true
		if total, ended := s.flight.whole(); !ended || s.got != total {
			c.p.w.errorf("%s: END_STREAM after %d bytes of %d (the client has ended: %t)", s, s.got, total, ended)
		}
	}
	c.mu.Unlock()
	if len(p) > 0 {
		c.write(func() { _ = c.fr.WriteWindowUpdate(0, uint32(len(p))) })
	}
}

// The script acts on a stream that is open.

func (s *simStream) String() string {
	return fmt.Sprintf("flight %d on %s, connection %d, stream %d", s.flight.id, s.c.p.addr, s.c.index, s.id)
}

func (s *simStream) open() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return !s.over && !s.reset && !s.c.dead
}

func (s *simStream) headers(end bool, kv ...string) {
	s.c.speak()
	s.c.write(func() {
		_ = s.c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: s.id, BlockFragment: s.c.fields(kv...), EndHeaders: true, EndStream: end})
	})
}

// respond sends the head of an answer of so many bytes.
func (s *simStream) respond(size int) {
	s.c.mu.Lock()
	s.head, s.answer = true, messages(crc32.ChecksumIEEE([]byte(s.String())), size)
	s.c.mu.Unlock()
	s.headers(false, ":status", "200", "content-type", "application/grpc", "x-stream", s.String())
}

// respondForeign sends the head of an answer that is not gRPC.
func (s *simStream) respondForeign(status string, end bool) {
	s.c.mu.Lock()
	s.head, s.foreign, s.over = true, true, end
	s.answered = end
	s.answer = bytes.Repeat([]byte("<p>no gRPC "), 300)
	s.c.mu.Unlock()
	s.headers(end, ":status", status, "content-type", "text/html")
}

// send sends up to n bytes of the answer, as far as windows allow.
func (s *simStream) send(n int) {
	for n > 0 {
		s.c.mu.Lock()
		k := min(n, len(s.answer)-s.sent, int(s.sendWin), int(s.c.sendWin), 16<<10)
		if k <= 0 {
			s.c.mu.Unlock()
			return
		}
		p := s.answer[s.sent : s.sent+k]
		s.sent += k
		s.sendWin -= int64(k)
		s.c.sendWin -= int64(k)
		s.c.mu.Unlock()
		n -= k
		s.c.write(func() { _ = s.c.fr.WriteData(s.id, false, p) })
	}
}

// cutAnswer makes what was sent of the answer all of it, up to a message's end. It returns whether that is so.
func (s *simStream) cutAnswer() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	at := 0
	for at < s.sent {
		at += 5 + int(binary.BigEndian.Uint32(s.answer[at+1:]))
	}
	s.answer = s.answer[:at]
	return at == s.sent
}

// finish ends the answer with trailers.
func (s *simStream) finish(kv ...string) {
	s.c.mu.Lock()
	s.over, s.answered = true, true
	s.c.mu.Unlock()
	s.headers(true, kv...)
}

// stop ends the answer without trailers.
func (s *simStream) stop() {
	s.c.mu.Lock()
	s.over = true
	s.c.mu.Unlock()
	s.c.write(func() { _ = s.c.fr.WriteData(s.id, true, nil) })
}

// trailersOnly answers with one header block.
func (s *simStream) trailersOnly(status string) {
	s.c.mu.Lock()
	s.head = true
	s.c.mu.Unlock()
	s.finish(":status", "200", "content-type", "application/grpc", "grpc-status", status, "x-stream", s.String())
}

func (s *simStream) rst(code h2.ErrCode) {
	s.c.mu.Lock()
	s.unprocessed = code == h2.RefusedStream
	s.over = true
	s.c.mu.Unlock()
	s.c.speak()
	s.c.write(func() { _ = s.c.fr.WriteRSTStream(s.id, code) })
}

// grant lets the proxy send more.
func (s *simStream) grant(n int) {
	s.c.mu.Lock()
	n = min(n, 1<<20-int(s.win))
	if n > 0 {
		s.win += int64(n)
	}
	s.c.mu.Unlock()
	if n > 0 {
		s.c.speak()
		s.c.write(func() { _ = s.c.fr.WriteWindowUpdate(s.id, uint32(n)) })
	}
}

// goAway shuts out the streams above the last.
func (c *simConn) goAway(last uint32, code h2.ErrCode) {
	c.speak()
	c.mu.Lock()
	c.shut, c.shutOut = true, last
	for id, s := range c.streams {
		if id > last && !s.over {
			s.unprocessed, s.over = true, true
		}
	}
	c.mu.Unlock()
	c.write(func() { _ = c.fr.WriteGoAway(last, code, nil) })
}

// messages makes length-prefixed messages of so many bytes in all, whose content hangs on the seed.
func messages(seed uint32, size int) []byte {
	var b []byte
	x := seed*2654435761 + 12345
	for len(b)+5 <= size {
		x = x*1664525 + 1013904223
		n := min(int(x>>20)%(1+int(x>>8)%3000), size-len(b)-5)
		b = append(b, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(n))
		for range n {
			x = x*1664525 + 1013904223
			b = append(b, byte(x>>24))
		}
	}
	return b
}
