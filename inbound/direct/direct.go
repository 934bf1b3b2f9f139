// Package direct is the client's side of calls on connections that package h2 reads: a stream is a [proxy.Downstream], and what
// comes on it goes to the flight on the connection's own goroutine.
package direct

import (
	"crypto/tls"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
)

// Handler serves clients' connections.
type Handler struct {
	// Proxy carries the calls.
	Proxy *proxy.Proxy
	// Trusted are proxies in front that are believed what they say about their clients (X-Forwarded-*).
	Trusted []netip.Prefix
}

// Serve serves a client's connection, on which HTTP/2 begins (after the TLS handshake, if any). A request that is not gRPC is answered
// as gRPC's PROTOCOL-HTTP2.md has it.
func (h *Handler) Serve(nc net.Conn, cfg h2.Config) *h2.Conn {
	return h2.Server(nc, cfg, h.Client(nc).Accept)
}

// Client is who has a connection, for the calls that come on it.
func (h *Handler) Client(nc net.Conn) *Client {
	c := &Client{proxy: h.Proxy, trusted: h.Trusted, forwarded: proxy.Forwarded{Via: "2.0 Caddy"}}
	if tc, ok := nc.(interface{ ConnectionState() tls.ConnectionState }); ok {
		state := tc.ConnectionState()
		c.tls = &state
	}
	c.peer, _ = netip.ParseAddrPort(nc.RemoteAddr().String())
	if ip := c.peer.Addr().WithZone(""); ip.IsValid() { // else nobody knows who this is: nothing is said of it
		c.forwarded.For, c.forwarded.Proto = ip.String(), "http"
		if c.tls != nil {
			c.forwarded.Proto = "https"
		}
		c.forwarded.Trusted = c.trusts(ip)
	}
	return c
}

// Client is what the calls of one connection have in common.
type Client struct {
	proxy     *proxy.Proxy
	trusted   []netip.Prefix
	peer      netip.AddrPort
	tls       *tls.ConnectionState
	forwarded proxy.Forwarded // without what the calls say
}

func (c *Client) trusts(ip netip.Addr) bool {
	return slices.ContainsFunc(c.trusted, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// clientIP is the last address before the trusted proxies, by what the first of these says and the next ones have added.
func (c *Client) clientIP(forwardedFor []string) netip.Addr {
	ip := c.peer.Addr()
	for _, line := range slices.Backward(forwardedFor) {
		list := strings.Split(line, ",")
		for _, text := range slices.Backward(list) {
			before, err := netip.ParseAddr(strings.TrimSpace(text))
			if err != nil {
				return ip
			}
			if ip = before; !c.trusts(ip.WithZone("")) {
				return ip
			}
		}
	}
	return ip
}

// Stream is one call on a client's connection.
type Stream struct {
	proxy.Flight
	s        *h2.Stream
	metadata []h2.Field // as the client has sent it
	fields   []h2.Field // what metadata and the request's fields are in
}

// streams are used again: see proxy.Recycler.
var streams = sync.Pool{New: func() any { return new(Stream) }}

// maxKept is how many fields a stream keeps room for.
const maxKept = 64

// Recycle implements proxy.Recycler.
func (st *Stream) Recycle() {
	if !st.s.Release() {
		return
	}
	st.Flight.Reset()
	st.s, st.metadata = nil, nil
	if clear(st.fields); cap(st.fields) > maxKept {
		st.fields = nil
	}
	streams.Put(st)
}

// Accept begins the call that a stream's head describes, and returns what receives the rest. It is what h2.Server wants.
func (c *Client) Accept(s *h2.Stream, fields []h2.Field, end bool) h2.Receiver {
	st := streams.Get().(*Stream)
	st.s = s
	if !st.describe(c, fields) {
		// "If Content-Type does not begin with "application/grpc", gRPC servers SHOULD respond with HTTP status of 415".
		_ = s.WriteHeaders([]h2.Field{{Name: ":status", Value: "415"}}, true)
		return nil
	}
	c.proxy.Serve(&st.Flight, st, s.Conn())
	if end {
		st.Flight.Data(nil, true, s.Conn())
	}
	return st
}

// moreFields are what the next hop is told of the client (proxy.Forwarded).
const moreFields = 4

// describe fills in what is known of the call. It returns false if the request is not gRPC.
func (st *Stream) describe(from *Client, fields []h2.Field) bool {
	c := &st.Call
	c.Start = time.Now()
	c.Peer, c.ClientIP, c.TLS = from.peer, from.peer.Addr(), from.tls
	fwd := from.forwarded
	var (
		method, contentType string
		types, timeouts     int
		others              []h2.Field // but what fwd has taken; nil as long as it has taken nothing
	)
	if need := len(fields) + moreFields; cap(st.fields) < need {
		st.fields = make([]h2.Field, 0, need)
	}
	regular := st.fields[:0]
	for _, f := range fields {
		switch f.Name {
		case ":method":
			method = f.Value
			continue
		case ":path":
			c.URI = f.Value
			continue
		case ":authority":
			c.Authority = f.Value
			continue
		case ":scheme":
			continue
		case "host":
			if c.Authority == "" {
				c.Authority = f.Value
			}
			continue
		case "content-type":
			contentType = f.Value
			types++
		case "grpc-timeout":
			if timeouts++; timeouts == 1 {
				if d, err := grpcwire.ParseTimeout(f.Value); err == nil {
					st.s.Expires(d)
				}
			}
		}
		taken := fwd.Take(f.Name, f.Value)
		if taken && others == nil {
			others = append(make([]h2.Field, 0, len(fields)+moreFields), regular...)
		}
		regular = append(regular, f)
		if others != nil && !taken {
			others = append(others, f)
		}
	}
	if method != "POST" || types != 1 || grpcwire.ContentKind(contentType) != grpcwire.GRPC {
		return false
	}
	if fwd.Proto != "" {
		fwd.Host = c.Authority
	}
	st.metadata, st.fields = regular, regular
	if others != nil {
		st.Request.Fields = fwd.AppendTo(others)
	} else {
		st.Request.Fields = fwd.AppendTo(regular)
		st.fields = st.Request.Fields // the same, and more
	}
	st.Request.Path = proxy.LegalPath(c.URI)
	c.Path = decoded(st.Request.Path)
	c.Metadata = st
	if fwd.Trusted {
		c.ClientIP = from.clientIP(st.Values("x-forwarded-for"))
	}
	return true
}

// decoded is the path of a legal target, without its query and escapes.
func decoded(uri string) string {
	path, _, _ := strings.Cut(uri, "?")
	if strings.IndexByte(path, '%') >= 0 {
		if p, err := url.PathUnescape(path); err == nil {
			return p
		}
	}
	return path
}

// Values implements [call.Metadata].
func (st *Stream) Values(key string) (values []string) {
	for _, f := range st.metadata {
		if f.Name == key {
			values = append(values, f.Value)
		}
	}
	return values
}

// RecvHead implements h2.Receiver. It is not called in the server role.
func (st *Stream) RecvHead(*h2.Stream, []h2.Field, bool) {}

// RecvData implements h2.Receiver.
func (st *Stream) RecvData(s *h2.Stream, p []byte, end bool) {
	st.Flight.Data(p, end, s.Conn())
}

// RecvTrailers implements h2.Receiver. What they say goes no further: a gRPC request has none.
func (st *Stream) RecvTrailers(s *h2.Stream, _ []h2.Field) {
	st.Flight.Data(nil, true, s.Conn())
}

// RecvReset implements h2.Receiver. It may come from any goroutine.
func (st *Stream) RecvReset(_ *h2.Stream, err *h2.Error) {
	st.Flight.Abandon(proxy.ClientLost(err), nil)
}

// RecvWriteReady implements h2.WriteReadier.
func (st *Stream) RecvWriteReady(*h2.Stream) { st.Flight.Writable() }

// Head implements proxy.Downstream.
func (st *Stream) Head(fields []h2.Field, end bool) {
	if end {
		_ = st.s.WriteLast(fields)
		return
	}
	_ = st.s.WriteHeaders(fields, false) // the receiver is told why it fails
}

// Data implements proxy.Downstream.
func (st *Stream) Data(p []byte) (taken int, sent bool) {
	n, err := st.s.TryWrite(p, false)
	if err != nil {
		return len(p), true // nobody reads it, and the receiver is told why
	}
	return n, true
}

// Trailers implements proxy.Downstream.
func (st *Stream) Trailers(fields []h2.Field, _ bool) { _ = st.s.WriteLast(fields) }

// Consumed implements proxy.Downstream.
func (st *Stream) Consumed(n int) { st.s.Consumed(n) }

// Flush implements proxy.Downstream.
func (st *Stream) Flush(reader *h2.Conn) {
	if reader != nil {
		reader.FlushAfter(st.s.Conn())
		return
	}
	st.s.Conn().Flush()
}

// Reset implements proxy.Downstream.
func (st *Stream) Reset(code h2.ErrCode) { st.s.Reset(code) }

// Done implements proxy.Downstream.
func (st *Stream) Done() { st.s.Done() }

var (
	_ h2.Receiver      = (*Stream)(nil)
	_ h2.WriteReadier  = (*Stream)(nil)
	_ proxy.Downstream = (*Stream)(nil)
	_ proxy.Recycler   = (*Stream)(nil)
	_ call.Metadata    = (*Stream)(nil)
)
