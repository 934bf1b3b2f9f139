package wiretest

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// write runs f, which appends frames, and flushes what it appended.
func (c *Conn) write(f func()) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	f()
	if c.batches == 0 {
		c.flush()
	}
}

func (c *Conn) flush() {
	if c.wbuf.Len() == 0 {
		return
	}
	if c.writeErr == nil {
		_ = c.nc.SetWriteDeadline(time.Now().Add(Timeout))
		_, c.writeErr = c.nc.Write(c.wbuf.Bytes())
	}
	c.wbuf.Reset()
}

// Batch puts all that is written during f into one write of the connection, be it written by f or by others.
func (c *Conn) Batch(f func()) {
	c.write(func() { c.batches++ })
	defer c.write(func() { c.batches-- })
	f()
}

// WriteErr is the first error that writing had, nil if there was none.
func (c *Conn) WriteErr() error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	return c.writeErr
}

// WriteRaw writes bytes as they are.
func (c *Conn) WriteRaw(p []byte) {
	c.write(func() { c.wbuf.Write(p) })
}

// WriteFrame writes a frame of any type.
func (c *Conn) WriteFrame(typ http2.FrameType, flags http2.Flags, stream uint32, payload []byte) {
	c.write(func() { _ = c.fr.WriteRawFrame(typ, flags, stream, payload) })
}

// WriteSettings writes a SETTINGS frame.
func (c *Conn) WriteSettings(settings ...http2.Setting) {
	c.write(func() {
		_ = c.fr.WriteSettings(settings...)
		for c.mute = false; c.owed > 0; c.owed-- {
			_ = c.fr.WriteSettingsAck()
		}
	})
}

// acknowledge acknowledges SETTINGS as soon as that is allowed.
func (c *Conn) acknowledge() {
	c.write(func() {
		if c.mute {
			c.owed++
			return
		}
		_ = c.fr.WriteSettingsAck()
	})
}

// WriteSettingsAck acknowledges SETTINGS.
func (c *Conn) WriteSettingsAck() {
	c.write(func() { _ = c.fr.WriteSettingsAck() })
}

// WritePing writes a PING, or acknowledges one.
func (c *Conn) WritePing(ack bool, data [8]byte) {
	c.write(func() { _ = c.fr.WritePing(ack, data) })
}

// WriteReset writes RST_STREAM.
func (c *Conn) WriteReset(stream uint32, code http2.ErrCode) {
	c.write(func() { _ = c.fr.WriteRSTStream(stream, code) })
}

// WriteGoAway writes GOAWAY.
func (c *Conn) WriteGoAway(lastStream uint32, code http2.ErrCode, debug string) {
	c.write(func() { _ = c.fr.WriteGoAway(lastStream, code, []byte(debug)) })
}

// WriteWindowUpdate grants n bytes more on the stream, or on the connection if it is 0.
func (c *Conn) WriteWindowUpdate(stream, n uint32) {
	c.write(func() { _ = c.fr.WriteWindowUpdate(stream, n) })
}

// WriteHeaders writes a header block, in CONTINUATION frames too if it is larger than 16 KiB.
func (c *Conn) WriteHeaders(stream uint32, fields []hpack.HeaderField, end bool) {
	c.WriteHeadersSplit(stream, fields, end, defaultFrameSize)
}

// WriteHeadersSplit writes a header block in pieces of at most size bytes, the first as HEADERS and the others as
// CONTINUATION.
func (c *Conn) WriteHeadersSplit(stream uint32, fields []hpack.HeaderField, end bool, size int) {
	c.write(func() { c.headers(stream, fields, end, size) })
}

// headers appends a header block. c.wmu is held, so that the blocks stand in the order of the encoder's state.
func (c *Conn) headers(stream uint32, fields []hpack.HeaderField, end bool, size int) {
	block := c.encode(fields)
	first := block[:min(size, len(block))]
	block = block[len(first):]
	_ = c.fr.WriteHeaders(http2.HeadersFrameParam{
		StreamID: stream, BlockFragment: first, EndStream: end, EndHeaders: len(block) == 0,
	})
	for len(block) > 0 {
		next := block[:min(size, len(block))]
		block = block[len(next):]
		_ = c.fr.WriteContinuation(stream, len(block) == 0, next)
	}
}

func (c *Conn) encode(fields []hpack.HeaderField) []byte {
	c.encBuf.Reset()
	for _, f := range fields {
		_ = c.enc.WriteField(f)
	}
	return c.encBuf.Bytes()
}

// Encode encodes a header block with the connection's encoder, for use with WriteHeaderBlock, WriteContinuation or
// WriteFrame. It must be sent, and before any later block, or the peer's decoder goes astray.
func (c *Conn) Encode(fields []hpack.HeaderField) []byte {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	return append([]byte(nil), c.encode(fields)...)
}

// WriteHeaderBlock writes a HEADERS frame with a piece of an encoded header block.
func (c *Conn) WriteHeaderBlock(stream uint32, block []byte, endStream, endHeaders bool) {
	c.write(func() {
		_ = c.fr.WriteHeaders(http2.HeadersFrameParam{
			StreamID: stream, BlockFragment: block, EndStream: endStream, EndHeaders: endHeaders,
		})
	})
}

// WriteContinuation writes a CONTINUATION frame with a piece of an encoded header block.
func (c *Conn) WriteContinuation(stream uint32, block []byte, endHeaders bool) {
	c.write(func() { _ = c.fr.WriteContinuation(stream, endHeaders, block) })
}

// WriteData writes one DATA frame, whatever the windows and the largest frame size are.
func (c *Conn) WriteData(stream uint32, p []byte, end bool) {
	c.write(func() { _ = c.fr.WriteData(stream, end, p) })
	c.spend(stream, len(p))
}

// WriteDataPadded writes one DATA frame with pad bytes of padding, at most 255.
func (c *Conn) WriteDataPadded(stream uint32, p []byte, end bool, pad int) {
	c.write(func() { _ = c.fr.WriteDataPadded(stream, end, p, make([]byte, pad)) })
	c.spend(stream, len(p)+1+pad)
}

func (c *Conn) spend(stream uint32, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.window -= int64(n)
	c.windows[stream] -= int64(n)
	c.signal()
}

// Request is [Request] with the scheme of the connection and the address it was made to as authority.
func (c *Conn) Request(path string, namesAndValues ...string) []hpack.HeaderField {
	fields := Request(c.nc.RemoteAddr().String(), path, namesAndValues...)
	if _, ok := c.nc.(*tls.Conn); ok {
		fields[1].Value = "https"
	}
	return fields
}

// Open opens the next stream of a client with the header block and returns its identifier.
func (c *Conn) Open(fields []hpack.HeaderField, end bool) uint32 {
	var id uint32
	c.write(func() {
		id = c.nextID
		c.nextID += 2
		c.headers(id, fields, end, defaultFrameSize)
	})
	return id
}

// SendData writes p in DATA frames as the peer's windows and its largest frame size allow, and waits for windows in
// between. It gives up, and tells what it has sent, when the peer resets the stream, when the connection is over, when
// ctx is done, or when no window comes for [Timeout].
func (c *Conn) SendData(ctx context.Context, stream uint32, p []byte, end bool) (sent int, err error) {
	stop := context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.signal()
	})
	defer stop()
	for {
		n := 0
		granted := c.wait(time.After(Timeout), func() bool {
			switch {
			case c.ended[stream] != nil:
				err = c.ended[stream]
			case c.readErr != nil:
				err = c.readErr
			case c.closed:
				err = net.ErrClosed
			case ctx.Err() != nil:
				err = ctx.Err()
			default:
				room := min(c.window, c.initial+c.windows[stream], int64(c.frameSize))
				n = min(len(p)-sent, int(max(room, 0)))
				c.window -= int64(n)
				c.windows[stream] -= int64(n)
				if n > 0 {
					c.signal()
				}
			}
			return err != nil || n > 0 || sent == len(p)
		})
		switch {
		case err != nil:
			return sent, err
		case !granted:
			return sent, fmt.Errorf("no window on stream %d for %v: %w", stream, Timeout, context.DeadlineExceeded)
		}
		last := sent+n == len(p)
		if n > 0 || end {
			c.write(func() { _ = c.fr.WriteData(stream, end && last, p[sent:sent+n]) })
		}
		sent += n
		if err := c.WriteErr(); err != nil {
			return sent, err
		}
		if last {
			return sent, nil
		}
	}
}
