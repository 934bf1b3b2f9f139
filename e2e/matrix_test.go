package e2e

import (
	"context"
	"errors"
	"reflect"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

const (
	// shortDeadline is what calls get that are to run into it.
	shortDeadline = 300 * time.Millisecond
	// cancelBound is how soon the upstream learns that a call is over. On a quiet machine it takes about a
	// millisecond, and a tenth of a second is promised; tests run on busy ones.
	cancelBound = time.Second
)

// rig is a Caddy with one backend behind, and the ways to it.
type rig struct {
	t       *testing.T
	p       *proxytest.Proxy
	backend *backendtest.Backend
	witness *witness
	open    opener
	front   string
	h3      bool
}

// outcome is a way for a call to end.
type outcome struct {
	name string
	run  func(r *rig, k kind)
}

var outcomes = []outcome{
	{"ok", (*rig).ok},
	{"trailers", (*rig).trailers},
	{"trailers_only", (*rig).trailersOnly},
	{"crash", (*rig).crash},
	{"reset", (*rig).reset},
	{"deadline", (*rig).deadline},
	{"cancel", (*rig).cancel},
}

// TestMatrix: each kind of RPC, ended in each way, over each protocol in front.
func TestMatrix(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	wiretest.CheckLeaks(t)
	w := new(witness)
	b := backendtest.Start(t, backendtest.Options{Name: "b", ServerOptions: w.options()})
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	p := proxytest.Start(t, proxytest.Options{
		Site: "@aborting header x-aborting *\n" +
			"grpc_proxy @aborting " + startAborting(t) + "\n" +
			"grpc_proxy " + b.Addr(),
		CertFile: cert, KeyFile: key,
	})
	for _, front := range []struct {
		name string
		open opener
	}{
		{"h2c", openGRPC(dial(t, p.H2C, nil))},
		{"tls", openGRPC(dial(t, p.TLS, credentials.NewTLS(ca.ClientConfig())))},
		{"h3", dialH3(t, p.TLS, ca.ClientConfig(), nil).Open},
	} {
		t.Run(front.name, func(t *testing.T) {
			for _, k := range kinds {
				t.Run(k.name, func(t *testing.T) {
					for _, o := range outcomes {
						t.Run(o.name, func(t *testing.T) {
							w.reset()
							o.run(&rig{t, p, b, w, front.open, front.name, front.name == "h3"}, k)
							eventually(t, "the backend has no call left", func() bool { return b.Active() == 0 })
						})
					}
				})
			}
		})
	}
}

var (
	requestMetadata = metadata.Pairs("x-req-multi", "one", "x-req-multi", "two, three", "x-req-bin", "\x00\xff\x01")
	wantHeader      = metadata.MD{
		"content-type": {"application/grpc"}, backendtest.KeyBackend: {"b"},
		"x-multi": {"a", "b, c"}, "x-raw-bin": {"\x00\xfe\xff", "second"},
	}
	wantTrailer = metadata.MD{backendtest.KeyBackend: {"b"}, "x-end": {"1", "2"}, "x-end-bin": {"\xff\x00"}}
)

// call begins a call with the request metadata and what makes the backend answer with the response metadata.
func (r *rig) call(ctx context.Context, k kind, more ...string) stream {
	r.t.Helper()
	md := metadata.Join(requestMetadata, metadata.Pairs(
		backendtest.KeyHeader, "x-multi=a", backendtest.KeyHeader, "x-multi=b, c",
		backendtest.KeyHeaderBin, "x-raw-bin=\x00\xfe\xff", backendtest.KeyHeaderBin, "x-raw-bin=second",
		backendtest.KeyTrailer, "x-end=1", backendtest.KeyTrailer, "x-end=2", backendtest.KeyTrailerBin, "x-end-bin=\xff\x00",
	), metadata.Pairs(more...))
	s, err := r.open(metadata.NewOutgoingContext(ctx, md), k)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// start brings a call into its middle, where the response header and messages each way were exchanged.
func (r *rig) start(ctx context.Context, k kind, more ...string) (s stream) {
	r.t.Helper()
	more = append(more, backendtest.KeySendHeader, "1")
	if !k.client && !k.server {
		more = append(more, keyStall, "1")
	}
	s = r.call(ctx, k, more...)
	got, sent := begin(r.t, s, k)
	sameMessages(r.t, "responses", got, k.halfway())
	r.checkHeader(s)
	eventually(r.t, "the backend has the requests", func() bool { return len(r.witness.seen()) == len(sent) })
	sameMessages(r.t, "requests", r.witness.seen(), sent)
	return s
}

// count returns a check that the backend was called once meanwhile.
func (r *rig) count() (check func(k kind)) {
	before := r.backend.Calls().Total()
	return func(k kind) {
		r.t.Helper()
		if n := r.backend.Calls().Total() - before; n != 1 {
			r.t.Errorf("the backend was called %d times, want once", n)
			return
		}
		last := r.backend.Last()
		if last.Method != k.path() {
			r.t.Errorf("the backend was called as %q", last.Method)
		}
		for name, want := range requestMetadata {
			if got := last.Metadata[name]; !reflect.DeepEqual(got, want) {
				r.t.Errorf("the backend saw %s: %q, want %q", name, got, want)
			}
		}
	}
}

func (r *rig) checkHeader(s stream) {
	r.t.Helper()
	if got, err := s.Header(); err != nil || len(got) == 0 {
		r.t.Fatalf("no header, error %v; the call ended with %v", err, s.Recv(new(testgrpc.Empty)))
	} else if !reflect.DeepEqual(got, wantHeader) {
		r.t.Errorf("header %v, want %v", got, wantHeader)
	}
}

func (r *rig) checkTrailer(s stream, want metadata.MD) {
	r.t.Helper()
	got := s.Trailer()
	got.Delete("grpc-status-details-bin") // in the status
	if !(len(got) == 0 && len(want) == 0) && !reflect.DeepEqual(got, want) {
		r.t.Errorf("trailers %v, want %v", got, want)
	}
}

func (r *rig) checkStatus(err error, code codes.Code, message string) {
	r.t.Helper()
	if got, ok := status.FromError(err); !ok || got.Code() != code || got.Message() != message {
		r.t.Errorf("the call ended with %v, want %v %q", err, code, message)
	}
}

// checkNoInfo: a status that follows from the deadline, or from what the upstream sent, has no details of the proxy's.
func (r *rig) checkNoInfo(err error) {
	r.t.Helper()
	if d := status.Convert(err).Details(); len(d) > 0 {
		r.t.Errorf("the details are %v, want none", d)
	}
}

// checkInfo looks for an ErrorInfo in the status's details.
func (r *rig) checkInfo(err error, domain, reason string) {
	r.t.Helper()
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == domain && info.GetReason() == reason {
			return
		}
	}
	r.t.Errorf("the details are %v, want an ErrorInfo %s of %s", status.Convert(err).Details(), reason, domain)
}

func (r *rig) ok(k kind) {
	check := r.count()
	s := r.call(within(r.t, timeout), k)
	got, err := talk(s, k)
	if err != nil {
		r.t.Fatalf("the call failed: %v", err)
	}
	sameMessages(r.t, "responses", got, k.responses("b"))
	sameMessages(r.t, "requests", r.witness.seen(), k.requests())
	r.checkHeader(s)
	r.checkTrailer(s, wantTrailer)
	check(k)
	last := r.backend.Last()
	if last.HasDeadline == r.h3 || last.HasDeadline && (last.Timeout > timeout || last.Timeout < timeout/2) {
		r.t.Errorf("the backend's deadline: %v, %v", last.HasDeadline, last.Timeout)
	}
	scheme := "https"
	if r.front == "h2c" {
		scheme = "http"
	}
	if got := last.Metadata.Get("x-forwarded-proto"); len(got) != 1 || got[0] != scheme {
		r.t.Errorf("x-forwarded-proto %q, want %q", got, scheme)
	}
}

const oddMessage = "Störung:\t100 % \n\x7f ∞"

func (r *rig) trailers(k kind) {
	check := r.count()
	s := r.call(within(r.t, timeout), k, backendtest.KeyStatus, "FAILED_PRECONDITION", backendtest.KeyLate, "1",
		backendtest.KeySendHeader, "1", backendtest.KeyMessageBin, oddMessage, backendtest.KeyDetails, "ODD")
	got, err := talk(s, k)
	r.checkStatus(err, codes.FailedPrecondition, oddMessage)
	r.checkInfo(err, "backendtest", "ODD")
	// A unary method that fails has no response. One with a stream of requests has; grpc-go's client does not show it.
	switch {
	case k.server || k.client && r.h3:
		sameMessages(r.t, "responses", got, k.responses("b"))
	default:
		sameMessages(r.t, "responses", got, nil)
	}
	sameMessages(r.t, "requests", r.witness.seen(), k.requests())
	r.checkHeader(s)
	r.checkTrailer(s, wantTrailer)
	check(k)
}

func (r *rig) trailersOnly(k kind) {
	check := r.count()
	s := r.call(within(r.t, timeout), k, backendtest.KeyStatus, "RESOURCE_EXHAUSTED", backendtest.KeyMessageBin, oddMessage,
		backendtest.KeyDetails, "ODD")
	var (
		got []proto.Message
		err error
	)
	if k.client { // the answer comes before the request has begun
		_, err = recv(s, k, nil)
	} else {
		got, err = talk(s, k)
	}
	r.checkStatus(err, codes.ResourceExhausted, oddMessage)
	r.checkInfo(err, "backendtest", "ODD")
	sameMessages(r.t, "responses", got, nil)
	if md, err := s.Header(); len(md) > 0 || err != nil {
		r.t.Errorf("not Trailers-Only: header %v, error %v", md, err)
	}
	want := wantTrailer.Copy()
	want.Set("content-type", "application/grpc")
	r.checkTrailer(s, want)
	check(k)
}

// crash: the upstream's connection breaks in the middle of a call.
func (r *rig) crash(k kind) {
	check := r.count()
	s := r.start(within(r.t, timeout), k)
	crashed := time.Now()
	r.backend.CloseConns()
	got, err := recv(s, k, nil)
	if status.Code(err) != codes.Unavailable {
		r.t.Errorf("the call ended with %v, want UNAVAILABLE", err)
	}
	r.checkInfo(err, "grpc_proxy", "UPSTREAM_CONNECTION_LOST")
	sameMessages(r.t, "responses", got, nil)
	r.checkTrailer(s, nil)
	check(k)
	r.checkCancelled(crashed, context.Canceled)
}

// reset: the upstream resets the stream in the middle of a call.
func (r *rig) reset(k kind) {
	s := r.call(within(r.t, timeout), k, "x-aborting", "1")
	got, err := talk(s, k)
	r.checkStatus(err, codes.Internal, "the upstream reset the stream with INTERNAL_ERROR")
	r.checkNoInfo(err)
	var want []proto.Message
	if k.server {
		want = k.responses("")[:1]
	}
	sameMessages(r.t, "responses", got, want)
	if md, err := s.Header(); err != nil || !reflect.DeepEqual(md, metadata.MD{"content-type": {"application/grpc"}, "x-aborting": {"yes"}}) {
		r.t.Errorf("header %v, error %v", md, err)
	}
	r.checkTrailer(s, nil)
}

func (r *rig) deadline(k kind) {
	check := r.count()
	start := time.Now()
	ctx, more := within(r.t, timeout), []string{"grpc-timeout", "300m"}
	if !r.h3 { // grpc-go keeps the deadline itself, and may be faster than the proxy
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, shortDeadline)
		defer cancel()
		more = nil
	}
	s := r.start(ctx, k, more...)
	got, err := recv(s, k, nil)
	if took := time.Since(start); took < shortDeadline-time.Millisecond || took > shortDeadline+cancelBound {
		r.t.Errorf("the call ended after %v, its deadline was %v", took, shortDeadline)
	}
	sameMessages(r.t, "responses", got, nil)
	switch {
	case !r.h3:
		if status.Code(err) != codes.DeadlineExceeded {
			r.t.Errorf("the call ended with %v, want DEADLINE_EXCEEDED", err)
		}
	case status.Convert(err).Message() == "context deadline exceeded": // the backend was faster than the proxy
		r.checkStatus(err, codes.DeadlineExceeded, "context deadline exceeded")
		r.checkTrailer(s, wantTrailer)
	default:
		r.checkStatus(err, codes.DeadlineExceeded, "the deadline ran out at the proxy")
		r.checkNoInfo(err)
		r.checkTrailer(s, nil)
	}
	r.checkCancelled(start.Add(shortDeadline), nil)
	check(k)
	if last := r.backend.Last(); !last.HasDeadline || last.Timeout <= 0 || last.Timeout > shortDeadline {
		r.t.Errorf("the backend's deadline: %v, %v; the client's was %v", last.HasDeadline, last.Timeout, shortDeadline)
	}
}

func (r *rig) cancel(k kind) {
	check := r.count()
	ctx, cancel := context.WithCancel(within(r.t, timeout))
	defer cancel()
	s := r.start(ctx, k)
	cancelled := time.Now()
	cancel()
	if _, err := recv(s, k, nil); !r.h3 && status.Code(err) != codes.Canceled || err == nil {
		r.t.Errorf("the call ended with %v, want CANCELLED", err)
	}
	r.checkCancelled(cancelled, context.Canceled)
	check(k)
}

// checkCancelled waits for the backend to see the running call cancelled.
func (r *rig) checkCancelled(since time.Time, want error) {
	r.t.Helper()
	select {
	case c := <-r.backend.Cancelled():
		if want != nil && !errors.Is(c.Err, want) {
			r.t.Errorf("the backend's call ended with %v, want %v", c.Err, want)
		}
		took := c.At.Sub(since)
		r.t.Logf("the backend knew %.1f ms later", float64(took)/float64(time.Millisecond))
		if took > cancelBound {
			r.t.Errorf("that is more than %v", cancelBound)
		}
	case <-time.After(timeout):
		r.t.Error("the backend's call goes on")
	}
}
