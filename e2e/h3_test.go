package e2e

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// startH3 runs a proxy in front of the upstream and returns a client of its HTTP/3 port.
func startH3(t *testing.T, upstream string, cfg *quic.Config) *h3Client {
	t.Helper()
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + upstream, CertFile: cert, KeyFile: key})
	return dialH3(t, p.TLS, ca.ClientConfig(), cfg)
}

func outgoing(ctx context.Context, pairs ...string) context.Context {
	return metadata.NewOutgoingContext(ctx, metadata.Pairs(pairs...))
}

// TestH3EarlyAnswer: the upstream ends the call while the client's request is still open. The client is asked to stop
// with H3_NO_ERROR (RFC 9114 section 4.1), since the answer is whole.
func TestH3EarlyAnswer(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	c := startH3(t, b.Addr(), nil)
	for _, tc := range []struct {
		name string
		ctx  context.Context
		code codes.Code
	}{
		{"ok", outgoing(within(t, timeout), backendtest.KeyStatus, "OK"), codes.OK},
		{"header_first", outgoing(within(t, timeout), backendtest.KeyStatus, "NOT_FOUND", backendtest.KeySendHeader, "1"), codes.NotFound},
		{"trailers_only", outgoing(within(t, timeout), backendtest.KeyStatus, "NOT_FOUND"), codes.NotFound},
		{"deadline", outgoing(within(t, timeout), backendtest.KeyBlock, "1", "grpc-timeout", "100m"), codes.DeadlineExceeded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := c.Open(tc.ctx, kinds[3])
			if err != nil {
				t.Fatal(err)
			}
			if err = s.Recv(new(testgrpc.Empty)); status.Code(ended(err)) != tc.code {
				t.Fatalf("the call ended with %v, want %v", err, tc.code)
			}
			for err == nil || errors.Is(err, io.EOF) || status.Code(err) == tc.code { // until nobody takes it any more
				_, err = s.(*h3Stream).body.Write([]byte("more"))
			}
			select {
			case err := <-s.(*h3Stream).sendEnd:
				var h3err *http3.Error
				if !errors.As(err, &h3err) || h3err.ErrorCode != http3.ErrCodeNoError {
					t.Errorf("the request was stopped with %v, want H3_NO_ERROR", err)
				}
			case <-time.After(timeout):
				t.Error("the request goes on")
			}
		})
	}
	eventually(t, "no call is left", func() bool { return b.Active() == 0 })
}

// TestH3SilentUpstream: the upstream says nothing at all, so the deadline is the proxy's alone.
func TestH3SilentUpstream(t *testing.T) {
	wiretest.CheckLeaks(t)
	l := wiretest.Listen(t)
	c := startH3(t, l.Addr(), nil)
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			s, err := c.Open(outgoing(within(t, timeout), "grpc-timeout", "100m"), k)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Send(k.requests()[0]); err != nil {
				t.Fatal(err)
			}
			err = s.Recv(new(testgrpc.Empty))
			if status.Code(err) != codes.DeadlineExceeded || status.Convert(err).Message() != "the deadline ran out at the proxy" {
				t.Errorf("the call ended with %v", err)
			}
		})
	}
}

// TestH3StalledReader: a client has stopped reading when the call's deadline comes. The proxy cannot get a status through, but what the
// client reads later must not look like the end of a good answer.
func TestH3StalledReader(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	const window = 64 << 10
	c := startH3(t, b.Addr(), &quic.Config{
		InitialStreamReceiveWindow: window, MaxStreamReceiveWindow: window,
		InitialConnectionReceiveWindow: 2 * window, MaxConnectionReceiveWindow: 2 * window,
	})
	// Whole messages of a size that fits the proxy's reads: each write ends where a message does.
	for _, size := range []int32{100, 16<<10 - 13, 1 << 20} {
		s, err := c.Open(outgoing(within(t, timeout), "grpc-timeout", "300m"), kinds[2])
		if err != nil {
			t.Fatal(err)
		}
		req := new(testgrpc.StreamingOutputCallRequest)
		for n := int32(0); n < 4<<20 && len(req.ResponseParameters) < 20_000; n += size {
			req.ResponseParameters = append(req.ResponseParameters, &testgrpc.ResponseParameters{Size: size})
		}
		if err := s.Send(req); err != nil {
			t.Fatal(err)
		}
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Header(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the upstream's call is over", func() bool { return b.Calls().Total() > 0 && b.Active() == 0 })
		var n int64
		var got error
		for got == nil {
			m := new(testgrpc.StreamingOutputCallResponse)
			if got = s.Recv(m); got == nil {
				n++
			}
		}
		var h3err *http3.Error
		switch {
		case errors.As(got, &h3err) && h3err.ErrorCode == http3.ErrCodeInternalError: // reset
		case status.Code(got) == codes.DeadlineExceeded: // there was room for a status after all
		default:
			t.Errorf("messages of %d bytes: after %d of %d the answer ended with %v", size, n, len(req.ResponseParameters), got)
		}
		t.Logf("messages of %d bytes: after %d of %d the answer ended with %v", size, n, len(req.ResponseParameters), got)
		_ = s.(*h3Stream).resp.Body.Close()
	}
}

// TestH3HalfCancel: a client that only resets its request (RESET_STREAM without STOP_SENDING) has cancelled the call too.
func TestH3HalfCancel(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	c := startH3(t, b.Addr(), nil)
	s, err := c.Open(within(t, timeout), kinds[3])
	if err != nil {
		t.Fatal(err)
	}
	begin(t, s, kinds[3])
	start := time.Now()
	// http3's client resets the request when its body fails.
	_ = s.(*h3Stream).body.CloseWithError(io.ErrUnexpectedEOF)
	select {
	case x := <-b.Cancelled():
		t.Logf("the backend knew after %v", x.At.Sub(start))
	case <-time.After(timeout):
		t.Fatal("the backend's call goes on")
	}
}
