package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestReservePort(t *testing.T) {
	ln, err := reservePort(0, "tls-port")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, err = reservePort(portOf(ln), "tls-port")
	if e, ok := errors.AsType[*portError](err); !ok || e.port != portOf(ln) || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v", err)
	}
}

func TestLogTail(t *testing.T) {
	l := logTail{path: filepath.Join(t.TempDir(), "caddy.log")}
	l.poll() // no file yet
	f, err := os.Create(l.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	write := func(text string) {
		t.Helper()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
		l.poll()
	}
	want := func(count int, last string) {
		t.Helper()
		if l.count != count || l.last != last {
			t.Errorf("got %d entries, the last %q, want %d and %q", l.count, l.last, count, last)
		}
	}
	write("")
	want(0, "")
	write(`{"level":"error","logger":"http","msg":"broke","error":"it did"}` + "\n" + `{"msg":"ha`)
	want(1, "http: broke: it did")
	write(`lf"}` + "\nnot JSON\n")
	want(3, "not JSON")
	write(strings.Repeat("x", 100<<10) + "\n")
	l.poll()
	write(`{"msg":"after a long one"}` + "\n")
	if l.last != "after a long one" {
		t.Errorf("the last is %.100q", l.last)
	}
	count := l.count
	l.poll()
	want(count, "after a long one")
}
