package h2

import (
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"
)

// Conn is one HTTP/2 connection. Its methods may be called concurrently, from receivers too, except where they say
// otherwise.
//
// mu guards everything below it. It is held for short stretches only, never during a call of a receiver or of a
// function of Config, and never during a system call that can block.
type Conn struct {
	nc     net.Conn
	cfg    Config
	client bool
	accept func(*Stream, []Field, bool) Receiver
	epoch  time.Time // zero of nano
	sock   socket

	ready, leaving, done chan struct{}
	stop                 atomic.Bool  // over is set: the reader stops handling frames
	lastRead             atomic.Int64 // nano of the last read that brought something

	in       input // the reading goroutine's own
	after    []*Conn
	enders   []BatchEnder
	afterFor atomic.Pointer[Conn] // the connection whose batch has this one in its after list

	mu      sync.Mutex
	cond    sync.Cond // the reader waits on it for the writer
	over    *Error    // why the connection is over
	told    bool      // readiness was signalled
	inBatch bool      // the reader is handling frames and will flush
	events  uint8     // callbacks due at the next unlock
	stats   Stats

	// Streams.
	streams   map[uint32]*Stream
	lingering int      // server: calls that are not done though their streams are over
	nextID    uint32   // client: the next stream's identifier. server: one above the highest the peer has used
	skipped   bool     // server: the peer has left identifiers out
	draining  bool     // no new streams
	full      bool     // no new streams until most of what waits for the socket has left
	recent    []uint32 // streams we have reset (stray.go)
	recentPos int
	stray     allowance

	// What the peer's SETTINGS say.
	peerReady         bool
	peerMaxStreams    uint32
	peerMaxFrame      int
	peerInitWindow    int64
	peerMaxHeaderList uint32

	// Output (output.go).
	enc      *encoder
	heads    *heads  // header blocks that belong into out and were not compressed yet (heads.go), nil if none
	out      *buffer // appended, not yet taken by the flusher
	outBase  uint64  // offset of out's first byte in everything ever appended
	handed   uint64  // offset up to which the socket has, or may have, got it
	written  uint64  // offset up to which it certainly has (exact sockets only)
	flushing bool    // somebody flushes
	inflight int     // bytes taken and not yet written
	cur      *buffer // the writer goroutine's batch
	curOff   int
	controls int   // control frames in out that the peer made us send
	writeErr error // nothing is written any more
	stalled  bool  // the reader waits for the writer
	sendWin  int64
	waiters  waiters     // streams that wait for the connection's window or for room in the pending buffer
	capped   waiters     // streams that wait for a share of the connection's window (share.go)
	senders  int         // streams that may send DATA
	unacked  int64       // bytes of DATA sent, and not given back to the connection
	sendPeak int64       // the largest window there was
	lowAt    int64       // nano since which the window is short and nothing was given back, 0 if that is not so
	tight    atomic.Bool // it has been for long; set under mu

	// Input flow control (flow.go).
	recvWin int64 // what the peer may still send
	window  int64 // what it is granted when nothing is held
	owed    int64 // consumed, not yet given back
	held    int64 // delivered to receivers, not yet consumed
	charged int64 // of it, what the budget knows of
	cramped bool  // since held was above half of window, it has not been below a quarter
	grantAt int64 // nano of the last grant
	rtt     int64
	holders waiters // streams that have ended in order and still hold something (budget.go)

	// SETTINGS, PING, GOAWAY and time (settings.go, ping.go, timer.go).
	settingsSentAt int64
	settingsAcked  bool
	goAwayIn       *Error // the last GOAWAY of the peer
	goAwayOut      uint32 // the last stream identifier of the GOAWAY we sent; maxStreamID+1 before
	drainStep      uint8
	pings          map[uint64]*pingWait
	pingSeq        uint64
	timer          *time.Timer
	timerAt        int64 // nano at which the timer fires, 0 when it is not set
	kaSentAt       int64 // nano of the unanswered keepalive PING, 0 if none
	drainAt        int64 // nano at which the drain goes on without its PING's answer
	blockAt        int64 // nano at which an unfinished header block was begun, 0 if none
	probes         uint8 // PINGs of Alive since the last answer
	probeAt        int64 // nano of the last of them, 0 before the first
	idleAt         int64 // nano since which the connection is idle, 0 while it is not

	lim limits
}

// Client starts HTTP/2 in the client role on an established connection (after the TLS handshake, if any). It queues
// preface and SETTINGS, flushes, starts the reading goroutine and does not wait for the network.
func Client(nc net.Conn, cfg Config) *Conn {
	c := newConn(nc, cfg, true)
	c.nextID = 1
	c.start()
	return c
}

// Server starts HTTP/2 in the server role. accept runs on the reading goroutine with each validated request head, under
// the rules of Receiver; end tells that no body follows. The Receiver it returns gets the rest (RecvHead is not
// called on it); its owner calls Stream.Done when the call is over. If it returns nil the stream is reset with
// REFUSED_STREAM, unless accept has reset or answered it.
func Server(nc net.Conn, cfg Config, accept func(s *Stream, fields []Field, end bool) Receiver) *Conn {
	c := newConn(nc, cfg, false)
	c.accept = accept
	c.nextID = 1
	c.start()
	return c
}

func newConn(nc net.Conn, cfg Config, client bool) *Conn {
	cfg = cfg.withDefaults(client)
	c := &Conn{
		nc: nc, cfg: cfg, client: client, epoch: time.Now(),
		ready: make(chan struct{}), leaving: make(chan struct{}), done: make(chan struct{}),
		streams:        make(map[uint32]*Stream),
		peerMaxStreams: assumedStreams, peerMaxFrame: protocolFrameSize, peerInitWindow: protocolWindow,
		enc: newEncoder(), sendWin: protocolWindow, sendPeak: protocolWindow,
		recvWin: int64(cfg.InitialConnWindow), window: int64(cfg.InitialConnWindow),
		goAwayOut: maxStreamID + 1,
	}
	c.cond.L = &c.mu
	c.in.dec = hpack.NewDecoder(headerTableSize, c.in.field)
	c.in.maxList = int(cfg.MaxHeaderListSize)
	c.in.prefix = cfg.PeerPrefix
	c.cfg.PeerPrefix = nil
	c.sock.init(c)
	c.lim.init(cfg, client)
	return c
}

func (c *Conn) start() {
	c.cfg.Budget.join(c)
	c.mu.Lock()
	if c.client {
		c.outBuffer().b = append(c.outBuffer().b, clientPreface...)
	}
	c.appendSettingsLocked()
	if extra := c.window - protocolWindow; extra > 0 {
		c.appendWindowUpdate(0, uint32(extra))
	}
	c.settingsSentAt = c.nano()
	c.timer = time.AfterFunc(c.cfg.SettingsTimeout, c.onTimer)
	c.timerAt = c.settingsSentAt + int64(c.cfg.SettingsTimeout)
	if c.cfg.PingInterval > 0 {
		c.armLocked(c.settingsSentAt + int64(c.cfg.PingInterval))
	}
	c.unlock()
	c.Flush()
	go c.read()
}

// nano is the monotonic time since the connection's start, never 0.
func (c *Conn) nano() int64 { return int64(time.Since(c.epoch)) + 1 }

const (
	evCapacity   = 1 << iota // a stream's place became free, the limit rose, or the socket took what waited
	evIdle                   // the last stream ended
	evNearlyFull             // few streams more can be opened, or none ever
)

// unlock releases mu and makes the calls that became due under it.
func (c *Conn) unlock() {
	ev := c.events
	c.events = 0
	c.mu.Unlock()
	if ev&evCapacity != 0 && c.cfg.OnCapacity != nil {
		c.cfg.OnCapacity(c)
	}
	if ev&evIdle != 0 && c.cfg.OnIdle != nil {
		c.cfg.OnIdle(c)
	}
	if ev&evNearlyFull != 0 && c.cfg.OnNearlyFull != nil {
		c.cfg.OnNearlyFull(c)
	}
}

// Ready is closed when the peer's first SETTINGS has been applied, or when the connection is over.
func (c *Conn) Ready() <-chan struct{} { return c.ready }

// Done is closed when the connection is over: all streams have been told and OnClose has returned.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err says why the connection is over, nil while it is not.
func (c *Conn) Err() *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.over
}

// NetConn returns the connection below. It must not be read from or written to.
func (c *Conn) NetConn() net.Conn { return c.nc }

// Streams is the number of open streams.
func (c *Conn) Streams() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams)
}

// Draining tells whether the connection takes no new streams: it is over, was shut down, its peer sent GOAWAY, or its
// stream identifiers are used up.
func (c *Conn) Draining() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.draining
}

// Leaving is closed when Draining becomes true.
func (c *Conn) Leaving() <-chan struct{} { return c.leaving }

// Silence is for how long nothing has come from the peer.
func (c *Conn) Silence() time.Duration { return time.Duration(c.nano() - c.lastRead.Load()) }

// Available is the number of streams that could be opened now: 0 when the connection is draining or over or more than
// Config.MaxPending waits for the socket, until half of that is left, or when the peer's window has stayed used up (see Tight), and
// counted against an assumed limit of 100 before the peer's SETTINGS have come.
// Client role.
func (c *Conn) Available() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.availableLocked()
}

func (c *Conn) availableLocked() int {
	if !c.client || c.draining || c.writeErr != nil || c.full || c.tight.Load() && c.sendWin < shareStep {
		return 0
	}
	return max(0, c.streamLimitLocked()-len(c.streams))
}

// streamLimitLocked is how many streams this side may have open: the peer's limit, or the own one if that is lower. There are
// no more identifiers than 31 bits have, and so it fits an int of 32 bits.
func (c *Conn) streamLimitLocked() int {
	limit := min(int64(c.peerMaxStreams), maxStreamID)
	if c.cfg.MaxStreams > 0 {
		limit = min(limit, int64(c.cfg.MaxStreams))
	}
	return int(limit)
}

// OpenStream opens a stream (client role): it allocates the identifier and appends HEADERS, with END_STREAM if end is
// set, under one lock, and does not flush. A stream that is over before somebody has flushed is never sent. r's methods may run as soon as somebody flushes, before OpenStream has
// returned. Errors are of KindNoCapacity, KindGoAway, KindConnLost or KindLocal (or why else the connection is over), or of
// KindHeaderListSize, where the peer has said that it would not take so many fields; all with Unprocessed set.
func (c *Conn) OpenStream(fields []Field, end bool, r Receiver) (*Stream, *Error) {
	c.mu.Lock()
	if c.availableLocked() == 0 {
		err := c.refusalLocked()
		c.unlock()
		return nil, err
	}
	if most := c.peerMaxHeaderList; most > 0 {
		if n := listSize(fields); n > uint64(most) {
			c.unlock()
			return nil, &Error{
				Kind: KindHeaderListSize, Remote: true, Unprocessed: true,
				Debug: fmt.Sprintf("%d bytes, the peer accepts %d (SETTINGS_MAX_HEADER_LIST_SIZE)", n, most),
			}
		}
	}
	s := &Stream{
		c: c, id: c.nextID, r: r, sendWin: c.peerInitWindow, want: -1,
		recvWin: c.firstWindowLocked(), window: int64(c.cfg.InitialWindow), sentEnd: end,
	}
	for i := range fields {
		if f := &fields[i]; f.Name == ":method" {
			s.noBody = f.Value == "HEAD"
			break
		}
	}
	c.addLocked(s)
	if limit := c.streamLimitLocked(); limit-len(c.streams) == limit/8 {
		c.events |= evNearlyFull
	}
	c.nextID += 2
	if c.nextID > maxStreamID {
		// RFC 9113 section 5.1.1: a client that runs out of identifiers opens a new connection.
		c.leaveLocked()
		c.events |= evNearlyFull
	}
	c.queueHeadLocked(s, fields, true, end)
	// HEADERS are taken whatever waits already. So that they neither pile up nor fill what DATA of the streams there could
	// use, and what stops the reader, streams are opened again only when DATA is taken again.
	c.full = c.full || c.pendingLocked() > c.cfg.MaxPending
	c.unlock()
	return s, nil
}

// refusalLocked says why no stream can be opened.
func (c *Conn) refusalLocked() *Error {
	switch {
	case c.over != nil:
		e := *c.over
		e.Unprocessed = true
		return &e
	case c.writeErr != nil:
		return &Error{Kind: KindConnLost, Unprocessed: true, Err: c.writeErr}
	case c.goAwayIn != nil:
		e := *c.goAwayIn
		e.Unprocessed = true
		return &e
	case c.draining:
		return &Error{Kind: KindLocal, Unprocessed: true, Debug: "the connection is being shut down"}
	}
	return &Error{Kind: KindNoCapacity, Unprocessed: true}
}

func (c *Conn) addLocked(s *Stream) {
	c.streams[s.id] = s
	if !s.sentEnd {
		c.senders++
	}
	c.stats.Opened++
	c.stats.Peak = max(c.stats.Peak, len(c.streams))
	c.idleAt = 0
}

// removeLocked takes a stream that is over out of the table.
func (c *Conn) removeLocked(s *Stream) {
	s.closed = true
	if s.began == headWaits {
		c.discardLocked(s)
	}
	if s.recvEnd {
		c.stats.Completed++
	}
	s.wakeLocked()
	c.waiters.remove(s)
	c.capped.remove(s)
	s.lingerLocked()
	if s.held > 0 {
		c.holders.add(s)
	}
	s.shrinkLocked()
	delete(c.streams, s.id)
	if !s.sentEnd {
		c.fewerSendersLocked()
	}
	if c.client {
		c.events |= evCapacity
	}
	if len(c.streams) > 0 {
		return
	}
	c.events |= evIdle
	c.idleSinceLocked(c.nano())
	c.endIfDrainedLocked()
}
