package discovery

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// timeout bounds every wait of a test; on a busy machine what takes a moment may take long.
const timeout = 30 * time.Second

// recorder is a sink that remembers.
type recorder struct {
	mu      sync.Mutex
	updates [][]upstream.Endpoint
	errs    []error
	news    chan struct{}
}

func newRecorder() *recorder { return &recorder{news: make(chan struct{}, 1)} }

func (r *recorder) Update(list []upstream.Endpoint) {
	r.mu.Lock()
	r.updates = append(r.updates, slices.Clone(list))
	r.mu.Unlock()
	r.notify()
}

func (r *recorder) Fail(err error) {
	r.mu.Lock()
	r.errs = append(r.errs, err)
	r.mu.Unlock()
	r.notify()
}

func (r *recorder) notify() {
	select {
	case r.news <- struct{}{}:
	default:
	}
}

func (r *recorder) count() (updates, errs int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.updates), len(r.errs)
}

// last returns the addresses last heard of, and the last error.
func (r *recorder) last() ([]upstream.Endpoint, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var (
		list []upstream.Endpoint
		err  error
	)
	if n := len(r.updates); n > 0 {
		list = r.updates[n-1]
	}
	if n := len(r.errs); n > 0 {
		err = r.errs[n-1]
	}
	return list, err
}

// await waits until ok says so.
func (r *recorder) await(t *testing.T, what string, ok func(list []upstream.Endpoint, err error) bool) {
	t.Helper()
	deadline := time.NewTimer(timeout)
	defer deadline.Stop()
	for {
		list, err := r.last()
		if ok(list, err) {
			return
		}
		select {
		case <-r.news:
		case <-deadline.C:
			t.Fatalf("waited for %s; have %s, error %v", what, text(list), err)
		}
	}
}

// awaitList waits for a list: the endpoints as text has them.
func (r *recorder) awaitList(t *testing.T, want ...string) {
	t.Helper()
	joined := strings.Join(want, " ")
	r.await(t, joined, func(list []upstream.Endpoint, _ error) bool { return text(list) == joined })
}

// awaitError waits for an error that contains a text.
func (r *recorder) awaitError(t *testing.T, want string) {
	t.Helper()
	r.await(t, want, func(_ []upstream.Endpoint, err error) bool { return err != nil && strings.Contains(err.Error(), want) })
}

// text is short for a list: address, then what is not the default.
func text(list []upstream.Endpoint) string {
	var parts []string
	for _, e := range list {
		s := e.Address
		if e.Network != "tcp" {
			s = e.Network + "/" + s
		}
		if e.Name != "" {
			s += ",name=" + e.Name
		}
		if e.Weight != 0 {
			s += fmt.Sprintf(",w=%d", e.Weight)
		}
		if e.Priority != 0 {
			s += fmt.Sprintf(",p=%d", e.Priority)
		}
		if e.Locality != (upstream.Locality{}) {
			s += fmt.Sprintf(",l=%s/%s/%s", e.Locality.Region, e.Locality.Zone, e.Locality.SubZone)
		}
		if len(e.Metadata) > 0 {
			s += fmt.Sprintf(",%v", e.Metadata)
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, " ")
}

// provision does what Caddy does with a module.
func provision(t testing.TB, m any) error {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	if p, ok := m.(caddy.Provisioner); ok {
		return p.Provision(ctx)
	}
	return nil
}

// watch provisions a source and watches it until the test ends, when no goroutine may be left.
func watch(t *testing.T, s Source) *recorder {
	t.Helper()
	wiretest.CheckLeaks(t)
	if err := provision(t, s); err != nil {
		t.Fatal(err)
	}
	r := newRecorder()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Watch(ctx, r)
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case <-done:
		case <-time.After(timeout):
			t.Error("Watch goes on after its context is done")
		}
	})
	return r
}

// fromCaddyfile parses a source from what follows the word dynamic.
func fromCaddyfile(t testing.TB, input string) (string, error) {
	t.Helper()
	d := caddyfile.NewTestDispenser(input)
	d.Next()
	name := d.Val()
	m, err := caddyfile.UnmarshalModule(d, namespace+name)
	if err != nil {
		return "", err
	}
	if d.Next() {
		t.Errorf("%q is left unread", d.Val())
	}
	raw, err := json.Marshal(m)
	return string(raw), err
}

// caddyfileCase is a Caddyfile and its JSON, or a part of the error.
type caddyfileCase struct{ input, json, err string }

func runCaddyfile(t *testing.T, cases []caddyfileCase) {
	t.Helper()
	for _, c := range cases {
		got, err := fromCaddyfile(t, c.input)
		switch {
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("%s\ngot error %v; want %q", c.input, err, c.err)
		case c.err == "" && err != nil:
			t.Errorf("%s\nrefused: %v", c.input, err)
		case c.err == "" && got != c.json:
			t.Errorf("%s\ngot  %s\nwant %s", c.input, got, c.json)
		}
	}
}

// refused: provisioning fails with a text.
func refused(t *testing.T, m any, want string) {
	t.Helper()
	if err := provision(t, m); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%+v: got error %v; want one with %q", m, err, want)
	}
}
