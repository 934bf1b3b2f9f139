package wiretest

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Timeout is how long every wait lasts before it fails.
const Timeout = 5 * time.Second

const (
	defaultWindow    = 65535
	defaultFrameSize = 16384
	historyLen       = 40
)

// Options change what a peer does by itself.
type Options struct {
	// TLS makes a listener speak TLS. Without NextProtos it offers h2. ([Dial] has an argument for it.)
	TLS *tls.Config
	// Settings are sent in the first SETTINGS frame, which is empty by default.
	Settings []http2.Setting
	// NoSettings sends no first SETTINGS frame (a client sends its preface alone). A server then acknowledges nothing
	// before WriteSettings, since its first frame must be SETTINGS.
	NoSettings bool
	// NoSettingsAck leaves SETTINGS without acknowledgement, NoPingAck PING.
	NoSettingsAck, NoPingAck bool
	// HoldWindows grants no window for the DATA that comes; see [Conn.HoldWindows].
	HoldWindows bool
	// DiscardData does not keep what is in DATA frames, for tests that move a lot; [Frame.Length] tells how much.
	DiscardData bool
	// Inspect is shown each frame as it comes, header blocks whole, on the connection's reading goroutine.
	Inspect func(*Conn, Frame)
}

func pick(opts []Options) Options {
	if len(opts) == 0 {
		return Options{}
	}
	return opts[0]
}

// Conn is one raw HTTP/2 connection, in either role. Its methods may be called concurrently.
type Conn struct {
	t    testing.TB
	nc   net.Conn
	opts Options
	done chan struct{} // The reader has ended.
	over *atomic.Bool  // The test has ended: what fails now fails for that reason.

	wmu      sync.Mutex // Guards what follows, and the order on the wire.
	fr       *http2.Framer
	wbuf     bytes.Buffer // Frames that wait for flush.
	batches  int          // Calls of Batch under way.
	enc      *hpack.Encoder
	encBuf   bytes.Buffer
	nextID   uint32
	writeErr error
	mute     bool // Acknowledgements must wait for our first SETTINGS.
	owed     int  // So many wait.

	mu        sync.Mutex // Guards what follows.
	changed   chan struct{}
	frames    []Frame // Not yet taken.
	history   []Frame // The last ones, without data.
	hold      bool
	paused    bool
	closed    bool
	readErr   error
	frameSize int
	initial   int64            // The peer's SETTINGS_INITIAL_WINDOW_SIZE.
	window    int64            // What the peer lets us send, on the connection …
	windows   map[uint32]int64 // … and per stream, relative to initial.
	ended     map[uint32]error // Streams that the peer has reset.
	pings     map[[8]byte]struct{}
	pingSeq   uint64
}

func newConn(t testing.TB, nc net.Conn, opts Options, firstID uint32, over *atomic.Bool) *Conn {
	c := &Conn{
		t: t, nc: nc, opts: opts, done: make(chan struct{}), over: over, nextID: firstID, changed: make(chan struct{}),
		mute: opts.NoSettings && firstID%2 == 0, hold: opts.HoldWindows, frameSize: defaultFrameSize, initial: defaultWindow, window: defaultWindow,
		windows: make(map[uint32]int64), ended: make(map[uint32]error), pings: make(map[[8]byte]struct{}),
	}
	c.fr = http2.NewFramer(&c.wbuf, nil)
	c.fr.AllowIllegalWrites = true
	c.enc = hpack.NewEncoder(&c.encBuf)
	t.Cleanup(func() {
		over.Store(true)
		c.Close()
		<-c.done
	})
	return c
}

// start begins to read. The preface has been dealt with.
func (c *Conn) start() {
	if !c.opts.NoSettings {
		c.WriteSettings(c.opts.Settings...)
	}
	go c.read()
}

// NetConn returns the connection below. Reading from it is the Conn's own business.
func (c *Conn) NetConn() net.Conn { return c.nc }

// TLS returns the state of the connection's TLS; it fails the test on a plaintext connection.
func (c *Conn) TLS() tls.ConnectionState {
	c.t.Helper()
	tc, ok := c.nc.(*tls.Conn)
	if !ok {
		c.fatalf("connection is %T, not TLS", c.nc)
	}
	return tc.ConnectionState()
}

// Close closes the connection. It may be called more than once.
func (c *Conn) Close() {
	c.mu.Lock()
	c.closed = true
	c.signal()
	c.mu.Unlock()
	_ = c.nc.Close()
}

// Abort closes the connection by a TCP reset: what is still under way is lost, and the peer's next read or write fails
// with "connection reset by peer".
func (c *Conn) Abort() {
	c.t.Helper()
	if err := abort(c.nc); err != nil {
		c.fatalf("resetting the connection: %v", err)
	}
	c.Close()
}

// abort makes the next Close of nc send a TCP reset, and closes what is below TLS, so that no close_notify is sent.
func abort(nc net.Conn) error {
	if tc, ok := nc.(*tls.Conn); ok {
		nc = tc.NetConn()
	}
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		return errors.New("not a TCP connection")
	}
	if err := tc.SetLinger(0); err != nil {
		return err
	}
	return tc.Close()
}

// CloseWrite ends this side's half of the connection (TLS close_notify, or TCP FIN); it goes on reading.
func (c *Conn) CloseWrite() {
	c.t.Helper()
	cw, ok := c.nc.(interface{ CloseWrite() error })
	if !ok {
		c.fatalf("%T cannot be closed half-way", c.nc)
	}
	if err := cw.CloseWrite(); err != nil {
		c.fatalf("closing half-way: %v", err)
	}
}

// HoldWindows sets whether the peer is left without new windows for the DATA it sends; [Conn.WriteWindowUpdate] grants
// them by hand. What came while windows were held is not granted later.
func (c *Conn) HoldWindows(hold bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hold = hold
}

// Pause stops the reading of the connection, so that TCP's own windows fill; Resume goes on with it. A frame whose
// reading has begun is still read.
func (c *Conn) Pause() { c.setPaused(true) }

// Resume undoes Pause.
func (c *Conn) Resume() { c.setPaused(false) }

func (c *Conn) setPaused(p bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paused = p
	c.signal()
}

// signal wakes all that wait for a change. c.mu is held.
func (c *Conn) signal() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// wait calls f, with c.mu held, after each change until it is true, or until the timer fires.
func (c *Conn) wait(expired <-chan time.Time, f func() bool) bool {
	for {
		c.mu.Lock()
		ok := f()
		changed := c.changed
		c.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-changed:
		case <-expired:
			return false
		}
	}
}

// fatalf ends the test with what happened on the connection so far.
func (c *Conn) fatalf(format string, args ...any) {
	c.t.Helper()
	if c.over.Load() {
		runtime.Goexit()
	}
	c.wmu.Lock()
	writeErr := c.writeErr
	c.wmu.Unlock()
	c.mu.Lock()
	readErr := c.readErr
	var b bytes.Buffer
	for _, f := range c.history {
		b.WriteString("\n\t" + f.describe())
	}
	c.mu.Unlock()
	c.t.Logf("connection %v to %v: read error: %v, write error: %v; the last frames read:%s",
		c.nc.LocalAddr(), c.nc.RemoteAddr(), readErr, writeErr, b.String())
	c.t.Fatalf(format, args...)
}
