package e2e

import (
	"context"
	"encoding/binary"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// rss is the resident memory of a process in bytes.
func rss(t *testing.T, pid int) int64 {
	t.Helper()
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		t.Skipf("no /proc on this system: %v", err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(raw))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// bound is what the proxy may grow by, whatever one client or upstream does.
const bound = 8 << 20

// flood is how much one side would like to send.
const flood = 1 << 30

// watch runs move until it has stalled or ended, and returns the most that the process has grown by.
func watch(t *testing.T, pid int, before int64, moved func() int64) int64 {
	t.Helper()
	most, last, since := int64(0), int64(-1), time.Now()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		most = max(most, rss(t, pid)-before)
		if n := moved(); n != last {
			last, since = n, time.Now()
		} else if time.Since(since) > time.Second {
			return most
		}
	}
	t.Fatal("still moving after a minute")
	return 0
}

// TestMemoryUpstreamDoesNotRead: a client pushes 1 GiB at an upstream that reads nothing.
func TestMemoryUpstreamDoesNotRead(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	l := wiretest.Listen(t, wiretest.Options{HoldWindows: true, DiscardData: true})
	l.Serve(func(c *wiretest.Conn) { <-t.Context().Done() })
	cmd, addr, _ := startCaddy(t, "", "grpc_proxy "+l.Addr())
	c := client(t, addr)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	before := settle(t, cmd.Process.Pid, func() error {
		probe, stop := context.WithTimeout(ctx, 200*time.Millisecond)
		defer stop()
		_, err := c.EmptyCall(probe, &testgrpc.Empty{})
		return err
	})
	s, err := c.StreamingInputCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan int64, 1<<16)
	go func() {
		msg := &testgrpc.StreamingInputCallRequest{Payload: &testgrpc.Payload{Body: make([]byte, 64<<10)}}
		for n := int64(0); n < flood; n += 64 << 10 {
			if s.Send(msg) != nil {
				return
			}
			sent <- 64 << 10
		}
	}()
	var total int64
	grown := watch(t, cmd.Process.Pid, before, func() int64 {
		for {
			select {
			case n := <-sent:
				total += n
			default:
				return total
			}
		}
	})
	t.Logf("the client got rid of %.1f MiB of %d MiB; the proxy grew by %.1f MiB", mib(total), flood>>20, mib(grown))
	if grown > bound {
		t.Errorf("the proxy grew by %.1f MiB, at most %d are allowed", mib(grown), bound>>20)
	}
}

// TestMemoryClientDoesNotRead: a client does not read an answer of 1 GiB.
func TestMemoryClientDoesNotRead(t *testing.T) {
	l := wiretest.Listen(t)
	var called atomic.Bool
	var sent atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l.Serve(func(c *wiretest.Conn) {
		for {
			head := c.ExpectHeaders()
			if !strings.HasSuffix(head.Get(":path"), "StreamingOutputCall") {
				c.WriteHeaders(head.Stream, wiretest.Head("grpc-status", "12"), true)
				continue
			}
			called.Store(true)
			c.WriteHeaders(head.Stream, wiretest.Head(), false)
			c.WriteData(head.Stream, binary.BigEndian.AppendUint32([]byte{0}, flood), false) // the prefix of one huge message
			chunk := make([]byte, 16<<10)
			for n := 0; n < flood; n += len(chunk) {
				m, err := c.SendData(ctx, head.Stream, chunk, n+len(chunk) == flood)
				sent.Add(int64(m))
				if err != nil {
					break
				}
			}
			return
		}
	})
	cmd, addr, _ := startCaddy(t, "", "grpc_proxy "+l.Addr())
	probe := client(t, addr)
	before := settle(t, cmd.Process.Pid, func() error {
		_, err := probe.EmptyCall(t.Context(), &testgrpc.Empty{})
		return err
	})
	c := wiretest.Dial(t, addr, nil, wiretest.Options{
		HoldWindows: true,
		Settings:    []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1 << 30}},
	})
	c.Pause() // with a huge window the server could send all, if TCP took it
	c.Open(wiretest.Request(addr, "/grpc.testing.TestService/StreamingOutputCall"), true)
	grown := watch(t, cmd.Process.Pid, before, sent.Load)
	cancel()
	t.Logf("the upstream got rid of %.1f MiB of %d MiB; the proxy grew by %.1f MiB", mib(sent.Load()), flood>>20, mib(grown))
	if !called.Load() {
		t.Fatal("the upstream was not called")
	}
	if grown > bound {
		t.Errorf("the proxy grew by %.1f MiB, at most %d are allowed", mib(grown), bound>>20)
	}
}

// settle waits until the proxy serves, warms it up, and returns its memory.
func settle(t *testing.T, pid int, call func() error) int64 {
	t.Helper()
	eventually(t, "Caddy serves", func() bool {
		err := call()
		return err == nil || !strings.Contains(err.Error(), "connection refused")
	})
	for range 20 {
		_ = call()
	}
	return rss(t, pid)
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }
