package main

import (
	"bytes"
	"context"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// useTempDirs keeps what the demo, in this process, makes and sets to the test.
func useTempDirs(t *testing.T) (tmp string) {
	t.Helper()
	tmp = t.TempDir()
	t.Setenv("TMPDIR", tmp)
	t.Setenv("XDG_DATA_HOME", tmp)
	t.Setenv("XDG_CONFIG_HOME", tmp)
	return tmp
}

func testOptions() options {
	o := defaults()
	o.tlsPort, o.h2cPort, o.rate = 0, 0, 100
	return o
}

// The client and the backends, each counting for itself, have the same figures, but for calls that the client gave
// up before it knew which backend had them.
func TestClientAndBackendsAgree(t *testing.T) {
	tmp := useTempDirs(t)
	d := &demo{options: testOptions()}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	if _, err := d.start(ctx); err != nil {
		_, stopErr := d.stop()
		t.Fatal(err, stopErr)
	}
	for d.stats.report().all.calls < 100 && ctx.Err() == nil {
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			t.Error(err)
		}
	}
	begin := time.Now()
	last, err := d.stop()
	if err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took >= 2*time.Second {
		t.Errorf("took %s to stop", took)
	}
	none := last.report.unanswered
	var unknown int64
	for i, b := range d.site.Backends {
		got, want := last.report.backends[i].calls, b.calls.Load()
		if got == 0 || got > want {
			t.Errorf("%s: the client counts %d calls, the backend %d", b.name, got, want)
		}
		unknown += want - got
	}
	if unknown > none.calls || none.calls != none.codes[codes.Canceled]+none.codes[codes.DeadlineExceeded] {
		t.Errorf("the backends had %d calls more, the client gave up %v", unknown, none.codes)
	}
	if last.dials != 1 || last.open != 0 || last.errors != 0 {
		t.Errorf("%d dials, %d open, %d errors: %s", last.dials, last.open, last.errors, last.last)
	}
	checkEmpty(t, tmp)
	checkNoGoroutines(t)
}

func TestRunEndedBeforeItBegan(t *testing.T) {
	tmp := useTempDirs(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out bytes.Buffer
	if err := run(ctx, testOptions(), &screen{out: &out}); err != nil || out.Len() > 0 {
		t.Errorf("got %v, output %q", err, &out)
	}
	checkEmpty(t, tmp)
	checkNoGoroutines(t)
}

// The live screen, to its end: the block gives way to the summary.
func TestRunLive(t *testing.T) {
	tmp := useTempDirs(t)
	o := testOptions()
	o.duration = time.Second
	s, e := newTerminal(t, 80, 24)
	if err := run(t.Context(), o, s); err != nil {
		t.Fatal(err)
	}
	text := strings.Join(e.lines, "\n")
	if !strings.Contains(text, "calls over 1 connection in") || strings.Count(text, " BACKEND ") != 1 || e.hidden {
		t.Errorf("on screen at the end:\n%s", text)
	}
	checkEmpty(t, tmp)
	checkNoGoroutines(t)
}

func TestOptionsCheck(t *testing.T) {
	if err := defaults().check(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
	for name, change := range map[string]func(*options){
		"--tls-port":  func(o *options) { o.tlsPort = 65536 },
		"--h2c-port":  func(o *options) { o.h2cPort = -1 },
		"both 8443":   func(o *options) { o.h2cPort = 8443 },
		"--backends":  func(o *options) { o.backends = 0 },
		"--backends ": func(o *options) { o.backends = 10 },
		"--slow":      func(o *options) { o.slow = -1 },
		"--duration":  func(o *options) { o.duration = -1 },
		"--rate":      func(o *options) { o.rate = 0 },
		"--policy":    func(o *options) { o.policy = "random\n}" },
	} {
		o := defaults()
		change(&o)
		if err := o.check(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func checkEmpty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		t.Errorf("left behind: %s", e.Name())
	}
}

// checkNoGoroutines fails the test if goroutines of the demo, its client or its backends go on. Caddy's and
// certmagic's own live as long as a process does.
func checkNoGoroutines(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for {
		buf := make([]byte, 1<<20)
		var leaked []string
		for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			ours := strings.Contains(stack, "caddy-grpc-proxy/") || strings.Contains(stack, "google.golang.org/grpc")
			if ours && !strings.Contains(stack, "testing.(*T).Run") && !strings.Contains(stack, "testing.tRunner(") {
				leaked = append(leaked, stack)
			}
		}
		if len(leaked) == 0 {
			return
		}
		if sleep(ctx, 10*time.Millisecond) != nil {
			t.Errorf("%d goroutines go on:\n%s", len(leaked), strings.Join(leaked, "\n\n"))
			return
		}
	}
}
