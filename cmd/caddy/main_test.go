package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// timeout bounds everything a test waits for. A machine that also builds, under the race detector, is slow.
const timeout = 60 * time.Second

// runMain makes the test binary behave as the command itself, so that tests run the very code without a second build.
const runMain = "GRPC_DEMO_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(runMain) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// process is a running `caddy grpc-demo` with an empty home and an empty temporary directory.
type process struct {
	cmd       *exec.Cmd
	home, tmp string
	stdout    io.ReadCloser
	out       *bufio.Reader
	errOut    bytes.Buffer
	all       strings.Builder // what was read of out
	closeOut  func()
}

// startDemo starts the command with free ports and the flags given. It is killed if it outlives the test.
func startDemo(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{home: t.TempDir(), tmp: t.TempDir()}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	p.cmd = exec.CommandContext(ctx, os.Args[0], append([]string{"grpc-demo", "--plain", "--tls-port=0", "--h2c-port=0"}, args...)...)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "XDG_") {
			p.cmd.Env = append(p.cmd.Env, v)
		}
	}
	// The race detector would sleep for a second at the end, which is not the demo's time.
	p.cmd.Env = append(p.cmd.Env, runMain+"=1", "HOME="+p.home, "TMPDIR="+p.tmp, "GORACE=atexit_sleep_ms=0")
	p.cmd.Dir = p.home
	p.cmd.Stderr = &p.errOut
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdout, p.out = stdout, bufio.NewReader(stdout)
	p.closeOut = sync.OnceFunc(func() { stdout.Close() })
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		p.closeOut()
		// A second Wait only says so.
		_ = p.cmd.Wait()
	})
	return p
}

// until reads lines until one for which found returns true, and returns that line.
func (p *process) until(t *testing.T, found func(line string) bool) string {
	t.Helper()
	for {
		line, err := p.out.ReadString('\n')
		p.all.WriteString(line)
		if err != nil {
			t.Fatalf("reading its output: %v\n%s%s", err, &p.all, &p.errOut)
		}
		if found(line) {
			return line
		}
	}
}

// wait reads the rest and waits for the end. It returns the exit code and all that was printed on standard output.
func (p *process) wait(t *testing.T) (int, string) {
	t.Helper()
	if _, err := io.Copy(&p.all, p.out); err != nil {
		t.Errorf("reading its output: %v", err)
	}
	// An exit code other than 0 is for the caller to judge; other errors have no exit code.
	_ = p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode(), p.all.String()
}

// checkNoFiles fails the test if the command has left anything in its home or its temporary directory.
func (p *process) checkNoFiles(t *testing.T) {
	t.Helper()
	for _, dir := range []string{p.home, p.tmp} {
		err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
			if err == nil && path != dir {
				t.Errorf("left behind: %s", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}
