package e2e

import (
	"context"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
)

// fieldFlow are faults of windows, of what is held for slow readers, and of fields' values.
var fieldFlow = []fieldCase{
	{
		"blanks_around_values",
		"a service that echoed a blank took its upstream out for everybody: grpc-go sends grpc-message and metadata with blanks at their ends as they are; RFC 9110 section 5.5 excludes them",
		blanksAroundValues,
	},
}

func blanksAroundValues(t *testing.T) {
	b := backendtest.Start(t, backendtest.Options{Hook: func(c *backendtest.Call) error {
		if v := c.Metadata.Get("x-say"); len(v) > 0 {
			if pad := c.Metadata.Get("x-pad"); len(pad) != 1 || pad[0] != "p" {
				t.Errorf("the upstream got %q", pad)
			}
			if err := grpc.SetHeader(c.Context, metadata.Pairs("x-head", "h ", "x-blank", " ")); err != nil {
				return err
			}
			if err := grpc.SetTrailer(c.Context, metadata.Pairs("x-trail", "\tt")); err != nil {
				return err
			}
			if v[0] == "error" {
				return status.Error(codes.NotFound, "no such user: ")
			}
		}
		return nil
	}})
	p := proxytest.Start(t, proxytest.Options{Site: "grpc_proxy " + b.Addr() + " {\n\tfail_duration 1m\n\toutlier_detection {\n\t\tconsecutive_failures 1\n\t}\n}"})
	c := client(t, p.H2C)
	for range 3 {
		for say, want := range map[string]codes.Code{"error": codes.NotFound, "fine": codes.OK} {
			var head, trail metadata.MD
			ctx := metadata.AppendToOutgoingContext(within(t, timeout), "x-say", say, "x-pad", " p ")
			_, err := c.EmptyCall(ctx, &testgrpc.Empty{}, grpc.Header(&head), grpc.Trailer(&trail))
			if s := status.Convert(err); s.Code() != want || want == codes.NotFound && s.Message() != "no such user:" {
				t.Fatalf("%s: %v", say, err)
			}
			got := metadata.Join(head, trail)
			for name, want := range map[string]string{"x-head": "h", "x-blank": "", "x-trail": "t"} {
				if v := got.Get(name); len(v) != 1 || v[0] != want {
					t.Errorf("%s: %s is %q, want %q", say, name, v, want)
				}
			}
		}
		// Whoever comes next is served.
		if _, err := c.EmptyCall(context.Background(), &testgrpc.Empty{}); err != nil {
			t.Fatal(err)
		}
	}
}
