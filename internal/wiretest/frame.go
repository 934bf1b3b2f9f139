package wiretest

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Frame is one frame that the peer sent.
type Frame struct {
	Type   http2.FrameType
	Flags  http2.Flags
	Stream uint32
	// Length is the length of the payload on the wire.
	Length int
	// Fields is the header block that a HEADERS frame begins, decoded, with what its CONTINUATION frames brought.
	// The frame is delivered once the block is complete, before those.
	Fields []hpack.HeaderField
	// Data is the payload of DATA without padding, the debug data of GOAWAY, the 8 bytes of PING, or the payload of
	// a frame of unknown type.
	Data []byte
	// Code is the error code of RST_STREAM and GOAWAY.
	Code http2.ErrCode
	// LastStream is GOAWAY's last stream identifier.
	LastStream uint32
	// Settings are those of a SETTINGS frame, in their order.
	Settings []http2.Setting
	// Increment is WINDOW_UPDATE's.
	Increment uint32
	// Time is when the frame was read.
	Time time.Time
}

// EndStream tells whether the frame carries END_STREAM.
func (f Frame) EndStream() bool {
	return (f.Type == http2.FrameHeaders || f.Type == http2.FrameData) && f.Flags.Has(http2.FlagDataEndStream)
}

// Ack tells whether the frame acknowledges SETTINGS or a PING.
func (f Frame) Ack() bool {
	return (f.Type == http2.FrameSettings || f.Type == http2.FramePing) && f.Flags.Has(http2.FlagSettingsAck)
}

// Get returns the first value of the field in the header block, "" if there is none.
func (f Frame) Get(name string) string { return Get(f.Fields, name) }

// String describes the frame in a few words: type, END_STREAM or ACK, and the error code.
func (f Frame) String() string {
	var b strings.Builder
	b.WriteString(f.Type.String())
	if f.EndStream() {
		b.WriteString("+END_STREAM")
	}
	if f.Ack() {
		b.WriteString("+ACK")
	}
	if f.Type == http2.FrameRSTStream || f.Type == http2.FrameGoAway {
		b.WriteString("(" + f.Code.String() + ")")
	}
	return b.String()
}

// describe adds the stream and what is in the frame.
func (f Frame) describe() string {
	s := fmt.Sprintf("%v stream %d, %d bytes", f, f.Stream, f.Length)
	switch f.Type {
	case http2.FrameHeaders:
		s += fmt.Sprint(" ", f.Fields)
	case http2.FrameSettings:
		s += fmt.Sprint(" ", f.Settings)
	case http2.FrameGoAway:
		s += fmt.Sprintf(" last stream %d %q", f.LastStream, f.Data)
	case http2.FrameWindowUpdate:
		s += fmt.Sprint(" +", f.Increment)
	}
	return s
}

// Fields makes a header block of names and values in turn.
func Fields(namesAndValues ...string) []hpack.HeaderField {
	if len(namesAndValues)%2 != 0 {
		panic("wiretest.Fields: a name without a value")
	}
	fields := make([]hpack.HeaderField, 0, len(namesAndValues)/2)
	for i := 0; i < len(namesAndValues); i += 2 {
		fields = append(fields, hpack.HeaderField{Name: namesAndValues[i], Value: namesAndValues[i+1]})
	}
	return fields
}

// Request is the head of a gRPC request over plaintext to the path, followed by more names and values in turn.
func Request(authority, path string, namesAndValues ...string) []hpack.HeaderField {
	return append(Fields(":method", "POST", ":scheme", "http", ":path", path, ":authority", authority,
		"content-type", "application/grpc", "te", "trailers"), Fields(namesAndValues...)...)
}

// Head is the head of a gRPC response, followed by more names and values in turn.
func Head(namesAndValues ...string) []hpack.HeaderField {
	return append(Fields(":status", "200", "content-type", "application/grpc"), Fields(namesAndValues...)...)
}

// Get returns the first value of the name, "" if there is none.
func Get(fields []hpack.HeaderField, name string) string {
	for _, f := range fields {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// Values returns all values of the name, in order.
func Values(fields []hpack.HeaderField, name string) []string {
	var values []string
	for _, f := range fields {
		if f.Name == name {
			values = append(values, f.Value)
		}
	}
	return values
}

// Message puts the prefix of an uncompressed gRPC message before p.
func Message(p []byte) []byte {
	n := len(p)
	return append([]byte{0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, p...)
}
