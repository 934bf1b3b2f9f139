package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(diary)) }

// diary is a policy that writes down what it is told about calls, and adds a field to answers.
type diary struct{ first selection.First }

func (*diary) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.grpc_proxy.selection_policies.diary", New: func() caddy.Module { return new(diary) }}
}

func (*diary) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	return nil
}

func (p *diary) Build(s *upstream.Snapshot) selection.Picker {
	notes.mu.Lock()
	defer notes.mu.Unlock()
	return &diaryPicker{p.first.Build(s), s, &selection.Audience{Learner: p, Needs: notes.needs, Annotator: p}}
}

type diaryPicker struct {
	first    selection.Picker
	s        *upstream.Snapshot
	audience *selection.Audience
}

// page is the token of an endpoint's picks.
func page(index int) uint64 { return 1000 + uint64(index) }

func (p *diaryPicker) Pick(in selection.PickInfo) (selection.Pick, bool) {
	pick, ok := p.first.Pick(in)
	pick.Audience, pick.Token = p.audience, page(pick.Index)
	return pick, ok
}

func (p *diaryPicker) Interests(f func(selection.Pick)) {
	for i := range p.s.Endpoints {
		index := p.s.Endpoints[i].Index
		f(selection.Pick{Index: index, Audience: p.audience, Token: page(index)})
	}
}

func (*diary) Responded(_ selection.Pick, latency time.Duration) {
	notes.mu.Lock()
	defer notes.mu.Unlock()
	notes.responded = append(notes.responded, latency)
}

func (*diary) Done(p selection.Pick, a *call.Attempt) {
	notes.mu.Lock()
	defer notes.mu.Unlock()
	n := note{index: p.Index, token: p.Token, Attempt: *a}
	n.LoadReport = slices.Clone(a.LoadReport)
	notes.done = append(notes.done, n)
}

func (*diary) Annotate(c *call.Call, p selection.Pick, add func(name, value string)) {
	add("x-picked", fmt.Sprint(p.Index, " ", c.Method))
}

type note struct {
	index int
	token uint64
	call.Attempt
}

// notes are the one diary of the process; tests with it do not run in parallel.
var notes struct {
	mu        sync.Mutex
	needs     selection.Needs
	responded []time.Duration
	done      []note
}

func freshDiary(needs selection.Needs) {
	notes.mu.Lock()
	defer notes.mu.Unlock()
	notes.needs, notes.responded, notes.done = needs, nil, nil
}

// read waits until n attempts were written down and returns them and the answers' latencies.
func read(t *testing.T, n int) (done []note, responded []time.Duration) {
	t.Helper()
	eventually(t, fmt.Sprint(n, " attempts are in the diary"), func() bool {
		notes.mu.Lock()
		defer notes.mu.Unlock()
		done, responded = slices.Clone(notes.done), slices.Clone(notes.responded)
		return len(done) >= n
	})
	return done, responded
}

var everything = selection.Needs{Attempts: true, FirstMessage: true, LoadReports: true, Work: true}

// TestLearner: what a policy is told about calls of all kinds and ends.
func TestLearner(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{})
	for _, tc := range []struct {
		name      string
		to        string
		call      func(t *testing.T, c testgrpc.TestServiceClient) error
		client    codes.Code
		want      []call.Attempt // Code, EndedBy, Source and messages
		responded int
		slow      bool // the answer takes at least 50 ms, counted from the request's last piece
	}{
		{
			name: "unary", to: b.Addr(),
			call: func(t *testing.T, c testgrpc.TestServiceClient) error {
				_, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty))
				return err
			},
			want:      []call.Attempt{{SentMessages: 1, ReceivedMessages: 1}},
			responded: 1,
		},
		{
			name: "status of the application", to: b.Addr(),
			call: func(t *testing.T, c testgrpc.TestServiceClient) error {
				_, err := c.UnaryCall(within(t, timeout), &testgrpc.SimpleRequest{ResponseStatus: &testgrpc.EchoStatus{Code: int32(codes.NotFound)}})
				return err
			},
			client:    codes.NotFound,
			want:      []call.Attempt{{Code: grpcwire.NotFound, SentMessages: 1}},
			responded: 1,
		},
		{
			name: "endpoint that is not there", to: proxytest.FreeAddress(t) + " " + b.Addr(),
			call: func(t *testing.T, c testgrpc.TestServiceClient) error {
				_, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty))
				return err
			},
			want: []call.Attempt{
				{Code: grpcwire.Unavailable, Source: call.SourceProxy},
				{SentMessages: 1, ReceivedMessages: 1},
			},
			responded: 1,
		},
		{
			name: "cancelled stream", to: b.Addr(),
			call: func(t *testing.T, c testgrpc.TestServiceClient) error {
				ctx, cancel := context.WithCancel(t.Context())
				s, err := c.FullDuplexCall(ctx)
				if err != nil {
					t.Fatal(err)
				}
				pause := time.After(100 * time.Millisecond) // the client has nothing to say at first
				<-pause
				for range 2 {
					if err := s.Send(&testgrpc.StreamingOutputCallRequest{ResponseParameters: []*testgrpc.ResponseParameters{{Size: 1, IntervalUs: 50_000}}}); err != nil {
						t.Fatal(err)
					}
					if _, err := s.Recv(); err != nil {
						t.Fatal(err)
					}
				}
				cancel()
				_, err = s.Recv()
				return err
			},
			client:    codes.Canceled,
			want:      []call.Attempt{{Code: grpcwire.Canceled, EndedBy: call.EndedByClient, Source: call.SourceProxy, SentMessages: 2, ReceivedMessages: 2}},
			responded: 1, slow: true,
		},
		{
			name: "deadline", to: b.Addr(),
			call: func(t *testing.T, c testgrpc.TestServiceClient) error {
				s, err := c.FullDuplexCall(within(t, time.Second)) // it must have come to the upstream by then
				if err != nil {
					return err
				}
				_, err = s.Recv()
				return err
			},
			client: codes.DeadlineExceeded,
			want:   []call.Attempt{{Code: grpcwire.DeadlineExceeded, EndedBy: call.EndedByDeadline, Source: call.SourceProxy}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			freshDiary(everything)
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + tc.to + " {\n\tlb_policy diary\n}"})
			err := tc.call(t, client(t, p.H2C))
			if status.Code(err) != tc.client {
				t.Fatalf("the client got %v, want %v", err, tc.client)
			}
			done, responded := read(t, len(tc.want))
			if len(done) != len(tc.want) {
				t.Fatalf("%d attempts: %+v", len(done), done)
			}
			for i, w := range tc.want {
				g := done[i]
				// The client may notice the deadline first, and cancel.
				if g.Code != w.Code && (tc.name != "deadline" || g.Code != grpcwire.Canceled) || tc.name != "deadline" && (g.EndedBy != w.EndedBy || g.Source != w.Source) ||
					g.SentMessages != w.SentMessages || g.ReceivedMessages != w.ReceivedMessages {
					t.Errorf("attempt %d: %+v, want %+v", i, g, w)
				}
				if g.index != i || g.token != page(i) || g.Start.IsZero() || g.Latency <= 0 || g.Latency > time.Minute {
					t.Errorf("attempt %d: index %d, token %d, start %v, latency %v", i, g.index, g.token, g.Start, g.Latency)
				}
			}
			if tc.name != "deadline" && len(responded) != tc.responded {
				t.Errorf("%d answers began, want %d", len(responded), tc.responded)
			}
			for _, d := range responded {
				if d <= 0 || tc.slow && (d < 50*time.Millisecond || d > done[0].Latency-100*time.Millisecond) {
					t.Errorf("an answer took %v of %v", d, done[0].Latency)
				}
			}
		})
	}
}

// TestLoadReports: a policy that wants them gets the reports that real servers put into trailers; clients see them only if
// it says so.
func TestLoadReports(t *testing.T) {
	wiretest.CheckLeaks(t)
	b := backendtest.Start(t, backendtest.Options{ServerOptions: []grpc.ServerOption{
		orca.CallMetricsServerOption(nil), grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			orca.CallMetricsRecorderFromContext(ctx).SetApplicationUtilization(0.25)
			return h(ctx, req)
		}),
	}})
	for _, tc := range []struct {
		name           string
		needs          selection.Needs
		report, client bool
	}{
		{"nobody asks", selection.Needs{Attempts: true}, false, true},
		{"asked", selection.Needs{Attempts: true, LoadReports: true}, true, false},
		{"forwarded", selection.Needs{Attempts: true, LoadReports: true, ForwardLoadReports: true}, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			freshDiary(tc.needs)
			p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + " {\n\tlb_policy diary\n}"})
			var trailer metadata.MD
			if _, err := client(t, p.H2C).EmptyCall(within(t, timeout), new(testgrpc.Empty), grpc.Trailer(&trailer)); err != nil {
				t.Fatal(err)
			}
			done, _ := read(t, 1)
			if got := len(done[0].LoadReport) > 0; got != tc.report {
				t.Errorf("the policy got %x", done[0].LoadReport)
			}
			if got := len(trailer["endpoint-load-metrics-bin"]) > 0; got != tc.client {
				t.Errorf("the client got %v", trailer)
			}
		})
	}
}

// TestAnnotator: what a policy adds reaches the client, with messages and without.
func TestAnnotator(t *testing.T) {
	wiretest.CheckLeaks(t)
	freshDiary(selection.Needs{})
	b := backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + " {\n\tlb_policy diary\n}"})
	c := client(t, p.H2C)
	var header metadata.MD
	if _, err := c.EmptyCall(within(t, timeout), new(testgrpc.Empty), grpc.Header(&header)); err != nil {
		t.Fatal(err)
	}
	if got := header["x-picked"]; !slices.Equal(got, []string{"0 EmptyCall"}) {
		t.Errorf("with a message: %q", got)
	}
	header = nil
	if _, err := c.UnimplementedCall(within(t, timeout), new(testgrpc.Empty), grpc.Header(&header)); status.Code(err) != codes.Unimplemented {
		t.Fatal(err)
	}
	if got := header["x-picked"]; !slices.Equal(got, []string{"0 UnimplementedCall"}) {
		t.Errorf("Trailers-Only: %q", got)
	}
}

// TestLearnerWithin: a policy of another module hears of the calls of a session too, which sticky has chosen, and adds to their
// answers.
func TestLearnerWithin(t *testing.T) {
	wiretest.CheckLeaks(t)
	freshDiary(selection.Needs{Attempts: true})
	a, b := backendtest.Start(t, backendtest.Options{}), backendtest.Start(t, backendtest.Options{})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + a.Addr() + " " + b.Addr() + " {\n\tlb_policy sticky {\n\t\tmetadata x-session\n\t\tfallback diary\n\t}\n}"})
	c := client(t, p.H2C)
	ctx := within(t, timeout)
	for i := range 3 {
		var header metadata.MD
		if _, err := c.EmptyCall(ctx, new(testgrpc.Empty), grpc.Header(&header)); err != nil {
			t.Fatal(err)
		}
		if got := header["x-picked"]; !slices.Equal(got, []string{"0 EmptyCall"}) {
			t.Errorf("call %d: the policy within added %q", i, got)
		}
		token := header["x-session"]
		if (len(token) == 1) != (i == 0) {
			t.Fatalf("call %d: tokens %q", i, token)
		}
		if i == 0 {
			ctx = metadata.AppendToOutgoingContext(ctx, "x-session", token[0])
		}
		if done, _ := read(t, i+1); done[i].index != 0 || done[i].token != page(0) {
			t.Errorf("call %d: the policy within heard of %+v", i, done[i])
		}
	}
}

// TestWork: messages and bytes of open streams are counted as they pass.
func TestWork(t *testing.T) {
	wiretest.CheckLeaks(t)
	freshDiary(selection.Needs{Work: true})
	b := backendtest.Start(t, backendtest.Options{})
	l, name := newList(t)
	l.backends(b)
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy {\n\tdynamic told " + name + "\n\tlb_policy diary\n}"})
	s, err := client(t, p.H2C).FullDuplexCall(within(t, timeout))
	if err != nil {
		t.Fatal(err)
	}
	var work *upstream.Work
	for i := range 3 {
		if err := s.Send(&testgrpc.StreamingOutputCallRequest{ResponseParameters: []*testgrpc.ResponseParameters{{Size: 1000}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		work = stateOf(t, b.Addr()).Work()
		eventually(t, "the work of an open stream is counted", func() bool {
			return work.Messages() == uint64(2*(i+1)) && work.Bytes() > uint64(1000*(i+1))
		})
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
}

// stateOf is the state of the endpoint at the address.
func stateOf(t *testing.T, addr string) (s *upstream.State) {
	t.Helper()
	upstream.States.Range(func(key string, is *upstream.State) bool {
		if strings.HasPrefix(key, "tcp/"+addr+" ") {
			s = is
		}
		return s == nil
	})
	if s == nil {
		t.Fatalf("no endpoint %s", addr)
	}
	return s
}
