// Package transport holds the connections to one endpoint: dialling, TLS, the pool, keepalive, GOAWAY, and errors that
// say what failed, on whose side, and whether the upstream can have seen the call.
package transport

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// Kind says what failed.
type Kind uint8

const (
	// KindDial: the connection could not be made (refused, unreachable, timed out, name not found).
	KindDial Kind = iota + 1
	// KindTLS: the TLS handshake failed.
	KindTLS
	// KindALPN: the upstream's TLS does not offer HTTP/2.
	KindALPN
	// KindNotHTTP2: the upstream answered the HTTP/2 preface with something else.
	KindNotHTTP2
	// KindBackoff: the last dial failed so recently that no other is tried yet.
	KindBackoff
	// KindQueueFull: too many calls wait for a stream already.
	KindQueueFull
	// KindQueueTimeout: no stream became free in time.
	KindQueueTimeout
	// KindElsewhere: no stream was free, and the caller does not queue for one (see Ticket.Queue).
	KindElsewhere
	// KindCanceled: the caller stopped waiting.
	KindCanceled
	// KindReset: the upstream sent RST_STREAM; Code has its code.
	KindReset
	// KindGoAway: the upstream shut the stream out by a GOAWAY.
	KindGoAway
	// KindConnLost: the connection broke while the call was in flight.
	KindConnLost
	// KindProtocol: the upstream broke a rule of HTTP/2.
	KindProtocol
	// KindHeaderListSize: the upstream's header list is larger than accepted.
	KindHeaderListSize
	// KindRequestTooLarge: the call's metadata is larger than the upstream accepts, as it has said.
	KindRequestTooLarge
	// KindTimeout: the upstream did not answer a keepalive PING, or took nothing from the socket for too long.
	KindTimeout
	// KindMemory: this side ended the call, since it held most of what all streams hold together, and that was too much.
	KindMemory
	// KindLocal: this side closed the connection.
	KindLocal
)

// Side says whose failure it is.
type Side uint8

const (
	// SideUpstream: the endpoint, or the way to it.
	SideUpstream Side = iota
	// SideDownstream: the client.
	SideDownstream
	// SideInternal: the proxy itself (a limit, an orderly close).
	SideInternal
)

// Error is a failed attempt.
type Error struct {
	Kind Kind
	Side Side
	// Code is the HTTP/2 error code, where Kind has one.
	Code h2.ErrCode
	// Unprocessed: the upstream has certainly not acted on the call. Nothing else decides whether it may be sent
	// again without asking the retry policy.
	Unprocessed bool
	// Sent: the call's HEADERS left (or may have left) this process. An unprocessed call that was sent may be sent
	// again once; one that never left, any number of times (gRFC A6, transparent retries).
	Sent bool
	// Endpoint is the address of the endpoint.
	Endpoint string
	// Err is the cause.
	Err error

	unreached bool // not even a connection of the network's was made
}

// Error names the endpoint and what it said itself: it is meant for logs and for operators.
func (e *Error) Error() string {
	text := e.Text()
	if said := e.Said(); said != "" {
		text += " (the upstream says " + strconv.Quote(said) + ")"
	}
	if e.Endpoint == "" {
		return text
	}
	return e.Endpoint + ": " + text
}

// Said is the text with which the upstream sent GOAWAY. It is the upstream's own and may say anything of it, so it is not for
// everybody to read.
func (e *Error) Said() string {
	if he := new(h2.Error); errors.As(e.Err, &he) && (he.Kind == h2.KindGoAway || he.Kind == h2.KindConnLost && he.Code != h2.NoError) {
		return he.Debug
	}
	return ""
}

// Text says what failed and why without the endpoint's address and without what it said itself, as far as the cause's own text
// allows.
func (e *Error) Text() string {
	switch e.Kind {
	case KindDial:
		return "connect failed: " + Cause(e.Err)
	case KindTLS:
		return "TLS handshake failed: " + Cause(e.Err)
	case KindALPN, KindNotHTTP2, KindBackoff, KindQueueFull, KindQueueTimeout, KindElsewhere:
		return Cause(e.Err)
	case KindHeaderListSize:
		return "the upstream's response metadata is larger than accepted"
	case KindRequestTooLarge:
		text := "the call's metadata is larger than the upstream accepts"
		if he := new(h2.Error); errors.As(e.Err, &he) && he.Debug != "" {
			text += ": " + he.Debug
		}
		return text
	case KindCanceled:
		return "the call ended before a stream was opened: " + Cause(e.Err)
	default:
		return Cause(e.Err)
	}
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// FromStream wraps what ended a stream.
func FromStream(e *h2.Error, endpoint string) *Error {
	out := &Error{Code: e.Code, Unprocessed: e.Unprocessed, Sent: true, Endpoint: endpoint, Err: e}
	switch e.Kind {
	case h2.KindReset:
		out.Kind = KindReset
		if !e.Remote {
			out.Side = SideInternal
		}
	case h2.KindGoAway:
		out.Kind = KindGoAway
	case h2.KindConnLost:
		out.Kind = KindConnLost
	case h2.KindHeaderListSize:
		out.Kind = KindHeaderListSize
		if e.Remote {
			out.Kind, out.Side, out.Sent = KindRequestTooLarge, SideDownstream, false
		}
	case h2.KindTimeout:
		out.Kind = KindTimeout
	case h2.KindNotHTTP2:
		out.Kind = KindNotHTTP2
	case h2.KindMemory:
		out.Kind, out.Side = KindMemory, SideInternal
	case h2.KindLocal, h2.KindNoCapacity:
		out.Kind, out.Side = KindLocal, SideInternal
	default:
		out.Kind = KindProtocol
		if e.Connection {
			out.Kind = KindConnLost // the other streams of the connection have done nothing wrong
		}
	}
	return out
}

// Cause is the innermost readable reason of an error: system errors repeat network and address, which the caller names
// already or must not name.
func Cause(err error) string {
	if err == nil {
		return "unknown cause"
	}
	var he *h2.Error
	if errors.As(err, &he) && he.Err != nil && he.Kind == h2.KindConnLost {
		text := "connection lost"
		if he.Code != h2.NoError { // a GOAWAY has told why
			text += " after GOAWAY " + he.Code.String()
		}
		return text + ": " + Cause(he.Err)
	}
	if he != nil && (he.Kind == h2.KindGoAway || he.Kind == h2.KindConnLost) {
		silent := *he
		silent.Debug = ""
		return silent.Error()
	}
	return innermost(err)
}

var (
	errQueueFull = errors.New("too many calls are waiting for a connection")
	errTooLate   = errors.New("the calls that wait for a connection take longer than this one may")
	errElsewhere = errors.New("the upstream has no free stream at the moment")
	errSentAway  = errors.New("the upstream sent the new connection away (GOAWAY)")
)

// endedSoonError says that a connection ended before it was of use. It does not unwrap, as Cause would tell only half of it.
type endedSoonError struct{ err *h2.Error }

// Error says why.
func (e endedSoonError) Error() string {
	if e.err.Kind == h2.KindGoAway {
		return errSentAway.Error()
	}
	return "the upstream ended the new connection: " + Cause(e.err)
}

func errBackoff(last *Error) error {
	return fmt.Errorf("%s (not dialled again yet)", last.Text())
}
