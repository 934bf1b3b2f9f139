package wiretest

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// read is the connection's reading goroutine.
func (c *Conn) read() {
	defer close(c.done)
	fr := http2.NewFramer(nil, c.nc)
	fr.AllowIllegalReads = true // Order is for the tests to judge.
	fr.SetMaxReadFrameSize(1<<24 - 1)
	r := reader{c: c}
	r.dec = hpack.NewDecoder(4096, func(f hpack.HeaderField) { r.fields = append(r.fields, f) })
	for _, s := range c.opts.Settings {
		if s.ID == http2.SettingHeaderTableSize {
			r.dec.SetAllowedMaxDynamicTableSize(s.Val)
		}
	}
	for {
		c.mu.Lock()
		for c.paused && !c.closed {
			changed := c.changed
			c.mu.Unlock()
			<-changed
			c.mu.Lock()
		}
		c.mu.Unlock()
		f, err := fr.ReadFrame()
		if err == nil {
			err = r.take(f)
		}
		if err == nil {
			continue
		}
		// The connection is over, or the peer sent what is no frame; no test expects that of it.
		c.mu.Lock()
		c.readErr = err
		c.signal()
		c.mu.Unlock()
		return
	}
}

// reader puts header blocks together.
type reader struct {
	c      *Conn
	dec    *hpack.Decoder
	fields []hpack.HeaderField
	block  []Frame // HEADERS and CONTINUATION of a block that is not complete.
}

func (r *reader) take(raw http2.Frame) error {
	h := raw.Header()
	f := Frame{Type: h.Type, Flags: h.Flags, Stream: h.StreamID, Length: int(h.Length), Time: time.Now()}
	switch raw := raw.(type) {
	case *http2.HeadersFrame:
		r.fields, r.block = nil, nil
		return r.fragment(f, raw.HeaderBlockFragment(), raw.HeadersEnded())
	case *http2.ContinuationFrame:
		return r.fragment(f, raw.HeaderBlockFragment(), raw.HeadersEnded())
	case *http2.DataFrame:
		if !r.c.opts.DiscardData {
			f.Data = slices.Clone(raw.Data())
		}
	case *http2.RSTStreamFrame:
		f.Code = raw.ErrCode
	case *http2.GoAwayFrame:
		f.Code, f.LastStream, f.Data = raw.ErrCode, raw.LastStreamID, slices.Clone(raw.DebugData())
	case *http2.PingFrame:
		f.Data = slices.Clone(raw.Data[:])
	case *http2.WindowUpdateFrame:
		f.Increment = raw.Increment
	case *http2.SettingsFrame:
		_ = raw.ForeachSetting(func(s http2.Setting) error {
			f.Settings = append(f.Settings, s)
			return nil
		})
	case *http2.UnknownFrame:
		f.Data = slices.Clone(raw.Payload())
	}
	r.react(f)
	r.deliver(f)
	return nil
}

// fragment takes a part of a header block; the last one delivers the whole.
func (r *reader) fragment(f Frame, p []byte, last bool) error {
	if f.Type == http2.FrameContinuation && len(r.block) == 0 {
		return errors.New("CONTINUATION without HEADERS")
	}
	r.block = append(r.block, f)
	if _, err := r.dec.Write(p); err != nil {
		return fmt.Errorf("decoding a header block: %w", err)
	}
	if !last {
		return nil
	}
	if err := r.dec.Close(); err != nil {
		return fmt.Errorf("decoding a header block: %w", err)
	}
	r.block[0].Fields = r.fields
	block := r.block
	r.fields, r.block = nil, nil
	r.deliver(block...)
	return nil
}

// deliver makes frames known to the test.
func (r *reader) deliver(frames ...Frame) {
	c := r.c
	if c.opts.Inspect != nil {
		for _, f := range frames {
			c.opts.Inspect(c, f)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range frames {
		if f.Type == http2.FramePing && f.Ack() {
			delete(c.pings, [8]byte(f.Data))
		}
		c.frames = append(c.frames, f)
		f.Data = nil
		c.history = append(c.history, f)
	}
	if n := len(c.history) - historyLen; n > 0 {
		c.history = slices.Delete(c.history, 0, n)
	}
	c.signal()
}

// react does what a peer must do about a frame.
func (r *reader) react(f Frame) {
	c := r.c
	switch f.Type {
	case http2.FrameSettings:
		if f.Ack() {
			return
		}
		c.applySettings(f.Settings)
		if !c.opts.NoSettingsAck {
			c.acknowledge()
		}
	case http2.FramePing:
		if !f.Ack() && !c.opts.NoPingAck {
			c.WritePing(true, [8]byte(f.Data))
		}
	case http2.FrameWindowUpdate:
		c.mu.Lock()
		defer c.mu.Unlock()
		if f.Stream == 0 {
			c.window += int64(f.Increment)
		} else {
			c.windows[f.Stream] += int64(f.Increment)
		}
	case http2.FrameRSTStream:
		c.mu.Lock()
		defer c.mu.Unlock()
		c.ended[f.Stream] = http2.StreamError{StreamID: f.Stream, Code: f.Code}
	case http2.FrameData:
		c.mu.Lock()
		grant := !c.hold && f.Length > 0
		c.mu.Unlock()
		if !grant {
			return
		}
		c.Batch(func() {
			c.WriteWindowUpdate(0, uint32(f.Length))
			if !f.EndStream() {
				c.WriteWindowUpdate(f.Stream, uint32(f.Length))
			}
		})
	}
}

func (c *Conn) applySettings(settings []http2.Setting) {
	for _, s := range settings {
		switch s.ID {
		case http2.SettingInitialWindowSize:
			c.mu.Lock()
			c.initial = int64(s.Val)
			c.mu.Unlock()
		case http2.SettingMaxFrameSize:
			c.mu.Lock()
			c.frameSize = int(s.Val)
			c.mu.Unlock()
		case http2.SettingHeaderTableSize:
			c.wmu.Lock()
			c.enc.SetMaxDynamicTableSizeLimit(s.Val)
			c.wmu.Unlock()
		}
	}
}
