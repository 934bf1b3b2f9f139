// Command ejection shows what a proxy does about a backend that fails the calls it gets: of two backends behind it, one
// answers every call, the other none. It fails in one of several ways, of which some can be seen in the HTTP status or in
// the head of the answer, and some in the trailers only.
//
// It starts the backends and, in turn, the proxies, each set up as well as it goes, and prints how many of the calls of
// one grpc-go client failed. Proxies that are not installed are left out.
//
//	go build -o /tmp/caddy ./cmd/caddy
//	go run ./bench/ejection -caddy /tmp/caddy
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
)

const (
	// last is how many calls at the end are counted by themselves: by then a proxy should have noticed.
	last = 100
	// patience is the deadline of the calls that a backend leaves unanswered: longer than the 100 ms that the proxies are
	// told to wait, so that there is time for another try.
	patience = 250 * time.Millisecond
)

// fault is a way to fail.
type fault struct {
	name  string
	start func() (*backend, error)
	// timeout of each call.
	timeout time.Duration
}

var faults = []fault{
	{"UNAVAILABLE, Trailers-Only", startTrailersOnly, 10 * time.Second},
	{"UNAVAILABLE in trailers, after a message", startAfterMessage, 10 * time.Second},
	{"no answer", startSilent, patience},
	{"HTTP 503 without gRPC status", start503, 10 * time.Second},
}

func main() {
	var (
		caddy   = flag.String("caddy", "", "path of a Caddy built from ./cmd/caddy (required)")
		calls   = flag.Int("calls", 500, "calls for each proxy and fault")
		verbose = flag.Bool("v", false, "print the proxies' configurations")
	)
	flag.Parse()
	switch {
	case *caddy == "":
		fmt.Fprintln(os.Stderr, "ejection: -caddy is required: go build -o /tmp/caddy ./cmd/caddy")
		os.Exit(2)
	case *calls < last:
		fmt.Fprintf(os.Stderr, "ejection: -calls must be at least %d, got %d\n", last, *calls)
		os.Exit(2)
	}
	if err := run(*caddy, *calls, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "ejection:", err)
		os.Exit(1)
	}
}

func run(caddy string, calls int, verbose bool) error {
	list := installed(caddy)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "one of two backends answers:\tproxy\tfailed of %d\tfailed of the last %d\tbroken one's calls\n", calls, last)
	for _, f := range faults {
		for _, p := range list {
			r, err := measure(p, f, calls, verbose)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", f.name, p.name, err)
			}
			fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\n", f.name, p.name, r.failed, r.failedLast, r.broken)
		}
		verbose = false // they are the same for the next
	}
	return w.Flush()
}

// installed are the proxies that can be run; it prints their versions.
func installed(caddy string) []proxy {
	return slices.DeleteFunc(proxies(caddy), func(p proxy) bool {
		out, err := exec.Command(p.version[0], p.version[1:]...).CombinedOutput()
		if err != nil {
			fmt.Printf("%s is left out: %v\n", p.name, err)
			return true
		}
		line, _, _ := strings.Cut(string(out), "\n")
		fmt.Printf("%s: %s\n", p.name, line)
		return false
	})
}

// result is what a client saw, and how many calls reached the broken backend.
type result struct {
	failed, failedLast int
	broken             int64
}

func measure(p proxy, f fault, calls int, verbose bool) (*result, error) {
	sound, err := startSound()
	if err != nil {
		return nil, err
	}
	defer sound.stop()
	broken, err := f.start()
	if err != nil {
		return nil, err
	}
	defer broken.stop()
	addr, stop, err := p.start(verbose, sound.addr, broken.addr)
	if err != nil {
		return nil, err
	}
	defer stop()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()

	var (
		r      result
		client = testpb.NewTestServiceClient(conn)
	)
	for i := range calls {
		if call(client, f.timeout) == nil {
			continue
		}
		r.failed++
		if i >= calls-last {
			r.failedLast++
		}
	}
	r.broken = broken.calls.Load()
	if sound.calls.Load() == 0 {
		return nil, errors.New("no call has reached the backend that answers")
	}
	return &r, nil
}

// call makes a call that is answered by one message and a status.
func call(client testpb.TestServiceClient, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	stream, err := client.StreamingOutputCall(ctx, new(testpb.StreamingOutputCallRequest))
	if err != nil {
		return err
	}
	for {
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}
