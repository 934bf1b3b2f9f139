// Command policies shows what a selection policy does about a backend that is slower than its siblings: of three
// backends that serve 16 calls at a time, two take 10 ms for a call and one takes 100 ms. Calls come at a steady rate,
// whether answers do or not, so a policy that gives the slow one more than it can do makes calls queue up there.
//
// It starts the backends and, policy by policy, a Caddy, and prints latencies and each backend's share.
//
//	go build -o /tmp/caddy ./cmd/caddy
//	go run ./bench/policies -caddy /tmp/caddy
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// concurrency is how many calls a backend serves at a time.
const concurrency = 16

// backend answers health checks, the smallest calls there are, after a while.
type backend struct {
	healthpb.UnimplementedHealthServer
	addr  string
	takes time.Duration
	slots chan struct{}
	calls atomic.Int64
}

func startBackend(takes time.Duration) (*backend, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	b := &backend{addr: l.Addr().String(), takes: takes, slots: make(chan struct{}, concurrency)}
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, b)
	go func() { _ = s.Serve(l) }()
	return b, nil
}

// Check takes its time.
func (b *backend) Check(ctx context.Context, _ *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	b.calls.Add(1)
	select {
	case b.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-b.slots }()
	t := time.NewTimer(b.takes)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}, nil
}

func main() {
	var (
		caddy    = flag.String("caddy", "", "path of a Caddy built from ./cmd/caddy (required)")
		policies = flag.String("policies", "round_robin,random,least_request,least_load,least_conn,peak_ewma", "policies to compare, separated by commas")
		rate     = flag.Int("rate", 600, "calls per second")
		duration = flag.Duration("duration", 10*time.Second, "length of one measurement, after 3 s of warming up")
	)
	flag.Parse()
	if *caddy == "" {
		fmt.Fprintln(os.Stderr, "policies: -caddy is required: go build -o /tmp/caddy ./cmd/caddy")
		os.Exit(2)
	}
	if err := run(*caddy, strings.Split(*policies, ","), *rate, *duration); err != nil {
		fmt.Fprintln(os.Stderr, "policies:", err)
		os.Exit(1)
	}
}

func run(caddy string, policies []string, rate int, duration time.Duration) error {
	var backends []*backend
	for _, takes := range []time.Duration{10 * time.Millisecond, 10 * time.Millisecond, 100 * time.Millisecond} {
		b, err := startBackend(takes)
		if err != nil {
			return err
		}
		backends = append(backends, b)
	}
	dir, err := os.MkdirTemp("", "grpc_proxy-policies-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "policy\tp50\tp90\tp99\tslow one's share\tfailed\t")
	for _, p := range policies {
		r, err := measure(caddy, dir, p, backends, rate, duration)
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%.1f %%\t%d\t\n", p, ms(r.at(0.5)), ms(r.at(0.9)), ms(r.at(0.99)), 100*r.slow, r.failed)
	}
	return w.Flush()
}

func ms(d time.Duration) string { return fmt.Sprintf("%.0f ms", float64(d)/float64(time.Millisecond)) }

// result is what one policy did.
type result struct {
	latencies []time.Duration // sorted
	failed    int
	slow      float64
}

func (r *result) at(q float64) time.Duration {
	if len(r.latencies) == 0 {
		return 0
	}
	return r.latencies[min(int(q*float64(len(r.latencies))), len(r.latencies)-1)]
}

func measure(caddy, dir, policy string, backends []*backend, rate int, duration time.Duration) (*result, error) {
	addr, stop, err := startProxy(caddy, dir, policy, backends)
	if err != nil {
		return nil, err
	}
	defer stop()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	load(conn, rate, 3*time.Second)
	before := make([]int64, len(backends))
	for i, b := range backends {
		before[i] = b.calls.Load()
	}
	r := load(conn, rate, duration)
	var total, slow int64
	for i, b := range backends {
		n := b.calls.Load() - before[i]
		total += n
		if i == len(backends)-1 {
			slow = n
		}
	}
	r.slow = float64(slow) / float64(max(total, 1))
	return r, nil
}

// load makes calls at a steady rate. Each may take 5 s, and counts as that if it does not come to an end.
func load(conn *grpc.ClientConn, rate int, duration time.Duration) *result {
	const patience = 5 * time.Second
	var (
		r      result
		mu     sync.Mutex
		wg     sync.WaitGroup
		client = healthpb.NewHealthClient(conn)
		tick   = time.NewTicker(time.Second / time.Duration(rate))
	)
	defer tick.Stop()
	for end := time.Now().Add(duration); time.Now().Before(end); {
		<-tick.C
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			start := time.Now()
			_, err := client.Check(ctx, new(healthpb.HealthCheckRequest))
			took := time.Since(start)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				r.failed++
				took = patience
			}
			r.latencies = append(r.latencies, took)
		})
	}
	wg.Wait()
	slices.Sort(r.latencies)
	return &r
}

func startProxy(caddy, dir, policy string, backends []*backend) (addr string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	addr = l.Addr().String()
	_ = l.Close()
	var to []string
	for _, b := range backends {
		to = append(to, b.addr)
	}
	path := filepath.Join(dir, "Caddyfile")
	text := fmt.Sprintf("{\n\tadmin off\n\tpersist_config off\n\tauto_https off\n\tservers {\n\t\tprotocols h1 h2c\n\t}\n}\nhttp://%s {\n\tgrpc_proxy %s {\n\t\tlb_policy %s\n\t}\n}\n",
		addr, strings.Join(to, " "), policy)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return "", nil, err
	}
	cmd := exec.Command(caddy, "run", "--config", path, "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	var log strings.Builder
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if nc, err := net.Dial("tcp", addr); err == nil {
			_ = nc.Close()
			return addr, stop, nil
		}
	}
	stop()
	return "", nil, errors.New("Caddy does not serve: " + log.String())
}
