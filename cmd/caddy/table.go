package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
)

// columns is how wide a line may be: as a terminal that nobody has widened, less the last column, in which some wrap.
const columns = 79

// barWidth is the length of the bar of a row with all calls.
const barWidth = 9

// tableOf draws the figures: a row for each backend, and one for each kind of RPC. No line is longer than columns.
func tableOf(r report, backends []*backend) []string {
	lines := []string{heading("BACKEND")}
	for i, b := range backends {
		name := fmt.Sprintf("%s :%d", b.name, b.port)
		if b.delay > 0 {
			name += " slow"
		}
		lines = append(lines, rowLine(name, r.backends[i], r.all.calls))
	}
	if r.unanswered.calls > 0 {
		lines = append(lines, rowLine("unanswered", r.unanswered, r.all.calls))
	}
	lines = append(lines, rowLine("all", r.all, r.all.calls), "", heading("RPC KIND"))
	for k, row := range r.kinds {
		lines = append(lines, rowLine(kind(k).String(), row, r.all.calls))
	}
	if other := otherCodes(r.all); other != "" {
		lines = append(lines, clip(" other statuses: "+other, columns))
	}
	return lines
}

func heading(of string) string {
	return line(of, "CALLS", "SHARE", "P50", "P99", "OK", "NOT_FOUND", "DEADLINE")
}

func rowLine(name string, r row, all int64) string {
	var share string
	if all > 0 {
		percent := float64(r.calls) / float64(all)
		share = fmt.Sprintf("%3.0f%% %s", 100*percent, strings.Repeat("#", int(percent*barWidth+0.5)))
	}
	return line(name, count(r.calls), share, millis(r.p50), millis(r.p99),
		count(r.codes[codes.OK]), count(r.codes[codes.NotFound]), count(r.codes[codes.DeadlineExceeded]))
}

// line lays out one line of the table; every cell has room for its longest value.
func line(name, calls, share, p50, p99, ok, notFound, deadline string) string {
	text := fmt.Sprintf(" %-14s%8s  %-14s%6s%7s%8s%10s%9s", clip(name, 14), calls, share, p50, p99, ok, notFound, deadline)
	return strings.TrimRight(text, " ")
}

// otherCodes lists the statuses that have no column, most frequent first; empty when there are none.
func otherCodes(r row) string {
	var others []codes.Code
	for code, n := range r.codes {
		if n > 0 && code != codes.OK && code != codes.NotFound && code != codes.DeadlineExceeded {
			others = append(others, code)
		}
	}
	slices.SortFunc(others, func(a, b codes.Code) int {
		if d := r.codes[b] - r.codes[a]; d != 0 {
			return int(d)
		}
		return int(a) - int(b)
	})
	texts := make([]string, 0, len(others))
	for _, code := range others {
		texts = append(texts, codeName(code)+" "+count(r.codes[code]))
	}
	return strings.Join(texts, ", ")
}

// codeName is the code's name as the gRPC documents spell it: DEADLINE_EXCEEDED, not grpc-go's DeadlineExceeded.
func codeName(code codes.Code) string {
	if code == codes.Canceled {
		return "CANCELLED"
	}
	var b strings.Builder
	name := code.String()
	for i, c := range name {
		if i > 0 && c >= 'A' && c <= 'Z' && name[i-1] >= 'a' && name[i-1] <= 'z' {
			b.WriteByte('_')
		}
		b.WriteRune(c)
	}
	return strings.ToUpper(b.String())
}

// count writes a number in at most seven characters: 999,999, then 1.23M and 1.23G.
func count(n int64) string {
	switch {
	case n < 1000:
		return strconv.FormatInt(n, 10)
	case n < 1_000_000:
		return fmt.Sprintf("%d,%03d", n/1000, n%1000)
	case n < 999_995_000:
		return fmt.Sprintf("%.2fM", float64(n)/1e6)
	}
	return fmt.Sprintf("%.2fG", float64(n)/1e9)
}

// millis writes a duration in at most six characters; a dash for none.
func millis(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case d <= 0:
		return "-"
	case ms < 9.95:
		return fmt.Sprintf("%.1fms", ms)
	case ms < 999.5:
		return fmt.Sprintf("%.0fms", ms)
	}
	return fmt.Sprintf("%.1fs", ms/1000)
}

// plural writes "1 connection", "2 connections".
func plural(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return count(n) + " " + noun + "s"
}

// clip cuts text to at most width characters.
func clip(text string, width int) string {
	if runes := []rune(text); len(runes) > width {
		return string(runes[:max(width, 0)])
	}
	return text
}
