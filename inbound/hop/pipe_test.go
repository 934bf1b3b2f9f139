package hop

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/net/nettest"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// newPipe makes a pipe whose ends are closed at the end of the test.
func newPipe(t *testing.T) (a, b *end) {
	t.Helper()
	na, nb := Pipe(localAddr, remoteAddr)
	t.Cleanup(func() {
		_ = na.Close()
		_ = nb.Close()
	})
	return na.(*end), nb.(*end)
}

// waitFull waits until the half is full, so that whoever writes more waits.
func (h *half) waitFull(t *testing.T) {
	t.Helper()
	until(t, "full pipe", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.w-h.r == pipeBuffer
	})
}

func TestPipe(t *testing.T) {
	wiretest.CheckLeaks(t)
	nettest.TestConn(t, func() (a, b net.Conn, stop func(), err error) {
		a, b = Pipe(localAddr, remoteAddr)
		return a, b, func() {
			_ = a.Close()
			_ = b.Close()
		}, nil
	})
}

func TestPipeAddresses(t *testing.T) {
	a, b := newPipe(t)
	// The far end is the server's: it has the addresses of the server's connection to the client.
	if b.LocalAddr() != localAddr || b.RemoteAddr() != remoteAddr {
		t.Errorf("far end: %v, %v", b.LocalAddr(), b.RemoteAddr())
	}
	if a.LocalAddr() != remoteAddr || a.RemoteAddr() != localAddr {
		t.Errorf("near end: %v, %v", a.LocalAddr(), a.RemoteAddr())
	}
}

func TestPipeCloseWrite(t *testing.T) {
	a, b := newPipe(t)
	if _, err := a.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write([]byte("more")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("write after CloseWrite: %v", err)
	}
	if got, err := io.ReadAll(b); string(got) != "question" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	// The other direction is open.
	if _, err := b.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	_ = b.Close()
	if got, err := io.ReadAll(a); string(got) != "answer" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	_ = a.Close()
	if _, err := a.Write([]byte("more")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
}

// What waits in the pipe when one end closes comes out at the other.
func TestPipeReadAfterClose(t *testing.T) {
	a, b := newPipe(t)
	want := bytes.Repeat([]byte("abcdefg"), pipeBuffer/7)
	if n, err := a.Write(want); n != len(want) || err != nil {
		t.Fatal(n, err)
	}
	_ = a.Close()
	if got, err := io.ReadAll(b); !bytes.Equal(got, want) || err != nil {
		t.Errorf("%d bytes, %v; want %d", len(got), err, len(want))
	}
	if _, err := b.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("write to nobody: %v", err)
	}
}

// Close and CloseWrite end what waits, at both ends.
func TestPipeCloseWakes(t *testing.T) {
	big := make([]byte, 2*pipeBuffer)
	for name, tt := range map[string]struct {
		wait func(a, b *end) (int, error)
		full bool // the one who waits is the one who writes
		end  func(a, b *end) error
		want error
	}{
		"own read":         {func(a, _ *end) (int, error) { return a.Read(make([]byte, 1)) }, false, func(a, _ *end) error { return a.Close() }, net.ErrClosed},
		"other's read":     {func(_, b *end) (int, error) { return b.Read(make([]byte, 1)) }, false, func(a, _ *end) error { return a.Close() }, io.EOF},
		"read, CloseWrite": {func(_, b *end) (int, error) { return b.Read(make([]byte, 1)) }, false, func(a, _ *end) error { return a.CloseWrite() }, io.EOF},
		"own write":        {func(a, _ *end) (int, error) { return a.Write(big) }, true, func(a, _ *end) error { return a.Close() }, net.ErrClosed},
		"other's write":    {func(a, _ *end) (int, error) { return a.Write(big) }, true, func(_, b *end) error { return b.Close() }, io.ErrClosedPipe},
	} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			a, b := newPipe(t)
			waits := start(func() (int, error) { return tt.wait(a, b) })
			if tt.full {
				a.out.waitFull(t)
			}
			if err := tt.end(a, b); err != nil {
				t.Fatal(err)
			}
			if r := must(t, waits); !errors.Is(r.err, tt.want) || tt.full && r.n != pipeBuffer {
				t.Errorf("%d, %v; want %v", r.n, r.err, tt.want)
			}
		})
	}
}

// A pipe in which nothing waits has no buffer.
func TestPipeQuiet(t *testing.T) {
	a, b := newPipe(t)
	held := func() bool { return a.out.buf != nil || a.in.buf != nil }
	if held() {
		t.Error("a new pipe holds a buffer")
	}
	for range 3 {
		if _, err := a.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if !held() {
			t.Error("what was written is nowhere")
		}
		if _, err := io.ReadFull(b, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		if !held() {
			t.Error("a part is left, and is nowhere")
		}
		if _, err := io.ReadFull(b, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if held() {
			t.Error("an empty pipe holds a buffer")
		}
	}
	if _, err := a.Write(nil); err != nil || held() {
		t.Errorf("an empty write: %v, and holds a buffer: %v", err, held())
	}
	if _, err := a.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	_ = b.Close()
	if held() {
		t.Error("a pipe that nobody reads any more holds a buffer")
	}
}

// Who waits goes by the deadline that is set meanwhile.
func TestPipeDeadlineMoves(t *testing.T) {
	big := make([]byte, 2*pipeBuffer)
	past := time.Unix(1, 0)
	read := func(a *end) (int, error) { return a.Read(make([]byte, 1)) }
	write := func(a *end) (int, error) { return a.Write(big) }
	for name, tt := range map[string]struct {
		wait func(*end) (int, error)
		set  func(*end, time.Time) error
	}{
		"read":        {read, (*end).SetReadDeadline},
		"write":       {write, (*end).SetWriteDeadline},
		"read, both":  {read, (*end).SetDeadline},
		"write, both": {write, (*end).SetDeadline},
	} {
		t.Run(name, func(t *testing.T) {
			wiretest.CheckLeaks(t)
			a, _ := newPipe(t)
			for range 3 {
				_ = tt.set(a, time.Now().Add(time.Hour))
				waits := start(func() (int, error) { return tt.wait(a) })
				_ = tt.set(a, time.Time{})
				_ = tt.set(a, time.Now().Add(2*time.Hour))
				_ = tt.set(a, past)
				if r := must(t, waits); !errors.Is(r.err, os.ErrDeadlineExceeded) {
					t.Errorf("%d, %v", r.n, r.err)
				}
			}
			// One that comes near fires by itself.
			_ = tt.set(a, time.Now().Add(time.Hour))
			waits := start(func() (int, error) { return tt.wait(a) })
			_ = tt.set(a, time.Now().Add(10*time.Millisecond))
			if r := must(t, waits); !errors.Is(r.err, os.ErrDeadlineExceeded) {
				t.Errorf("%d, %v", r.n, r.err)
			}
		})
	}
}

// A deadline that was moved away does not fire, and one that has passed can be taken back.
func TestPipeDeadlineTakenBack(t *testing.T) {
	a, b := newPipe(t)
	_ = a.SetReadDeadline(time.Now().Add(time.Millisecond))
	until(t, "deadline that has passed", func() bool {
		a.in.mu.Lock()
		defer a.in.mu.Unlock()
		return a.in.reading.passed
	})
	_ = a.SetReadDeadline(time.Now().Add(time.Hour))
	waits := start(func() (int, error) { return a.Read(make([]byte, 9)) })
	if _, err := b.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if r := must(t, waits); r.n != 5 || r.err != nil {
		t.Errorf("%d, %v", r.n, r.err)
	}
}

// A read deadline is one end's: the other end, and writing, go on.
func TestPipeDeadlineIsOneEnds(t *testing.T) {
	a, b := newPipe(t)
	_ = a.SetReadDeadline(time.Unix(1, 0))
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	if _, err := a.Write([]byte("hello")); err != nil {
		t.Error(err)
	}
	if n, err := b.Read(make([]byte, 9)); n != 5 || err != nil {
		t.Error(n, err)
	}
	if _, err := b.Write([]byte("hello")); err != nil {
		t.Error(err)
	}
}

// Reads of all sizes, as of a server that reads a frame's head, then its payload.
func TestPipeSmallReads(t *testing.T) {
	a, b := newPipe(t)
	want := make([]byte, 10*pipeBuffer+1)
	for i := range want {
		want[i] = byte(i * i >> 8)
	}
	writes := start(func() (int, error) {
		defer a.CloseWrite()
		return a.Write(want)
	})
	got := make([]byte, 0, len(want))
	for size := 1; ; size = (size*5 + 3) % 3001 {
		p := make([]byte, size+1)
		n, err := b.Read(p)
		got = append(got, p[:n]...)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if r := must(t, writes); r.n != len(want) || r.err != nil {
		t.Errorf("%d, %v", r.n, r.err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes that are not the %d written", len(got), len(want))
	}
}
