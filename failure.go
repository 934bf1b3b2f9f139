package grpcproxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// errorDomain is the domain of the google.rpc.ErrorInfo in the details of a status that the proxy made.
const errorDomain = "grpc_proxy"

// The reasons of google.rpc.ErrorInfo. They are part of the product's interface.
const (
	reasonNoUpstream        = "NO_UPSTREAM"
	reasonConnectFailed     = "UPSTREAM_CONNECT_FAILED"
	reasonTLSFailed         = "UPSTREAM_TLS_FAILED"
	reasonNotHTTP2          = "UPSTREAM_NOT_HTTP2"
	reasonQueueFull         = "UPSTREAM_QUEUE_FULL"
	reasonQueueTimeout      = "UPSTREAM_QUEUE_TIMEOUT"
	reasonReset             = "UPSTREAM_STREAM_RESET"
	reasonGoAway            = "UPSTREAM_GOAWAY"
	reasonConnLost          = "UPSTREAM_CONNECTION_LOST"
	reasonMemory            = "STREAM_MEMORY_LIMIT"
	reasonProtocol          = "UPSTREAM_PROTOCOL_ERROR"
	reasonMetadataSize      = "UPSTREAM_METADATA_TOO_LARGE"
	reasonRequestSize       = "REQUEST_METADATA_TOO_LARGE"
	reasonHTTPStatus        = "UPSTREAM_HTTP_STATUS"
	reasonNotGRPC           = "UPSTREAM_NOT_GRPC"
	reasonNoTrailers        = "UPSTREAM_NO_TRAILERS"
	reasonIncomplete        = "UPSTREAM_INCOMPLETE_MESSAGE"
	reasonNoStatus          = "UPSTREAM_NO_STATUS"
	reasonBadStatus         = "UPSTREAM_MALFORMED_STATUS"
	reasonDeadline          = "DEADLINE_AT_PROXY"
	reasonBadTimeout        = "MALFORMED_TIMEOUT"
	reasonBadPath           = "MALFORMED_PATH"
	reasonRequestTooLarge   = "REQUEST_TOO_LARGE"
	reasonRequestUnreadable = "REQUEST_UNREADABLE"
	reasonWriteTimeout      = "SERVER_WRITE_TIMEOUT"
	reasonRequestLength     = "REQUEST_LENGTH_MISMATCH"
	reasonStreamIdle        = "STREAM_IDLE_TIMEOUT"
	reasonStreamTimeout     = "STREAM_TIMEOUT"
	reasonHung              = "UPSTREAM_HUNG"
	reasonDrained           = "UPSTREAM_REMOVED"
	reasonReload            = "PROXY_RELOADED"
	reasonExit              = "PROXY_SHUTDOWN"
	reasonClientGone        = "CLIENT_GONE"
	reasonAborted           = "CALL_ABORTED"
)

// failure is a status that the upstream did not send itself.
type failure struct {
	code    grpcwire.Code
	message string // for the client; names no endpoint
	said    string // by the upstream about its connection, for clients that may know of it
	reason  string
	endedBy call.EndedBy
	source  call.Source
	// endpoint is the address of the upstream that failed, empty if none did.
	endpoint string
	// httpStatus is what the code stands for, if source is SourceHTTP.
	httpStatus int
	// err has more for the log.
	err error
}

func proxyFailure(code grpcwire.Code, reason, message string) *failure {
	return &failure{code: code, reason: reason, message: message, endedBy: call.EndedByProxy, source: call.SourceProxy}
}

// fromTransport maps a failed attempt to a status: semantics from gRPC's PROTOCOL-HTTP2.md, "Errors".
func fromTransport(e *transport.Error) *failure {
	f := &failure{
		code: grpcwire.Unavailable, message: e.Text(), endedBy: call.EndedByProxy, source: call.SourceProxy,
		endpoint: e.Endpoint, err: e, said: e.Said(),
	}
	switch e.Kind {
	case transport.KindDial, transport.KindBackoff:
		f.reason = reasonConnectFailed
	case transport.KindTLS, transport.KindALPN:
		f.reason = reasonTLSFailed
	case transport.KindNotHTTP2:
		f.reason = reasonNotHTTP2
	case transport.KindQueueFull:
		f.reason = reasonQueueFull
	case transport.KindQueueTimeout:
		f.reason = reasonQueueTimeout
	case transport.KindReset:
		f.reason = reasonReset
		f.code = grpcwire.FromHTTP2(uint32(e.Code))
		f.message = resetMessage(e.Code)
		f.endedBy = call.EndedByUpstream
	case transport.KindGoAway:
		f.reason = reasonGoAway
		f.message = "the upstream is shutting down and did not process the call"
	case transport.KindConnLost, transport.KindTimeout:
		f.reason = reasonConnLost
	case transport.KindRequestTooLarge:
		f.reason = reasonRequestSize
		f.code = grpcwire.ResourceExhausted
	case transport.KindHeaderListSize:
		f.reason = reasonMetadataSize
		f.code = grpcwire.ResourceExhausted // gRPC: metadata over the limit is RESOURCE_EXHAUSTED
	case transport.KindProtocol:
		f.reason = reasonProtocol
		f.code = grpcwire.Internal
		f.message = "the upstream broke the HTTP/2 protocol: " + strings.TrimPrefix(transport.Cause(e.Err), "peer broke the protocol: ")
	case transport.KindMemory:
		f.reason = reasonMemory
		f.code = grpcwire.ResourceExhausted
		f.message = "the proxy holds too much for clients that read slowly, and of this call's answer the most"
	case transport.KindLocal:
		f.reason = reasonConnLost
	case transport.KindCanceled:
		return clientGone()
	default:
		f.reason = reasonConnLost
	}
	return f
}

func resetMessage(code h2.ErrCode) string {
	s := "the upstream reset the stream with " + code.String()
	switch code {
	case h2.EnhanceYourCalm:
		s += ": it asks for less bandwidth or load"
	case h2.RefusedStream:
		s += ": it did not process the call"
	case h2.InadequateSecurity:
		s += ": it does not accept the connection's TLS parameters"
	case h2.NoError:
		s += " before the end of its answer"
	}
	return s
}

func clientGone() *failure {
	return &failure{
		code: grpcwire.Canceled, reason: reasonClientGone, message: "the client cancelled the call or went away",
		endedBy: call.EndedByClient, source: call.SourceProxy,
	}
}

// writeTimeout: the server's limit for a whole answer has passed. Its code is what a client makes of the reset (gRPC's
// PROTOCOL-HTTP2.md: INTERNAL_ERROR is INTERNAL).
func writeTimeout(limit time.Duration) *failure {
	return proxyFailure(grpcwire.Internal, reasonWriteTimeout,
		fmt.Sprintf("the server's write timeout (%v) ended the call", limit))
}

func deadlineExceeded() *failure {
	return &failure{
		code: grpcwire.DeadlineExceeded, reason: reasonDeadline, message: "the deadline ran out at the proxy",
		endedBy: call.EndedByDeadline, source: call.SourceProxy,
	}
}

// fromHTTP maps an answer that is not gRPC, by gRPC's http-grpc-status-mapping.md. The start of a textual body goes
// into the message, since it is often the only hint at what answered.
func fromHTTP(status int, contentType string, body []byte, endpoint string) *failure {
	f := &failure{code: grpcwire.FromHTTPStatus(status), endedBy: call.EndedByUpstream, source: call.SourceHTTP, endpoint: endpoint, httpStatus: status}
	switch {
	case status == 0:
		f.reason, f.message = reasonHTTPStatus, "the upstream answered without an HTTP status"
	case status == http.StatusOK:
		f.reason = reasonNotGRPC
		f.message = fmt.Sprintf("the upstream's answer is not gRPC (content-type %q)", contentType)
	default:
		f.reason = reasonHTTPStatus
		f.message = "the upstream answered with HTTP status " + strconv.Itoa(status)
		if text := http.StatusText(status); text != "" {
			f.message += " (" + text + ")"
		}
	}
	if text := excerpt(body); text != "" {
		f.message += ": " + text
	}
	return f
}

// excerpt makes the start of a body readable in one line.
func excerpt(body []byte) string {
	text := strings.ToValidUTF8(string(body), "\uFFFD")
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
	return strings.Join(strings.Fields(text), " ")
}

// fromBody maps an error in reading the client's request.
func fromBody(r *http.Request, err error) *failure {
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return &failure{
			code: grpcwire.ResourceExhausted, reason: reasonRequestTooLarge, endedBy: call.EndedByProxy, source: call.SourceProxy, err: err,
			message: fmt.Sprintf("the request is larger than the %d bytes the proxy allows", tooLarge.Limit),
		}
	case isTimeout(err):
		return &failure{
			code: grpcwire.Unavailable, reason: reasonRequestUnreadable, endedBy: call.EndedByProxy, source: call.SourceProxy, err: err,
			message: "the server's read timeout ended the request",
		}
	}
	f := clientGone()
	if text := wrongLength(r, err); text != "" {
		f = requestLength(text)
	}
	f.err = err
	return f
}

const (
	bodyShorter = "request body shorter than its content-length"
	bodyLonger  = "request body longer than its content-length"
)

// requestLength is a request that does not keep what its content-length promised (RFC 9113 section 8.1.1 calls it malformed):
// the client's fault. gRPC makes HTTP status 400 INTERNAL.
func requestLength(text string) *failure {
	return &failure{code: grpcwire.Internal, reason: reasonRequestLength, message: text, endedBy: call.EndedByClient, source: call.SourceProxy}
}

// wrongLength tells such a request by what reading its body says. Go's HTTP/2 and HTTP/3 servers have no types for it.
func wrongLength(r *http.Request, err error) string {
	text := err.Error()
	switch {
	case r.ContentLength < 0:
		return ""
	case errors.Is(err, io.ErrUnexpectedEOF), strings.HasPrefix(text, "request declared a Content-Length of"):
		return bodyShorter
	case strings.HasPrefix(text, "sender tried to send more than declared Content-Length"), strings.Contains(text, "peer sent too much data"):
		return bodyLonger
	}
	return ""
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// text is the message for the client, with the endpoint in front if that is allowed.
func (f *failure) text(expose bool) string {
	if !expose || f.endpoint == "" {
		return f.message
	}
	text := "upstream " + f.endpoint + ": " + f.message
	if f.said != "" {
		text += " (it says " + strconv.Quote(f.said) + ")"
	}
	return text
}

// hasDetails tells failures that the proxy itself made: no connection, no upstream, a queue, a limit, the end of a
// configuration. Where the call's deadline, the client's mistake or what the upstream sent decides, the status is what gRPC says
// it is, and clients expect no details with it; the reason is for logs and placeholders then.
func (f *failure) hasDetails() bool {
	switch f.reason {
	case reasonNoUpstream, reasonConnectFailed, reasonTLSFailed, reasonNotHTTP2, reasonConnLost, reasonQueueFull, reasonQueueTimeout, reasonMemory,
		reasonMetadataSize, reasonRequestSize, reasonRequestTooLarge, reasonRequestUnreadable, reasonStreamIdle, reasonStreamTimeout,
		reasonHung, reasonDrained, reasonReload, reasonExit:
		return true
	}
	return false
}

// details is the value of grpc-status-details-bin: a google.rpc.Status with an ErrorInfo.
func (f *failure) details(message string, attempts int, expose bool) string {
	info := grpcwire.ErrorInfo{
		Reason:   f.reason,
		Domain:   errorDomain,
		Metadata: [][2]string{{"attempts", strconv.Itoa(attempts)}},
	}
	if expose && f.endpoint != "" {
		info.Metadata = append(info.Metadata, [2]string{"upstream", f.endpoint})
	}
	return grpcwire.EncodeBin(grpcwire.AppendStatusDetails(nil, f.code, message, &info))
}
