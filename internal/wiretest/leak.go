package wiretest

import (
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"
)

// module is the path of our module: all goroutines that run or were started by its code count.
var module = strings.TrimSuffix(reflect.TypeFor[Conn]().PkgPath(), "/internal/wiretest")

// CheckLeaks fails the test if, [Timeout] after its end, goroutines still run that began since the call and that run
// our code or were started by it. Call it first: what later calls of t.Cleanup stop, has then been stopped before the
// check. It cannot tell the goroutines of parallel tests apart, so it is not for tests that call t.Parallel.
func CheckLeaks(t testing.TB) {
	t.Helper()
	before := make(map[string]bool)
	for _, g := range goroutines() {
		before[g.id] = true
	}
	t.Cleanup(func() {
		t.Helper()
		var leaked []string
		// Goroutines end by themselves, without telling anybody: poll.
		deadline := time.Now().Add(Timeout)
		for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
			leaked = leaked[:0]
			for _, g := range goroutines()[1:] { // The first is this one.
				if !before[g.id] && strings.Contains(g.stack, module) {
					leaked = append(leaked, g.stack)
				}
			}
			if len(leaked) == 0 {
				return
			}
			if time.Now().After(deadline) {
				break
			}
			time.Sleep(pause)
		}
		t.Errorf("%d goroutines leaked:\n\n%s", len(leaked), strings.Join(leaked, "\n\n"))
	})
}

type goroutine struct{ id, stack string }

// goroutines returns all goroutines, the caller's first.
func goroutines() []goroutine {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	var all []goroutine
	for stack := range strings.SplitSeq(string(buf), "\n\n") {
		head, _, _ := strings.Cut(strings.TrimPrefix(stack, "goroutine "), " ")
		all = append(all, goroutine{id: head, stack: stack})
	}
	return all
}
