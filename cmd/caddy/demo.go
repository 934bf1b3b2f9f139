package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"google.golang.org/grpc/grpclog"
)

func init() {
	flags := flag.NewFlagSet("grpc-demo", flag.ExitOnError)
	d := defaults()
	flags.Int("tls-port", d.tlsPort, "Port of Caddy's TLS listener, 0 for any free one")
	flags.Int("h2c-port", d.h2cPort, "Port of Caddy's plaintext HTTP/2 listener, 0 for any free one")
	flags.Int("backends", d.backends, "How many gRPC backends to start, 1 to 9")
	flags.Duration("slow", d.slow, "How much longer the last backend takes for each call")
	flags.String("policy", d.policy, "Load-balancing policy, one that needs no options: least_request, round_robin, random, first, peak_ewma, …")
	flags.Float64("rate", d.rate, "Calls per second")
	flags.Duration("duration", d.duration, "Stop after this time, 0 for when Ctrl-C is pressed")
	flags.Bool("plain", d.plain, "Print a line a second instead of a live table")
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "grpc-demo",
		Usage: "[--tls-port <port>] [--h2c-port <port>] [--backends <n>] [--slow <time>] [--policy <name>] [--rate <n>] [--duration <time>] [--plain]",
		Short: "Shows grpc_proxy balancing real gRPC calls, with nothing to set up",
		Long: `
Starts three small gRPC backends, one slower than the others, Caddy with
grpc_proxy in front of them, and a client that sends calls of all four kinds
over one connection; shows live how they spread over the backends, how long
they take and how they end. All of it runs in this process, on loopback ports,
and leaves no file behind. Stop it with Ctrl-C.
`,
		Flags: flags,
		Func:  command,
	})
}

// options are the command's flags.
type options struct {
	tlsPort, h2cPort int
	backends         int
	slow             time.Duration
	policy           string
	rate             float64
	duration         time.Duration
	plain            bool
}

func defaults() options {
	return options{
		tlsPort: 8443, h2cPort: 8080, backends: 3, slow: 25 * time.Millisecond, policy: "least_request", rate: 200,
	}
}

// maxRate is more than one process can do as client, proxy and backends at once, on any machine.
const maxRate = 1e6

var policyName = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)

func (o options) check() error {
	switch {
	case o.tlsPort < 0 || o.tlsPort > 65535:
		return fmt.Errorf("--tls-port %d: not a port", o.tlsPort)
	case o.h2cPort < 0 || o.h2cPort > 65535:
		return fmt.Errorf("--h2c-port %d: not a port", o.h2cPort)
	case o.tlsPort == o.h2cPort && o.tlsPort != 0:
		return fmt.Errorf("--tls-port and --h2c-port are both %d", o.tlsPort)
	case o.backends < 1 || o.backends > 9:
		return fmt.Errorf("--backends %d: want 1 to 9", o.backends)
	case o.slow < 0 || o.duration < 0:
		return errors.New("--slow and --duration cannot be negative")
	case !(o.rate > 0 && o.rate <= maxRate):
		return fmt.Errorf("--rate %g: want more than 0 and at most %g", o.rate, maxRate)
	case !policyName.MatchString(o.policy):
		return fmt.Errorf("--policy %q: not the name of a policy", o.policy)
	}
	return nil
}

func command(fl caddycmd.Flags) (int, error) {
	o := options{
		tlsPort: fl.Int("tls-port"), h2cPort: fl.Int("h2c-port"),
		backends: fl.Int("backends"), slow: fl.Duration("slow"), policy: fl.String("policy"),
		rate: fl.Float64("rate"), duration: fl.Duration("duration"), plain: fl.Bool("plain"),
	}
	if fl.NArg() > 0 {
		fail(fmt.Errorf("unknown argument %q: the command takes flags only", fl.Arg(0)))
	}
	if err := o.check(); err != nil {
		fail(err)
	}
	// SIGHUP: the terminal was closed. SIGPIPE is ignored so that a pipe without reader is an error of the
	// write, after which all is tidied up, and not the end.
	signal.Ignore(syscall.SIGPIPE)
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer cancel()
	// grpc-go would write into the table; what fails is in it anyway.
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	if err := run(ctx, o, newScreen(os.Stdout, o.plain)); err != nil {
		fail(err)
	}
	return caddy.ExitCodeSuccess, nil
}

// fail ends the process as a failed start. Returning the error would make Caddy write it as a log entry, which a
// newcomer may not read as the one line that says what to do.
func fail(err error) {
	fmt.Fprintln(os.Stderr, "grpc-demo:", err)
	os.Exit(caddy.ExitCodeFailedStartup)
}
