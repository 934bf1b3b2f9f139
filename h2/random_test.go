package h2

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestRandomTraffic joins both roles back to back and runs random calls over them: sizes, windows, frame sizes, resets from
// either side at any moment, blocking and non-blocking writers. Calls nobody reset must come back whole; at the end nothing is
// open, held or pending, and windows add up.
func TestRandomTraffic(t *testing.T) {
	for name, connect := range map[string]func(t *testing.T) (net.Conn, net.Conn){
		"tcp":     func(t *testing.T) (net.Conn, net.Conn) { return tcpPair(t) },
		"tls":     func(t *testing.T) (net.Conn, net.Conn) { return tlsPair(t) },
		"pipe":    func(*testing.T) (net.Conn, net.Conn) { return net.Pipe() },
		"wrapped": func(t *testing.T) (net.Conn, net.Conn) { a, b := tcpPair(t); return wrapped{a}, wrapped{b} },
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(6) {
				wiretest.CheckLeaks(t)
				a, b := connect(t)
				randomTraffic(t, rand.New(rand.NewPCG(seed, 7)), a, b)
			}
		})
	}
}

func randomConfig(rnd *rand.Rand) Config {
	return Config{
		InitialWindow: []uint32{1, 100, 5000, 65535, 200000}[rnd.IntN(5)], InitialConnWindow: 65535 + uint32(rnd.IntN(100000)),
		MaxWindow: 1 << 18, MaxFrameSize: 16384 + uint32(rnd.IntN(50000)), MaxPending: 1000 + rnd.IntN(100000),
		MaxStreams: uint32(8 + rnd.IntN(100)), ResetBudget: 1 << 20,
	}
}

func randomTraffic(t *testing.T, rnd *rand.Rand, a, b net.Conn) {
	var resets atomic.Int64
	sc := randomConfig(rnd)
	client, server := join(t, a, b, randomConfig(rnd), sc, func(s *Stream, f []Field, end bool) Receiver {
		if f[len(f)-1].Value == "reset" {
			resets.Add(1)
			s.Reset(ErrCode(s.ID() % 14))
			return nil
		}
		return acceptEcho(s, f, end)
	})
	<-client.Ready()
	var wg sync.WaitGroup
	for range 8 {
		rnd := rand.New(rand.NewPCG(rnd.Uint64(), 1))
		wg.Go(func() {
			for range 12 {
				if err := randomCall(t, rnd, client); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	idle := func(c *Conn) func() bool {
		return func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return len(c.streams) == 0 && c.pendingLocked() == 0 && c.held == 0 && c.charged == 0 && c.senders == 0 && c.lingering == 0 &&
				c.waiters.first == nil && c.capped.first == nil && c.holders.first == nil
		}
	}
	defer func() {
		if t.Failed() {
			t.Logf("client %+v\nserver %+v", client.Stats(), server.Stats())
		}
	}()
	until(t, "client idle", idle(client))
	until(t, "server idle", idle(server))
	// What one side may send is what the other expects, less what is still collected for the next WINDOW_UPDATE.
	for _, c := range [][2]*Conn{{client, server}, {server, client}} {
		until(t, "windows", func() bool {
			c[0].mu.Lock()
			send := c[0].sendWin
			c[0].mu.Unlock()
			c[1].mu.Lock()
			defer c[1].mu.Unlock()
			return send == c[1].recvWin && c[1].recvWin+c[1].owed == c[1].window
		})
	}
	if client.Err() != nil || server.Err() != nil {
		t.Error(client.Err(), server.Err())
	}
}

// randomCall makes one call and checks what comes back.
func randomCall(t *testing.T, rnd *rand.Rand, c *Conn) error {
	size := []int{0, 1, 1000, 70000, 300000}[rnd.IntN(5)]
	if size > 0 {
		size = rnd.IntN(size) + 1
	}
	mode := rnd.IntN(6)
	head := append(requestHead[:6:6], Field{Name: "x-mode", Value: []string{"echo", "reset"}[mode&1&(mode>>1)]})
	reset := mode == 3
	b := NewBlocking()
	s, e := c.OpenStream(head, false, b)
	if e != nil {
		if e.Kind == KindNoCapacity {
			return nil
		}
		return e
	}
	msg := bytes.Repeat([]byte{byte(s.ID())}, size)
	written := make(chan *Error, 1)
	go func() {
		left := msg
		for len(left) > 0 {
			k := min(len(left), 1+rnd.IntN(40000))
			if err := s.Write(left[:k], false); err != nil {
				written <- err
				return
			}
			left = left[k:]
		}
		err := s.Write(nil, true)
		c.FlushSoon()
		written <- err
	}()
	cancel := mode == 4
	if cancel {
		_, _ = io.CopyN(io.Discard, b, int64(rand.IntN(size+1)))
		s.Reset(Cancel)
		c.Flush()
		<-written
		return nil
	}
	got, err := io.ReadAll(b)
	werr := <-written
	var he *Error
	switch {
	case reset && errors.As(err, &he) && he.Kind == KindReset && he.Remote && he.Code == ErrCode(s.ID()%14):
		return nil
	case reset:
		t.Errorf("a call to be reset ended with %v", err)
	case err != nil:
		return err
	case werr != nil:
		return werr
	case !bytes.Equal(got, msg):
		t.Errorf("%d bytes came back as %d", len(msg), len(got))
	case len(b.Trailers()) != 2:
		t.Errorf("trailers %v", b.Trailers())
	}
	return nil
}

// TestMany is the shape of the issue: 10,000 streams open at once, on 50 connections.
func TestMany(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes a moment")
	}
	const conns, streams = 50, 200
	var all []*Conn
	for range conns {
		c, _ := pair(t, Config{}, Config{}, acceptEcho)
		<-c.Ready()
		all = append(all, c)
	}
	var recs []*recorder
	var open []*Stream
	for _, c := range all {
		for range streams {
			r := newRecorderOf(t, 4)
			open = append(open, mustOpen(t, c, false, r))
			recs = append(recs, r)
		}
		c.Flush()
	}
	for i, s := range open {
		if n, err := s.TryWrite([]byte("ping"), true); n != 4 || err != nil {
			t.Fatal(n, err)
		}
		if i%streams == streams-1 {
			s.Conn().Flush()
		}
	}
	for _, r := range recs {
		r.want("head" + text(responseHead) + " false")
		r.want("data 4 false")
		r.want("trailers" + text(okTrailers))
	}
	for _, c := range all {
		if st := c.Stats(); st.Streams != 0 || st.Peak != streams {
			t.Errorf("%+v", st)
		}
	}
}
