package main

import (
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
)

// latest is how many latencies per row the percentiles are taken from: enough for a p99, few enough to follow changes.
const latest = 1000

// kind is one of the four kinds of RPC.
type kind int

const (
	unary kind = iota
	clientStream
	serverStream
	bidi
)

// kinds is how many kinds there are.
const kinds = int(bidi) + 1

func (k kind) String() string {
	switch k {
	case unary:
		return "unary"
	case clientStream:
		return "client-stream"
	case serverStream:
		return "server-stream"
	case bidi:
		return "bidi"
	}
	return "unknown"
}

// row is what is known about one set of calls.
type row struct {
	calls    int64
	codes    map[codes.Code]int64
	p50, p99 time.Duration // of the calls that ended OK; 0 without any
}

// tally counts one set of calls. Latencies are kept in a ring.
type tally struct {
	calls     int64
	codes     map[codes.Code]int64
	latencies []time.Duration
	next      int
}

func (t *tally) add(code codes.Code, d time.Duration) {
	t.calls++
	if t.codes == nil {
		t.codes = make(map[codes.Code]int64)
	}
	t.codes[code]++
	if code != codes.OK {
		return // a deadline's length or a quick refusal says nothing about how fast the backend is
	}
	if len(t.latencies) < latest {
		t.latencies = append(t.latencies, d)
		return
	}
	t.latencies[t.next] = d
	t.next = (t.next + 1) % latest
}

func (t *tally) row() row {
	r := row{calls: t.calls, codes: maps.Clone(t.codes)}
	sorted := slices.Sorted(slices.Values(t.latencies))
	r.p50, r.p99 = quantile(sorted, 50), quantile(sorted, 99)
	return r
}

// quantile is the nearest-rank percentile of sorted values, 0 without any.
func quantile(sorted []time.Duration, percent int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	rank := (len(sorted)*percent + 99) / 100
	return sorted[max(rank, 1)-1]
}

// report is one look at all figures, for the screen and the summary. Every call is in exactly one row of backends and
// in exactly one of kinds.
type report struct {
	backends []row // in the order of the backends
	// unanswered are calls that no backend answered, not even by a head: failures of the proxy's or the client's own,
	// and deadlines that were over too soon.
	unanswered row
	kinds      [kinds]row
	all        row
}

// stats collects what becomes of the client's calls. Its methods may be called concurrently.
type stats struct {
	mu         sync.Mutex
	names      []string
	backends   []tally
	unanswered tally
	kinds      [kinds]tally
	all        tally
}

func newStats(backends []*backend) *stats {
	s := &stats{backends: make([]tally, len(backends))}
	for _, b := range backends {
		s.names = append(s.names, b.name)
	}
	return s
}

// record counts one finished call. backend is the name of the backend that answered, empty for none.
func (s *stats) record(k kind, backend string, code codes.Code, latency time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	by := &s.unanswered
	if i := slices.Index(s.names, backend); i >= 0 {
		by = &s.backends[i]
	}
	by.add(code, latency)
	s.kinds[k].add(code, latency)
	s.all.add(code, latency)
}

func (s *stats) report() report {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := report{unanswered: s.unanswered.row(), all: s.all.row()}
	for i := range s.backends {
		r.backends = append(r.backends, s.backends[i].row())
	}
	for k := range s.kinds {
		r.kinds[k] = s.kinds[k].row()
	}
	return r
}
