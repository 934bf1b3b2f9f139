package wiretest

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"golang.org/x/net/http2"
)

// Expect takes the first frame that matches and has not been taken, and waits for one if there is none. It fails the
// test when the connection ends or [Timeout] passes before; what says what was expected.
func (c *Conn) Expect(what string, match func(Frame) bool) Frame {
	c.t.Helper()
	var f Frame
	var end error
	found := false
	expired := !c.wait(time.After(Timeout), func() bool {
		i := slices.IndexFunc(c.frames, match)
		if found = i >= 0; found {
			f = c.frames[i]
			c.frames = slices.Delete(c.frames, i, i+1)
			return true
		}
		end = c.readErr
		return end != nil
	})
	switch {
	case expired:
		c.fatalf("no %s within %v", what, Timeout)
	case !found:
		c.fatalf("no %s: the connection ended: %v", what, end)
	}
	return f
}

// Next takes the next frame of the stream, of whatever type. Stream 0 has the connection's own frames.
func (c *Conn) Next(stream uint32) Frame {
	c.t.Helper()
	return c.Expect(fmt.Sprintf("frame on stream %d", stream), func(f Frame) bool { return f.Stream == stream })
}

// ExpectHeaders takes the next HEADERS frame of any stream, which is how a server learns of the next request.
func (c *Conn) ExpectHeaders() Frame {
	c.t.Helper()
	return c.Expect("HEADERS", func(f Frame) bool { return f.Type == http2.FrameHeaders })
}

// ExpectOn takes the next frame of the type on the stream; others that came before it stay.
func (c *Conn) ExpectOn(stream uint32, typ http2.FrameType) Frame {
	c.t.Helper()
	return c.Expect(fmt.Sprintf("%v on stream %d", typ, stream),
		func(f Frame) bool { return f.Type == typ && f.Stream == stream })
}

// ExpectReset takes RST_STREAM of the stream and returns its code.
func (c *Conn) ExpectReset(stream uint32) http2.ErrCode {
	c.t.Helper()
	return c.ExpectOn(stream, http2.FrameRSTStream).Code
}

// ExpectGoAway takes the next GOAWAY.
func (c *Conn) ExpectGoAway() Frame {
	c.t.Helper()
	return c.ExpectOn(0, http2.FrameGoAway)
}

// ExpectSettings takes the next SETTINGS that is no acknowledgement.
func (c *Conn) ExpectSettings() Frame {
	c.t.Helper()
	return c.Expect("SETTINGS", func(f Frame) bool { return f.Type == http2.FrameSettings && !f.Ack() })
}

// ExpectSettingsAck takes the next acknowledgement of SETTINGS.
func (c *Conn) ExpectSettingsAck() Frame {
	c.t.Helper()
	return c.Expect("SETTINGS+ACK", func(f Frame) bool { return f.Type == http2.FrameSettings && f.Ack() })
}

// ExpectPing takes the next PING that is no acknowledgement.
func (c *Conn) ExpectPing() Frame {
	c.t.Helper()
	return c.Expect("PING", func(f Frame) bool { return f.Type == http2.FramePing && !f.Ack() })
}

// ExpectClosed waits until the peer has closed the connection, in whatever way, and returns what reading it gave: io.EOF
// or an error.
func (c *Conn) ExpectClosed() error {
	c.t.Helper()
	var err error
	if !c.wait(time.After(Timeout), func() bool { err = c.readErr; return err != nil }) {
		c.fatalf("the connection is still open after %v", Timeout)
	}
	return err
}

// Closed tells whether the connection has ended, as seen from here.
func (c *Conn) Closed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.readErr != nil
}

// Untaken returns the frames of the stream that have come and have not been taken.
func (c *Conn) Untaken(stream uint32) []Frame {
	c.mu.Lock()
	defer c.mu.Unlock()
	var frames []Frame
	for _, f := range c.frames {
		if f.Stream == stream {
			frames = append(frames, f)
		}
	}
	return frames
}

// Barrier sends a PING and waits for its acknowledgement: afterwards, what the peer had written before it read the PING
// has come. So a test can say that something did not happen, without waiting for it.
func (c *Conn) Barrier() {
	c.t.Helper()
	if err := c.barrier(); err != nil {
		c.fatalf("no acknowledgement of a PING: %v", err)
	}
}

func (c *Conn) barrier() error {
	var data [8]byte
	c.mu.Lock()
	c.pingSeq++
	binary.BigEndian.PutUint64(data[:], 1<<63|c.pingSeq)
	c.pings[data] = struct{}{}
	c.mu.Unlock()
	c.WritePing(false, data)
	var end error
	if !c.wait(time.After(Timeout), func() bool {
		_, open := c.pings[data]
		if open {
			end = c.readErr
		}
		return !open || end != nil
	}) {
		return fmt.Errorf("none within %v", Timeout)
	}
	return end
}
