package backendtest

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
)

// Request metadata that tells the backend how to answer a call of [Service]. What is not asked for does not happen. The
// order is: header at once, delay, block, status, the method itself, late status.
const (
	// KeyStatus ends the call with a status, a number or a name, before the method has done anything: the answer is
	// Trailers-Only, unless KeySendHeader is given too. OK skips the method, which makes the answer of a unary one
	// an empty message.
	KeyStatus = "x-test-status"
	// KeyLate, with any value, puts that status behind what the method does.
	KeyLate = "x-test-late"
	// KeyMessage and KeyMessageBin are the status's message, the latter for what is not printable ASCII.
	KeyMessage    = "x-test-message"
	KeyMessageBin = "x-test-message-bin"
	// KeyDetails adds a google.rpc.ErrorInfo with this reason and the domain "backendtest" to the status.
	KeyDetails = "x-test-details"
	// KeyHeader and KeyTrailer, "name=value", add a field of header or trailer metadata, the same with -bin one
	// with any bytes (whose name should end in -bin, then). They may be repeated.
	KeyHeader     = "x-test-header"
	KeyHeaderBin  = "x-test-header-bin"
	KeyTrailer    = "x-test-trailer"
	KeyTrailerBin = "x-test-trailer-bin"
	// KeyTrailerSize adds a trailer x-test-filler of so many bytes.
	KeyTrailerSize = "x-test-trailer-size"
	// KeySendHeader, with any value, sends the response's header before anything else.
	KeySendHeader = "x-test-send-header"
	// KeyDelay waits, for a duration such as 50ms.
	KeyDelay = "x-test-delay"
	// KeyBlock, with any value, waits until the call is cancelled; see [Backend.Cancelled].
	KeyBlock = "x-test-block-until-cancel"

	// KeyBackend is the field of the response's header and of its trailers that has the backend's name. A
	// Trailers-Only answer has it once.
	KeyBackend = "x-test-backend"
	// KeyFiller is the trailer that KeyTrailerSize asks for.
	KeyFiller = "x-test-filler"

	// grpc-go's interop client expects these back, in the header and in the trailers.
	interopEchoInitial  = "x-grpc-test-echo-initial"
	interopEchoTrailing = "x-grpc-test-echo-trailing-bin"
)

// script is what a call's metadata asks for.
type script struct {
	status          *status.Status // nil: the method's own.
	late            bool
	header, trailer metadata.MD
	sendHeader      bool
	delay           time.Duration
	block           bool
}

func (b *Backend) parse(md metadata.MD) (*script, error) {
	s := &script{
		header: metadata.Pairs(KeyBackend, b.name), trailer: metadata.Pairs(KeyBackend, b.name),
		late: has(md, KeyLate), sendHeader: has(md, KeySendHeader), block: has(md, KeyBlock), delay: b.opts.Delay,
	}
	for _, k := range []string{KeyHeader, KeyHeaderBin} {
		if err := addPairs(s.header, md[k]); err != nil {
			return nil, err
		}
	}
	for _, k := range []string{KeyTrailer, KeyTrailerBin} {
		if err := addPairs(s.trailer, md[k]); err != nil {
			return nil, err
		}
	}
	if v := md.Get(interopEchoInitial); len(v) > 0 {
		s.header.Append(interopEchoInitial, v...)
	}
	if v := md.Get(interopEchoTrailing); len(v) > 0 {
		s.trailer.Append(interopEchoTrailing, v...)
	}
	if v := first(md, KeyTrailerSize); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("%s: %q is no size", KeyTrailerSize, v)
		}
		s.trailer.Append(KeyFiller, strings.Repeat("x", n))
	}
	if v := first(md, KeyDelay); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", KeyDelay, err)
		}
		s.delay += d
	}
	if v := first(md, KeyStatus); v != "" {
		code, err := grpcwire.ParseCode(v)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", KeyStatus, err)
		}
		s.status = status.New(codes.Code(code), first(md, KeyMessage)+first(md, KeyMessageBin))
		if reason := first(md, KeyDetails); reason != "" {
			s.status, err = s.status.WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: "backendtest"})
			if err != nil {
				return nil, fmt.Errorf("%s: %w", KeyDetails, err)
			}
		}
	}
	return s, nil
}

func has(md metadata.MD, key string) bool { return len(md[key]) > 0 }

func first(md metadata.MD, key string) string {
	if v := md[key]; len(v) > 0 {
		return v[0]
	}
	return ""
}

func addPairs(to metadata.MD, pairs []string) error {
	for _, p := range pairs {
		k, v, ok := strings.Cut(p, "=")
		if !ok {
			return fmt.Errorf("%q is not name=value", p)
		}
		to.Append(k, v)
	}
	return nil
}

// answer runs a call of the service by its script; run is the method itself.
func (b *Backend) answer(ctx context.Context, method string, trailer func(metadata.MD), header func(metadata.MD, bool) error, run func() error) error {
	c, end := b.begin(ctx, method)
	defer end()
	s, err := b.parse(c.Metadata)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	trailer(s.trailer)
	if s.sendHeader {
		if err := header(s.header, true); err != nil {
			return err
		}
	}
	if b.opts.Hook != nil {
		if err := b.opts.Hook(c); err != nil {
			return err
		}
	}
	if err := sleep(ctx, s.delay); err != nil {
		return err
	}
	if s.block {
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	}
	if s.status != nil && !s.late {
		return s.status.Err()
	}
	// Not before: header metadata that is set makes grpc-go send a header even before an immediate error.
	if !s.sendHeader {
		if err := header(s.header, false); err != nil {
			return err
		}
	}
	if err := run(); err != nil || s.status == nil {
		return err
	}
	return s.status.Err()
}

// sleep waits, at most until the call is over.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

func (b *Backend) count(method string) (ours bool) {
	if n := b.recorder.counts[method]; n != nil {
		n.Add(1)
	}
	return strings.HasPrefix(method, "/"+Service+"/")
}

// unary is the interceptor of unary calls.
func (b *Backend) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
	if !b.count(info.FullMethod) {
		return h(ctx, req)
	}
	err = b.answer(ctx, info.FullMethod,
		func(md metadata.MD) { _ = grpc.SetTrailer(ctx, md) },
		func(md metadata.MD, send bool) error {
			if send {
				return grpc.SendHeader(ctx, md)
			}
			return grpc.SetHeader(ctx, md)
		},
		func() error {
			resp, err = h(ctx, req)
			return err
		})
	return resp, err
}

// stream is the interceptor of all others.
func (b *Backend) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	if !b.count(info.FullMethod) {
		return h(srv, ss)
	}
	return b.answer(ss.Context(), info.FullMethod, ss.SetTrailer,
		func(md metadata.MD, send bool) error {
			if send {
				return ss.SendHeader(md)
			}
			return ss.SetHeader(md)
		},
		func() error { return h(srv, ss) })
}
