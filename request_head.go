package grpcproxy

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// The header block of an attempt: gRPC over HTTP/2, "Requests → Request-Headers", "Request-Headers → Call-Definition
// *Custom-Metadata". All of it is legal, whatever the client sent: a server may close the connection for what is not, with
// everybody's calls on it. The same call has the same block each time, so that a fault that hangs on the order can be found.
//
// It is made in several small functions since a server's goroutine has come far when it gets here: with one large frame more its
// stack would have to grow for each call.

// callFields are the fields of gRPC's Call-Definition that the proxy passes on as they are, in the order of gRPC over HTTP/2,
// "Requests". They stand before the metadata.
var callFields = [...]struct{ lower, canonical string }{
	{"grpc-message-type", "Grpc-Message-Type"},
	{"grpc-encoding", "Grpc-Encoding"},
	{"grpc-accept-encoding", "Grpc-Accept-Encoding"},
	{"user-agent", "User-Agent"},
}

// ofCall tells the fields that stand in front already.
func ofCall(canonical string) bool {
	switch canonical {
	case "Content-Type", "Grpc-Timeout", "Grpc-Message-Type", "Grpc-Encoding", "Grpc-Accept-Encoding", "User-Agent":
		return true
	}
	return false
}

var notForwarded forwarded

// appendFields builds the block.
func (x *exchange) appendFields(f []h2.Field, a *attempt) []h2.Field {
	header, host, fwd := x.r.Header, x.r.Host, &x.forwarded
	if ops := x.h.Headers; ops != nil && ops.Request != nil {
		header, host = x.headerUp(ops.Request)
		fwd = &notForwarded // it is in the header
	}
	if !validAuthority(host) {
		host = authority(a.endpoint())
	}
	options := connectionOptions(header)
	f = x.appendCall(f, a, header, host)
	f = appendCallFields(f, header, options)
	metadata := len(f)
	f = appendMetadata(f, header, options, fwd)
	// Stable: values of one name keep their order. Names that differ in case only are one.
	slices.SortStableFunc(f[metadata:], func(a, b h2.Field) int { return strings.Compare(a.Name, b.Name) })
	return f
}

// headerUp applies header_up.
func (x *exchange) headerUp(ops *headers.HeaderOps) (header http.Header, host string) {
	r := x.r.Clone(x.r.Context())
	x.forwarded.set(r.Header)
	ops.ApplyToRequest(r)
	return r.Header, r.Host
}

func add(f []h2.Field, name, value string) []h2.Field {
	return append(f, h2.Field{Name: name, Value: value})
}

// appendCall appends what every call has.
func (x *exchange) appendCall(f []h2.Field, a *attempt, header http.Header, host string) []h2.Field {
	f = add(f, ":method", http.MethodPost)
	f = add(f, ":scheme", a.end.Scheme())
	f = add(f, ":path", pathField(x.r.URL))
	f = add(f, ":authority", host)
	// "te: trailers" detects incompatible proxies; gRPC requires it.
	f = add(f, "te", "trailers")
	// Also where a client of HTTP/1 lists it in Connection: it is what makes the request a call.
	types := header["Content-Type"]
	if len(types) == 0 {
		types = x.r.Header["Content-Type"]
	}
	f = appendField(f, "Content-Type", types)
	if d := x.call.Deadline; !d.IsZero() {
		// gRFC A31 and PROTOCOL-HTTP2.md: the next hop gets the time that remains.
		f = add(f, "grpc-timeout", grpcwire.FormatTimeout(time.Until(d)))
	}
	return f
}

func appendCallFields(f []h2.Field, header http.Header, options []string) []h2.Field {
	for i := range callFields {
		c := &callFields[i]
		if slices.Contains(options, c.canonical) {
			continue
		}
		for _, v := range header[c.canonical] {
			f = add(f, c.lower, fieldText(v))
		}
	}
	return f
}

// appendMetadata appends all the rest. fwd stands for what the header has of its names.
func appendMetadata(f []h2.Field, header http.Header, options []string, fwd *forwarded) []h2.Field {
	rewritten := *fwd != notForwarded
	for name, values := range header {
		if ofCall(name) || rewritten && isForwardedName(name) || slices.Contains(options, name) {
			continue
		}
		f = appendField(f, name, values)
	}
	f = addIfAny(f, "x-forwarded-for", fwd.xff)
	f = addIfAny(f, "x-forwarded-proto", fwd.proto)
	f = addIfAny(f, "x-forwarded-host", fwd.host)
	return addIfAny(f, "via", fwd.via)
}

func addIfAny(f []h2.Field, name, value string) []h2.Field {
	if value == "" {
		return f
	}
	return add(f, name, fieldText(value))
}

// endpoint is what the source says of the attempt's endpoint.
func (a *attempt) endpoint() *upstream.Endpoint {
	s := a.view.Snapshot
	i := a.pick.Index
	if n := len(s.Endpoints); i >= n {
		return &s.Draining[i-n]
	}
	return &s.Endpoints[i]
}
