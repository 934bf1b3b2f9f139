package wiretest

import (
	"slices"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Half is what the peer sent on one stream: a response, or a request.
type Half struct {
	// Head is the first header block that is not informational; nil if none came.
	Head []hpack.HeaderField
	// Informational holds the blocks with a 1xx status that came before.
	Informational [][]hpack.HeaderField
	// Data is all payload of DATA, unless [Options] says to discard it; DataLen its length in any case.
	Data    []byte
	DataLen int64
	// Trailers is the block that ended the stream, if it was not the first; nil if there was none.
	Trailers []hpack.HeaderField
	// Ended tells that END_STREAM came.
	Ended bool
	// Reset tells that RST_STREAM came, with ResetCode.
	Reset     bool
	ResetCode http2.ErrCode
	// Err is why the connection ended, if that was before the stream ended.
	Err error
	// Frames are all frames of the stream, in their order.
	Frames []Frame
}

// TrailersOnly tells whether the stream was one header block with END_STREAM, without DATA and without informational
// blocks. What came after the end does not matter to it; see Sequence.
func (h *Half) TrailersOnly() bool {
	return h.Ended && h.Head != nil && h.Trailers == nil && h.Informational == nil &&
		!slices.ContainsFunc(h.Frames, func(f Frame) bool { return f.Type == http2.FrameData })
}

// Get returns the value of the name in the trailers or, if there are none, in the head.
func (h *Half) Get(name string) string {
	if h.Trailers != nil {
		return Get(h.Trailers, name)
	}
	return Get(h.Head, name)
}

// Sequence names the frames in their order, such as "HEADERS DATA HEADERS+END_STREAM RST_STREAM(NO_ERROR)".
// WINDOW_UPDATE and PRIORITY are left out.
func (h *Half) Sequence() string {
	var names []string
	for _, f := range h.Frames {
		if f.Type != http2.FrameWindowUpdate && f.Type != http2.FramePriority {
			names = append(names, f.String())
		}
	}
	return strings.Join(names, " ")
}

// add takes the stream's next frame.
func (h *Half) add(f Frame) {
	h.Frames = append(h.Frames, f)
	switch f.Type {
	case http2.FrameHeaders:
		status := f.Get(":status")
		switch {
		case h.Head == nil && len(status) == 3 && status[0] == '1':
			h.Informational = append(h.Informational, f.Fields)
		case h.Head == nil:
			h.Head = nonNil(f.Fields)
		default:
			h.Trailers = nonNil(f.Fields)
		}
	case http2.FrameData:
		h.Data = append(h.Data, f.Data...)
		h.DataLen += dataLen(f)
	case http2.FrameRSTStream:
		h.Reset, h.ResetCode = true, f.Code
	}
	h.Ended = h.Ended || f.EndStream()
}

func dataLen(f Frame) int64 {
	if f.Data != nil {
		return int64(len(f.Data))
	}
	return int64(f.Length)
}

func nonNil(fields []hpack.HeaderField) []hpack.HeaderField {
	if fields == nil {
		return []hpack.HeaderField{}
	}
	return fields
}

// Collect takes all frames of the stream until END_STREAM, RST_STREAM or the end of the connection. It fails the test
// when nothing comes on the stream for [Timeout].
func (c *Conn) Collect(stream uint32) *Half {
	c.t.Helper()
	h := new(Half)
	for !h.Ended && !h.Reset && h.Err == nil {
		if !c.wait(time.After(Timeout), func() bool {
			if c.moveTo(h, stream) {
				return true
			}
			h.Err = c.readErr
			return h.Err != nil
		}) {
			c.fatalf("stream %d did not end, nothing came for %v; so far: %s", stream, Timeout, h.Sequence())
		}
	}
	return h
}

// CollectAll is Collect, followed by a [Conn.Barrier], so that frames after the end are found as well.
func (c *Conn) CollectAll(stream uint32) *Half {
	c.t.Helper()
	h := c.Collect(stream)
	if h.Err == nil {
		// A connection that ends now ends after the stream.
		_ = c.barrier()
		c.mu.Lock()
		defer c.mu.Unlock()
		c.moveTo(h, stream)
	}
	return h
}

// moveTo gives h the frames of the stream and tells whether there were any. c.mu is held.
func (c *Conn) moveTo(h *Half, stream uint32) (moved bool) {
	c.frames = slices.DeleteFunc(c.frames, func(f Frame) bool {
		if f.Stream != stream {
			return false
		}
		h.add(f)
		moved = true
		return true
	})
	return moved
}
