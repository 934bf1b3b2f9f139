// Command bench measures what proxies cost: CPU time of the proxy's process (user and system, from /proc) per RPC, per
// message on an open stream, per GiB, and its memory per idle stream.
//
// It starts the backends, a load generator and every proxy itself, in turn and in interleaved rounds, and prints
// medians and the ratio to the proxy named first. Proxies that are not installed are left out. Linux only.
//
//	go build -o /tmp/caddy ./cmd/caddy
//	go run ./bench -caddy /tmp/caddy
//	go run ./bench -caddy /tmp/caddy -proxies grpc_proxy,reverse_proxy,nginx,haproxy -rounds 5
//	go run ./bench -core /tmp/core -proxies haproxy,nginx,core          (go build -o /tmp/core ./bench/core/server)
//	go run ./bench -caddy /tmp/caddy -before /tmp/caddy-before -proxies before,grpc_proxy -rounds 7
package main

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "backend" {
		runBackend()
		return
	}
	var (
		caddy    = flag.String("caddy", "", "path of a Caddy built from ./cmd/caddy")
		before   = flag.String("before", "", "path of an earlier build, measured as the proxy \"before\": grpc_proxy with the same configuration")
		core     = flag.String("core", "", "path of a build of ./bench/core/server, measured as the proxy \"core\"")
		names    = flag.String("proxies", "reverse_proxy,grpc_proxy", "proxies to measure: "+strings.Join(slices.Sorted(maps.Keys(proxies)), ", "))
		rounds   = flag.Int("rounds", 3, "interleaved rounds")
		duration = flag.Duration("duration", 2*time.Second, "length of one measurement")
		shapes   = flag.String("shapes", "10x1,10x100,1x100,100x10", "connections x concurrent streams of the unary load")
		extras   = flag.String("extras", "pingpong,stream,idle", "further measurements: pingpong, stream, idle, crowd; empty for none")
		accesslg = flag.Bool("access-log", false, "turn access logs on in Caddy (to /dev/null)")
		admin    = flag.String("admin", "off", "address of Caddy's admin endpoint, for profiles from /debug/pprof/")
		secure   = flag.Bool("tls", false, "have the load speak TLS to the proxies")
		keep     = flag.String("config", "", "extra lines for the grpc_proxy block")
	)
	flag.Parse()
	if *caddy == "" && *core == "" {
		fmt.Fprintln(os.Stderr, "bench: -caddy or -core is required: go build -o /tmp/caddy ./cmd/caddy")
		os.Exit(2)
	}
	b := &bench{caddy: *caddy, before: *before, core: *core, tls: *secure, duration: *duration, accessLog: *accesslg, admin: *admin, block: *keep}
	defer b.stop()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt)
	go func() {
		<-interrupted
		b.stop()
		os.Exit(1)
	}()
	if err := b.run(split(*names), split(*shapes), split(*extras), *rounds); err != nil {
		b.stop()
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1) //nolint:gocritic // stopped above
	}
}

func split(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}
