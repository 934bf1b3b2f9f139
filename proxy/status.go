package proxy

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// errorDomain is the domain of the google.rpc.ErrorInfo in the details of a status that the proxy made.
const errorDomain = "grpc_proxy"

// The reasons of google.rpc.ErrorInfo. They are part of the product's interface.
const (
	ReasonNoUpstream        = "NO_UPSTREAM"
	ReasonConnectFailed     = "UPSTREAM_CONNECT_FAILED"
	ReasonTLSFailed         = "UPSTREAM_TLS_FAILED"
	ReasonNotHTTP2          = "UPSTREAM_NOT_HTTP2"
	ReasonQueueFull         = "UPSTREAM_QUEUE_FULL"
	ReasonQueueTimeout      = "UPSTREAM_QUEUE_TIMEOUT"
	ReasonReset             = "UPSTREAM_STREAM_RESET"
	ReasonGoAway            = "UPSTREAM_GOAWAY"
	ReasonConnLost          = "UPSTREAM_CONNECTION_LOST"
	ReasonMemory            = "STREAM_MEMORY_LIMIT"
	ReasonProtocol          = "UPSTREAM_PROTOCOL_ERROR"
	ReasonMetadataSize      = "UPSTREAM_METADATA_TOO_LARGE"
	ReasonRequestSize       = "REQUEST_METADATA_TOO_LARGE"
	ReasonHTTPStatus        = "UPSTREAM_HTTP_STATUS"
	ReasonNotGRPC           = "UPSTREAM_NOT_GRPC"
	ReasonNoTrailers        = "UPSTREAM_NO_TRAILERS"
	ReasonIncomplete        = "UPSTREAM_INCOMPLETE_MESSAGE"
	ReasonNoStatus          = "UPSTREAM_NO_STATUS"
	ReasonBadStatus         = "UPSTREAM_MALFORMED_STATUS"
	ReasonDeadline          = "DEADLINE_AT_PROXY"
	ReasonBadTimeout        = "MALFORMED_TIMEOUT"
	ReasonBadPath           = "MALFORMED_PATH"
	ReasonRequestTooLarge   = "REQUEST_TOO_LARGE"
	ReasonRequestUnreadable = "REQUEST_UNREADABLE"
	ReasonWriteTimeout      = "SERVER_WRITE_TIMEOUT"
	ReasonRequestLength     = "REQUEST_LENGTH_MISMATCH"
	ReasonStreamIdle        = "STREAM_IDLE_TIMEOUT"
	ReasonStreamTimeout     = "STREAM_TIMEOUT"
	ReasonHung              = "UPSTREAM_HUNG"
	ReasonDrained           = "UPSTREAM_REMOVED"
	ReasonReload            = "PROXY_RELOADED"
	ReasonExit              = "PROXY_SHUTDOWN"
	ReasonClientGone        = "CLIENT_GONE"
	ReasonAborted           = "CALL_ABORTED"
)

// Failure is a status that the upstream did not send itself. It is not changed once it was handed on.
type Failure struct {
	Code grpcwire.Code
	// Message is for the client. It names no endpoint.
	Message string
	Reason  string
	EndedBy call.EndedBy
	Source  call.Source
	// Err has more for the log.
	Err error

	said       string // by the upstream about its connection, for clients that may know of it
	endpoint   string // the address of the upstream that failed, empty if none did
	httpStatus int    // what the code stands for, if Source is SourceHTTP
}

// Fail makes a failure of the proxy's own.
func Fail(code grpcwire.Code, reason, message string) *Failure {
	return &Failure{Code: code, Reason: reason, Message: message, EndedBy: call.EndedByProxy, Source: call.SourceProxy}
}

// ClientGone is the end of a call whose client has cancelled it, or is not there any more.
func ClientGone() *Failure {
	return &Failure{
		Code: grpcwire.Canceled, Reason: ReasonClientGone, Message: "the client cancelled the call or went away",
		EndedBy: call.EndedByClient, Source: call.SourceProxy,
	}
}

// ClientLost is the end of a call whose stream on the client's connection has failed.
func ClientLost(err *h2.Error) *Failure {
	why := ClientGone()
	switch {
	case err.Kind == h2.KindMemory:
		why = Fail(grpcwire.ResourceExhausted, ReasonMemory, "the proxy holds too much for upstreams that read slowly, and of this call's request the most")
	case err.Kind == h2.KindProtocol && strings.HasSuffix(err.Debug, "content-length"):
		why = RequestLength("the request's data does not add up to its content-length")
	}
	why.Err = err
	return why
}

// RequestLength is a request that does not keep what its content-length promised (RFC 9113 section 8.1.1 calls it malformed):
// the client's fault. gRPC makes HTTP status 400 INTERNAL.
func RequestLength(text string) *Failure {
	return &Failure{Code: grpcwire.Internal, Reason: ReasonRequestLength, Message: text, EndedBy: call.EndedByClient, Source: call.SourceProxy}
}

func deadlineExceeded() *Failure {
	return &Failure{
		Code: grpcwire.DeadlineExceeded, Reason: ReasonDeadline, Message: "the deadline ran out at the proxy",
		EndedBy: call.EndedByDeadline, Source: call.SourceProxy,
	}
}

// fromTransport maps a failed attempt to a status: semantics from gRPC's PROTOCOL-HTTP2.md, "Errors".
func fromTransport(e *transport.Error) *Failure {
	f := &Failure{
		Code: grpcwire.Unavailable, Message: e.Text(), EndedBy: call.EndedByProxy, Source: call.SourceProxy,
		endpoint: e.Endpoint, Err: e, said: e.Said(),
	}
	switch e.Kind {
	case transport.KindDial, transport.KindBackoff:
		f.Reason = ReasonConnectFailed
	case transport.KindTLS, transport.KindALPN:
		f.Reason = ReasonTLSFailed
	case transport.KindNotHTTP2:
		f.Reason = ReasonNotHTTP2
	case transport.KindQueueFull:
		f.Reason = ReasonQueueFull
	case transport.KindQueueTimeout:
		f.Reason = ReasonQueueTimeout
	case transport.KindReset:
		f.Reason = ReasonReset
		f.Code = grpcwire.FromHTTP2(uint32(e.Code))
		f.Message = resetMessage(e.Code)
		f.EndedBy = call.EndedByUpstream
	case transport.KindGoAway:
		f.Reason = ReasonGoAway
		f.Message = "the upstream is shutting down and did not process the call"
	case transport.KindConnLost, transport.KindTimeout:
		f.Reason = ReasonConnLost
	case transport.KindRequestTooLarge:
		f.Reason = ReasonRequestSize
		f.Code = grpcwire.ResourceExhausted
	case transport.KindHeaderListSize:
		f.Reason = ReasonMetadataSize
		f.Code = grpcwire.ResourceExhausted // gRPC: metadata over the limit is RESOURCE_EXHAUSTED
	case transport.KindProtocol:
		f.Reason = ReasonProtocol
		f.Code = grpcwire.Internal
		f.Message = "the upstream broke the HTTP/2 protocol: " + strings.TrimPrefix(transport.Cause(e.Err), "peer broke the protocol: ")
	case transport.KindMemory:
		f.Reason = ReasonMemory
		f.Code = grpcwire.ResourceExhausted
		f.Message = "the proxy holds too much for clients that read slowly, and of this call's answer the most"
	case transport.KindLocal:
		f.Reason = ReasonConnLost
	case transport.KindCanceled:
		return ClientGone()
	default:
		f.Reason = ReasonConnLost
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

// fromHTTP maps an answer that is not gRPC, by gRPC's http-grpc-status-mapping.md. The start of a textual body goes
// into the message, since it is often the only hint at what answered.
func fromHTTP(status int, contentType string, body []byte, endpoint string) *Failure {
	f := &Failure{Code: grpcwire.FromHTTPStatus(status), EndedBy: call.EndedByUpstream, Source: call.SourceHTTP, endpoint: endpoint, httpStatus: status}
	switch {
	case status == 0:
		f.Reason, f.Message = ReasonHTTPStatus, "the upstream answered without an HTTP status"
	case status == statusOK:
		f.Reason = ReasonNotGRPC
		f.Message = fmt.Sprintf("the upstream's answer is not gRPC (content-type %q)", contentType)
	default:
		f.Reason = ReasonHTTPStatus
		f.Message = "the upstream answered with HTTP status " + strconv.Itoa(status)
		if text := grpcwire.HTTPStatusText(status); text != "" {
			f.Message += " (" + text + ")"
		}
	}
	if text := excerpt(body); text != "" {
		f.Message += ": " + text
	}
	return f
}

const statusOK = 200

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

// badAnswer is an answer that clients could not make sense of.
func badAnswer(code grpcwire.Code, reason, message, endpoint string) *Failure {
	return &Failure{
		Code: code, Reason: reason, Message: message,
		EndedBy: call.EndedByUpstream, Source: call.SourceProxy, endpoint: endpoint,
	}
}

// text is the message for the client, with the endpoint in front if that is allowed.
func (f *Failure) text(expose bool) string {
	if !expose || f.endpoint == "" {
		return f.Message
	}
	text := "upstream " + f.endpoint + ": " + f.Message
	if f.said != "" {
		text += " (it says " + strconv.Quote(f.said) + ")"
	}
	return text
}

// hasDetails tells failures that the proxy itself made: no connection, no upstream, a queue, a limit, the end of a
// configuration. Where the call's deadline, the client's mistake or what the upstream sent decides, the status is what gRPC says
// it is, and clients expect no details with it; the reason is for logs and placeholders then.
func (f *Failure) hasDetails() bool {
	switch f.Reason {
	case ReasonNoUpstream, ReasonConnectFailed, ReasonTLSFailed, ReasonNotHTTP2, ReasonConnLost, ReasonQueueFull, ReasonQueueTimeout, ReasonMemory,
		ReasonMetadataSize, ReasonRequestSize, ReasonRequestTooLarge, ReasonRequestUnreadable, ReasonStreamIdle, ReasonStreamTimeout,
		ReasonHung, ReasonDrained, ReasonReload, ReasonExit:
		return true
	}
	return false
}

// appendTo appends the status as fields.
func (f *Failure) appendTo(fields []h2.Field, attempts int, expose bool) []h2.Field {
	text := f.text(expose)
	fields = append(fields,
		h2.Field{Name: "grpc-status", Value: strconv.FormatUint(uint64(f.Code), 10)},
		h2.Field{Name: "grpc-message", Value: grpcwire.EncodeMessage(text)})
	if f.hasDetails() {
		fields = append(fields, h2.Field{Name: "grpc-status-details-bin", Value: f.details(text, attempts, expose)})
	}
	return fields
}

// details is the value of grpc-status-details-bin: a google.rpc.Status with an ErrorInfo.
func (f *Failure) details(message string, attempts int, expose bool) string {
	info := grpcwire.ErrorInfo{
		Reason:   f.Reason,
		Domain:   errorDomain,
		Metadata: [][2]string{{"attempts", strconv.Itoa(attempts)}},
	}
	if expose && f.endpoint != "" {
		info.Metadata = append(info.Metadata, [2]string{"upstream", f.endpoint})
	}
	return grpcwire.EncodeBin(grpcwire.AppendStatusDetails(nil, f.Code, message, &info))
}
