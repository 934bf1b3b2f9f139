// Package h2 is an HTTP/2 connection engine for proxies, in both roles. It knows connections, frames and streams
// (RFC 9113) and field compression (RFC 7541), and neither gRPC nor Caddy.
//
// # Shape
//
// A [Conn] has one reading goroutine. It reads into one large buffer, handles every complete frame in it and flushes
// what that produced once, at the end of the batch. What the peer sends on a stream goes to the stream's [Receiver],
// on that goroutine, in wire order; a receiver must not block.
//
// Writing never blocks the caller unless the method says so. Frames are appended, under the connection's lock, to a
// pending buffer; [Conn.Flush] sends it: whoever finds no flush under way flushes, by trying the socket without
// blocking; what the socket does not take is left to the connection's writer goroutine. Nothing is sent before
// somebody flushes, so that a caller can put HEADERS, DATA and the end of a call into one system call. A client's header
// blocks are compressed only when they are taken for writing, so that a stream that is over by then is never sent (heads.go).
package h2

import (
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Field is one header or trailer field. Names are lower case. Sensitive marks a field that is never indexed
// (RFC 7541 section 7.1.3).
type Field = hpack.HeaderField

// ErrCode is an HTTP/2 error code (RFC 9113 section 7).
type ErrCode = http2.ErrCode

// The error codes a proxy sends or tells apart.
const (
	NoError            = http2.ErrCodeNo
	ProtocolError      = http2.ErrCodeProtocol
	InternalError      = http2.ErrCodeInternal
	FlowControlError   = http2.ErrCodeFlowControl
	SettingsTimeout    = http2.ErrCodeSettingsTimeout
	StreamClosed       = http2.ErrCodeStreamClosed
	FrameSizeError     = http2.ErrCodeFrameSize
	RefusedStream      = http2.ErrCodeRefusedStream
	Cancel             = http2.ErrCodeCancel
	CompressionError   = http2.ErrCodeCompression
	ConnectError       = http2.ErrCodeConnect
	EnhanceYourCalm    = http2.ErrCodeEnhanceYourCalm
	InadequateSecurity = http2.ErrCodeInadequateSecurity
	HTTP11Required     = http2.ErrCodeHTTP11Required
)

// Receiver takes what the peer sends on one stream. Its methods run on the connection's reading goroutine, one at a
// time and in wire order; they must not block and must not keep fields or p (the strings inside fields may be kept).
// They run without any lock of the connection held, so they may call the methods of Stream and Conn, of this or any
// other connection.
type Receiver interface {
	// RecvHead delivers a header block that is not trailers: the request head (server role), an informational (1xx)
	// or final response head (client role). end is set when it carried END_STREAM.
	// A response head without :status is delivered as it is.
	RecvHead(s *Stream, fields []Field, end bool)

	// RecvData delivers the payload of one DATA frame, without padding. The receiver owes len(p) bytes of credit:
	// it calls s.Consumed once they have left towards their reader. p may be empty when end is set.
	RecvData(s *Stream, p []byte, end bool)

	// RecvTrailers delivers the block that ends the stream.
	RecvTrailers(s *Stream, fields []Field)

	// RecvReset tells that nothing more will come, and why: RST_STREAM, GOAWAY that shut the stream out, a malformed
	// message, the end of the connection. It is called at most once, never after the stream's end was delivered and
	// this side has ended too, and never for a reset by the local side's own Stream.Reset.
	// After the peer's END_STREAM it is still called when the peer resets the stream (NO_ERROR means "stop sending").
	// With KindMemory it comes from a goroutine of its own, so that it can coincide with another call and be followed by one
	// that had begun, and also after both sides have ended in order, while something was not consumed.
	RecvReset(s *Stream, err *Error)
}

// WriteReadier is implemented by receivers that write without blocking: RecvWriteReady is called, once, after a
// Stream.TryWrite that took less than it was given, when more can be written. It runs on the reading goroutine or on
// the connection's writer, under the rules of Receiver, so it can coincide with a call of one of Receiver's methods, but
// not with another one of its own, nor with accept. What it writes on the stream's own connection needs no flush.
type WriteReadier interface {
	RecvWriteReady(s *Stream)
}

// ErrorKind says what kind of event ended a stream or a connection.
type ErrorKind uint8

const (
	// KindReset: RST_STREAM. Remote tells whose; Code is its code.
	KindReset ErrorKind = iota + 1
	// KindGoAway: the peer sent GOAWAY with a last stream identifier below this stream. Unprocessed is set.
	KindGoAway
	// KindConnLost: the connection failed or was closed by the peer (read or write error, EOF). If a GOAWAY with an
	// error code came before, Code and Debug are its.
	KindConnLost
	// KindProtocol: the peer broke a rule (malformed message: the stream was reset; connection error: GOAWAY sent).
	KindProtocol
	// KindTimeout: a PING, a SETTINGS acknowledgement, the preface or a blocked write ran out of time.
	KindTimeout
	// KindHeaderListSize: the header list was larger than this side accepts; with Remote, it would have been larger than the
	// peer accepts, so that it was not sent.
	KindHeaderListSize
	// KindLocal: this side closed the connection (Conn.Close, Conn.Shutdown, an exhausted limit).
	KindLocal
	// KindNoCapacity: the stream was not opened since the peer's or the own limit of streams is reached. Unprocessed.
	KindNoCapacity
	// KindMemory: this side ended the stream since all streams of the Budget together held too much, and this one the most of
	// it.
	KindMemory
	// KindNotHTTP2: the peer does not speak HTTP/2 (its first bytes are no SETTINGS frame); Debug has the start of
	// what it said, made printable.
	KindNotHTTP2
)

// Error says why a stream or a connection ended, with the facts a proxy decides on.
type Error struct {
	Kind ErrorKind
	// Code is the HTTP/2 error code, where there is one.
	Code ErrCode
	// Remote: the peer said so. Otherwise this side did.
	Remote bool
	// Unprocessed: the peer has certainly not acted on the stream (REFUSED_STREAM, GOAWAY with a lower last stream
	// identifier, never sent: RFC 9113 section 8.7), so it can be sent again elsewhere.
	Unprocessed bool
	// Connection: it ended the whole connection, of whose streams this was one. Otherwise it concerned the stream alone.
	Connection bool
	// Debug is the debug data of a GOAWAY, or what rule was broken.
	Debug string
	// Err is the cause, where there is one (a net.OpError, …).
	Err error
}
