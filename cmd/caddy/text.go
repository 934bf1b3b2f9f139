package main

import (
	"fmt"
	"strings"
	"time"
)

// introduction says what the demo is, what runs where, and what to try, in this order: the last is next to the table.
func introduction(o options, s site, caddyfile []byte) []string {
	lines := []string{
		"grpc_proxy demo: a gRPC client keeps one connection; Caddy balances every call.",
		"",
		fmt.Sprintf("  client    grpc-go, %g calls/s of all four RPC kinds over 1 TLS connection", o.rate),
		fmt.Sprintf("  Caddy     https://localhost:%d (local CA) and http://localhost:%d (h2c)", s.TLSPort, s.H2CPort),
	}
	for i, b := range s.Backends {
		label, note := "", ""
		if i == 0 {
			label = "backends"
		}
		if b.delay > 0 {
			note = fmt.Sprintf(", %s slower", b.delay)
		}
		lines = append(lines, fmt.Sprintf("  %-8s  %s 127.0.0.1:%d, grpc-go with health and reflection%s", label, b.name, b.port, note))
	}
	lines = append(lines, "", "Caddy runs this Caddyfile:", "")
	for text := range strings.Lines(string(caddyfile)) {
		lines = append(lines, strings.TrimRight("  "+strings.ReplaceAll(text, "\t", "    "), " \n"))
	}
	lines = append(lines, "", "Try it from another terminal:", "")
	lines = append(lines, tryLines(s)...)
	return append(lines, "")
}

// tryLines are commands to paste. The curl line posts one gRPC frame of an empty message and shows the head and the
// trailers of the answer.
func tryLines(s site) []string {
	return []string{
		fmt.Sprintf("  grpcurl -plaintext localhost:%d list", s.H2CPort),
		fmt.Sprintf("  grpcurl -insecure localhost:%d %s/EmptyCall", s.TLSPort, testService),
		fmt.Sprintf(`  grpcurl -insecure -d '{"fillServerId":true}' localhost:%d \`, s.TLSPort),
		fmt.Sprintf("    %s/UnaryCall", testService),
		`  printf '\0\0\0\0\0' | curl -sS --http2-prior-knowledge -D - -o /dev/null \`,
		`    -H 'content-type: application/grpc' -H 'te: trailers' --data-binary @- \`,
		fmt.Sprintf("    http://localhost:%d/%s/EmptyCall", s.H2CPort, testService),
	}
}

// view is what changes while the demo runs.
type view struct {
	report  report
	dials   int64 // connections the client has dialled
	open    int64 // calls in flight
	elapsed time.Duration
	errors  int    // logged by Caddy
	last    string // the newest of them
}

// block is the part of the screen that is redrawn.
func block(o options, s site, v view) []string {
	lines := []string{
		" grpc_proxy demo: a client keeps one connection, every call finds its backend",
		fmt.Sprintf(" client --%s--> Caddy :%d --h2c--> %s", plural(v.dials, "TLS connection"), s.TLSPort,
			plural(int64(len(s.Backends)), "backend")),
		fmt.Sprintf(" %s: %s at %.0f/s, %d in flight, running %s", o.policy, plural(v.report.all.calls, "call"),
			perSecond(v), v.open, v.elapsed.Truncate(time.Second)),
		"",
	}
	lines = append(lines, tableOf(v.report, s.Backends)...)
	lines = append(lines,
		"",
		" P50 and P99 are of OK calls. NOT_FOUND and DEADLINE(_EXCEEDED) are on purpose.",
		" Ctrl-C stops the demo.")
	if v.errors > 0 {
		lines = append(lines, errorLine(v))
	}
	return lines
}

// plainLine is the figures in one line, for pipes and logs.
func plainLine(s site, v view) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%4.0fs %s, %s:", v.elapsed.Seconds(), plural(v.report.all.calls, "call"), plural(v.dials, "connection"))
	for i, row := range v.report.backends {
		fmt.Fprintf(&b, " %s %.0f%%", s.Backends[i].name, 100*float64(row.calls)/float64(max(v.report.all.calls, 1)))
	}
	fmt.Fprintf(&b, ", p50 %s p99 %s", millis(v.report.all.p50), millis(v.report.all.p99))
	return b.String()
}

// summary is the last word, once all is stopped.
func summary(s site, v view, stopped time.Duration, err error) []string {
	lines := []string{
		"",
		fmt.Sprintf("Summary: %s over %s in %.1f s (%.0f/s)", plural(v.report.all.calls, "call"),
			plural(v.dials, "connection"), v.elapsed.Seconds(), perSecond(v)),
		"",
	}
	lines = append(lines, tableOf(v.report, s.Backends)...)
	lines = append(lines, "")
	if v.errors > 0 {
		lines = append(lines, errorLine(v))
	}
	if err != nil {
		return lines // which says what did not stop
	}
	return append(lines, fmt.Sprintf("Stopped in %.2f s. Nothing is left running, and no file is left behind.", stopped.Seconds()))
}

func errorLine(v view) string {
	return clip(fmt.Sprintf(" Caddy logged %s, the last: %s", plural(int64(v.errors), "error"), v.last), 2*columns)
}

func perSecond(v view) float64 {
	if v.elapsed <= 0 {
		return 0
	}
	return float64(v.report.all.calls) / v.elapsed.Seconds()
}
