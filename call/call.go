// Package call describes one RPC: what is known when it arrives (Call) and what is known when it is over (Result).
//
// Selection, health, retries, limits and metrics see these two and never an *http.Request, so that they work alike on
// every way a call takes through the proxy, including ways that never build a request.
package call

import (
	"context"
	"crypto/tls"
	"net/netip"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
)

// Metadata looks up a call's request metadata.
type Metadata interface {
	// Values returns all values of the key (lower case, as in gRPC), in order; nil when there is none. The caller
	// must not change the slice.
	Values(key string) []string
}

// Placeholders resolves Caddy's placeholders; *caddy.Replacer does.
type Placeholders interface {
	// ReplaceAll replaces all placeholders in input by their values, and those that are unknown or empty by empty.
	ReplaceAll(input, empty string) string
}

// Call is one RPC from one client. Policies, rules and observers may keep its strings, but neither the Call itself nor its Metadata: their
// memory is used again for another one.
type Call struct {
	// Service and Method are the parts of the path "/{Service}/{Method}". Service may contain dots and, rarely,
	// slashes; Method contains none.
	Service, Method string
	// Path is the :path of the call, decoded and without a query; URI is the :path as it came.
	Path string
	URI  string
	// Authority is what the client named as :authority (or Host).
	Authority string
	// Metadata is the request's metadata.
	Metadata Metadata
	// Peer is the address of the connection's other end; ClientIP the client's, behind trusted proxies.
	Peer     netip.AddrPort
	ClientIP netip.Addr
	// TLS is the state of the client's connection, nil without TLS.
	TLS *tls.ConnectionState
	// Placeholders resolves Caddy's placeholders for this call; nil where there are none.
	Placeholders Placeholders
	// Start is when the head arrived. Deadline is the effective one (client's and route's); zero means none.
	Start    time.Time
	Deadline time.Time

	// Result is filled while the call runs and is final once the call is over.
	Result Result
}

// EndedBy says who ended a call.
type EndedBy uint8

const (
	// EndedByUpstream: the upstream answered to the end, whatever the status.
	EndedByUpstream EndedBy = iota
	// EndedByClient: the client cancelled or went away.
	EndedByClient
	// EndedByProxy: the proxy made the status (no upstream, connection failed, drained, limits).
	EndedByProxy
	// EndedByDeadline: the deadline ran out at the proxy.
	EndedByDeadline
)

// String returns client, upstream, proxy or deadline.
func (e EndedBy) String() string {
	switch e {
	case EndedByUpstream:
		return "upstream"
	case EndedByClient:
		return "client"
	case EndedByProxy:
		return "proxy"
	case EndedByDeadline:
		return "deadline"
	}
	return "unknown"
}

// Source says where the status code came from.
type Source uint8

const (
	// SourceWire: grpc-status as the upstream sent it.
	SourceWire Source = iota
	// SourceHTTP: mapped from the upstream's HTTP status, since it sent no grpc-status.
	SourceHTTP
	// SourceProxy: made by the proxy.
	SourceProxy
)

// String returns wire, http or proxy.
func (s Source) String() string {
	switch s {
	case SourceWire:
		return "wire"
	case SourceHTTP:
		return "http"
	case SourceProxy:
		return "proxy"
	}
	return "unknown"
}

// Result is how a call went. It is computed once, at the call's very end.
type Result struct {
	// Code is the status the client was given (or would have been, had it not gone away).
	Code grpcwire.Code
	// Message is the status message, decoded.
	Message string
	// EndedBy and Source say who ended the call and where its status came from.
	EndedBy EndedBy
	Source  Source
	// Reason names a failure the proxy made (UPSTREAM_CONNECT_FAILED, …); empty otherwise.
	Reason string
	// Attempts counts the endpoints tried, 0 when none was.
	Attempts int
	// Upstream is the address of the endpoint of the last attempt.
	Upstream string
	// Bytes and messages of gRPC framing, without HTTP/2's own. Sent is towards the upstream, Received from it.
	SentBytes, ReceivedBytes       int64
	SentMessages, ReceivedMessages int64
	// Latency is from the arrival of the head to the end; FirstByte to the upstream's response head, 0 without one.
	Latency   time.Duration
	FirstByte time.Duration
}

// Attempt is how one try of a call on one endpoint went.
type Attempt struct {
	// Code is the status: the upstream's where it sent one, else what the failure means for the client.
	Code grpcwire.Code
	// EndedBy says who ended the attempt. A code that the upstream did not send itself says nothing about its
	// application.
	EndedBy EndedBy
	// Source says where the code came from. SourceProxy with EndedByUpstream: the upstream or its connection broke.
	Source Source
	// Cause says more of a failure whose status the proxy made, and Incident which: attempts that one failed dial, or the
	// end of one connection, has ended have the same. It is comparable, and nil where nothing can have ended others too.
	Cause    Cause
	Incident any
	// HTTPStatus is what the code stands for, if Source is SourceHTTP.
	HTTPStatus int
	// Start is when the endpoint was picked; Latency is from there to the end.
	Start   time.Time
	Latency time.Duration
	// Served is how much of that the endpoint took: from the last piece of the request that was sent before the answer
	// began, to the answer's first message or its end. 0: not known.
	Served time.Duration
	// Connection is the one that the attempt was on, if its deadline ran out or the client gave up, and nothing at all of an
	// answer had come.
	Connection Connection
	// SentBytes and ReceivedBytes are of gRPC framing, without HTTP/2's own; messages likewise.
	SentBytes, ReceivedBytes       int64
	SentMessages, ReceivedMessages int64
	// LoadReport is the endpoint's xds.data.orca.v3.OrcaLoadReport in wire format, nil when it sent none or none was
	// asked for.
	LoadReport []byte
}

// Cause says what has ended an attempt whose status the proxy made.
type Cause uint8

const (
	// CauseUnknown: no more is known than what the attempt's other fields say.
	CauseUnknown Cause = iota
	// CauseConnect: the endpoint could not be connected to.
	CauseConnect
	// CauseSilence: the connection was given up, since the endpoint took or said nothing for too long.
	CauseSilence
	// CauseLost: the connection has ended, and the attempt with it.
	CauseLost
	// CauseRefused: the attempt did not get as far as the endpoint's application, and that says nothing of how it is: it
	// refused the stream, is leaving (GOAWAY), or is not connected to at the moment.
	CauseRefused
	// CauseAnswer: the endpoint has reset the stream, or its answer was malformed or had no end.
	CauseAnswer
	// CauseSize: metadata was larger than one of the two sides accepts.
	CauseSize
)

// Connection is a connection to an endpoint, as far as those need to know it who judge the endpoint.
type Connection interface {
	// Silence is for how long nothing has come from the endpoint.
	Silence() time.Duration
	// Alive asks the endpoint for a sign of life, and waits for it until ctx ends. known is false if that says nothing.
	Alive(ctx context.Context) (alive, known bool)
}
