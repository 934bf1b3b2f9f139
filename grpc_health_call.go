package grpcproxy

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
)

const (
	// maxHealthRequest is more than any question about health needs.
	maxHealthRequest = 4096
	// maxHealthList: "The server may respond with a RESOURCE_EXHAUSTED error if too many services exist" (health.proto); gRFC
	// A90 puts the limit at 100.
	maxHealthList = 100
	// healthStall is how long a client may leave a message of a Watch in the way. It must not hold up an exit for longer
	// than calls do.
	healthStall = defaultExitTimeout
)

// healthCall is one call of the health service.
type healthCall struct {
	h      *Health
	w      http.ResponseWriter
	r      *http.Request
	method string
	ctx    context.Context
	sent   bool // the response has begun
}

// healthStatus is how a call of the health service ends.
type healthStatus struct {
	code    grpcwire.Code
	message string
}

func healthFailure(code grpcwire.Code, format string, args ...any) healthStatus {
	return healthStatus{code, fmt.Sprintf(format, args...)}
}

func (c *healthCall) serve() {
	web.Prepare(c.w.Header(), c.r)
	c.w.Header()["Content-Type"] = web.AnswerType(c.r)
	c.finish(c.run())
}

func (c *healthCall) run() healthStatus {
	switch c.method {
	case grpcwire.HealthCheck, grpcwire.HealthWatch, grpcwire.HealthList:
	default:
		return healthFailure(grpcwire.Unimplemented, "unknown method %s for service %s", c.method, grpcwire.HealthService)
	}
	c.ctx = c.r.Context()
	if v := c.r.Header["Grpc-Timeout"]; len(v) > 0 {
		d, err := grpcwire.ParseTimeout(v[0])
		if err != nil {
			return healthStatus{grpcwire.Internal, err.Error()} // as classify answers
		}
		ctx, cancel := context.WithTimeout(c.ctx, d)
		defer cancel()
		c.ctx = ctx
	}
	msg, st := c.request()
	if st.code != grpcwire.OK {
		return st
	}
	if c.method == grpcwire.HealthList {
		return c.list() // whose request has no fields
	}
	name, err := grpcwire.ParseHealthRequest(msg)
	if err != nil {
		return healthStatus{grpcwire.Internal, err.Error()} // statuscodes.md: "Error parsing request proto"
	}
	if c.method == grpcwire.HealthWatch {
		return c.watch(name)
	}
	return c.check(name)
}

// request reads the request's one message.
func (c *healthCall) request() ([]byte, healthStatus) {
	var prefix [5]byte
	if _, err := io.ReadFull(c.r.Body, prefix[:]); err != nil {
		return nil, c.unread(err)
	}
	n := binary.BigEndian.Uint32(prefix[1:])
	if n > maxHealthRequest {
		return nil, healthFailure(grpcwire.ResourceExhausted, "a message of %d bytes is larger than any question about health (%d)", n, maxHealthRequest)
	}
	msg := make([]byte, n)
	if _, err := io.ReadFull(c.r.Body, msg); err != nil {
		return nil, c.unread(err)
	}
	if prefix[0] == 0 {
		return msg, healthStatus{}
	}
	return c.decompress(msg)
}

// decompress: gRPC's compression.md wants a server to take what is compressed in a way that it knows, to answer
// UNIMPLEMENTED with its own list of ways if it does not, and INTERNAL where there is a flag and no way.
func (c *healthCall) decompress(msg []byte) ([]byte, healthStatus) {
	switch encoding := c.r.Header.Get("Grpc-Encoding"); encoding {
	case "", "identity":
		return nil, healthStatus{grpcwire.Internal, "the message is marked as compressed, but there is no grpc-encoding"}
	case "gzip":
	default:
		c.w.Header()["Grpc-Accept-Encoding"] = []string{"identity,gzip"}
		return nil, healthFailure(grpcwire.Unimplemented, "grpc-encoding %q is not supported", encoding)
	}
	z, err := gzip.NewReader(bytes.NewReader(msg))
	if err == nil {
		msg, err = io.ReadAll(io.LimitReader(z, maxHealthRequest+1))
	}
	switch {
	case err != nil:
		return nil, healthFailure(grpcwire.Internal, "decompressing the message: %v", err)
	case len(msg) > maxHealthRequest:
		return nil, healthFailure(grpcwire.ResourceExhausted, "the message is larger than any question about health (%d)", maxHealthRequest)
	}
	return msg, healthStatus{}
}

// unread says why there is no message.
func (c *healthCall) unread(err error) healthStatus {
	if c.ctx.Err() != nil {
		return c.interrupted()
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return healthStatus{grpcwire.Internal, "the request has no complete message"}
	}
	return healthFailure(grpcwire.Internal, "reading the request: %v", err)
}

// interrupted is the status of a call whose context has ended. Nobody reads it unless that was the deadline.
func (c *healthCall) interrupted() healthStatus {
	if errors.Is(c.ctx.Err(), context.DeadlineExceeded) {
		return healthStatus{grpcwire.DeadlineExceeded, "the deadline has passed"}
	}
	return healthStatus{grpcwire.Canceled, "the client has gone"}
}

// check answers Check. health.proto: "If the requested service is unknown, the call will fail with status NOT_FOUND."
func (c *healthCall) check(name string) healthStatus {
	status := c.h.report(name)
	if status == grpcwire.ServiceUnknown {
		return healthFailure(grpcwire.NotFound, "unknown service %q", name)
	}
	_ = c.send(grpcwire.AppendHealthResponse(nil, status))
	return healthStatus{}
}

// watch answers Watch. health.proto: "The server will immediately send back a message indicating the current serving
// status. It will then subsequently send a new message whenever the service's serving status changes."
func (c *healthCall) watch(name string) healthStatus {
	if _, wr := caddyhttp.IdleTimeoutsFromContext(c.r.Context()); wr != nil {
		// Caddy's limits are meant for web pages: a Watch moves a few bytes in many days.
		defer wr.Override(healthStall, 0, 0)()
	}
	w := c.h.watch(name)
	defer c.h.unwatch(name, w)
	flusher := http.NewResponseController(c.w)
	var last grpcwire.ServingStatus
	tell := func() (<-chan struct{}, error) {
		status, changed := c.h.now(w)
		if status == last { // which no report is before the first
			return changed, nil
		}
		last = status
		if err := c.send(grpcwire.AppendHealthResponse(nil, status)); err != nil {
			return nil, err
		}
		return changed, flusher.Flush()
	}
	for {
		changed, err := tell()
		if err != nil {
			return c.interrupted()
		}
		select {
		case <-changed:
		case <-c.ctx.Done():
			return c.interrupted()
		case <-c.h.over:
			if _, err := tell(); err != nil { // NOT_SERVING, if there was no time for it before
				return c.interrupted()
			}
			f := shuttingDown()
			return healthStatus{f.Code, f.Message}
		}
	}
}

// list answers List.
func (c *healthCall) list() healthStatus {
	list := c.h.list()
	if len(list) > maxHealthList {
		return healthFailure(grpcwire.ResourceExhausted, "there are %d services, more than the %d that can be listed", len(list), maxHealthList)
	}
	var msg []byte
	for _, l := range list {
		msg = grpcwire.AppendHealthListEntry(msg, l.name, l.status)
	}
	_ = c.send(msg)
	return healthStatus{}
}

// send sends a message, and the response's head before the first.
func (c *healthCall) send(msg []byte) error {
	b := make([]byte, 5, 5+len(msg))
	binary.BigEndian.PutUint32(b[1:], uint32(len(msg)))
	if !c.sent {
		c.sent = true
		c.w.WriteHeader(http.StatusOK)
	}
	_, err := c.w.Write(append(b, msg...))
	return err
}

// finish sends the status: after messages as trailers, else as Trailers-Only.
func (c *healthCall) finish(st healthStatus) {
	header, prefix := c.w.Header(), ""
	if c.sent {
		prefix = http.TrailerPrefix
	}
	header[prefix+"Grpc-Status"] = []string{strconv.FormatUint(uint64(st.code), 10)}
	if st.message != "" {
		header[prefix+"Grpc-Message"] = []string{grpcwire.EncodeMessage(st.message)}
	}
	if !c.sent {
		c.w.WriteHeader(http.StatusOK)
	}
	web.Tidy(c.w, c.r, c.sent)
	if extra, ok := c.r.Context().Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		extra.Add(zap.String("grpc_service", grpcwire.HealthService))
		extra.Add(zap.String("grpc_method", c.method))
		extra.Add(zap.String("grpc_status", st.code.String()))
		if st.message != "" {
			extra.Add(zap.String("grpc_message", st.message))
		}
	}
}
