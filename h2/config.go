package h2

import (
	"math"
	"time"
)

// The bounds of RFC 9113 sections 6.5.2 and 6.9.1, and the values that hold before any SETTINGS frame.
const (
	protocolWindow    = 65535         // initial window of a connection and of its streams
	protocolFrameSize = 16 << 10      // initial MAX_FRAME_SIZE, and its lower bound
	maxFrameSizeLimit = 1<<24 - 1     // upper bound of MAX_FRAME_SIZE
	maxWindowLimit    = math.MaxInt32 // upper bound of every window
	maxStreamID       = 1<<31 - 1
	headerTableSize   = 4096 // HPACK table, both directions: what RFC 7541 starts with is enough for metadata
)

// assumedStreams is how many streams a client may open before the peer's SETTINGS tell the limit. RFC 9113 section
// 6.5.2 advises servers not to allow fewer than 100.
const assumedStreams = 100

// Config sets the limits of a connection and the functions told about its life. The zero value is usable: every
// field has the default it names.
//
// The functions may be nil. Except where said otherwise they run without any lock of the connection held, on the
// goroutine on which the thing happened, and must not block.
type Config struct {
	// MaxStreams bounds the concurrent streams. Client role: our own limit beside the peer's; 0 means the peer's
	// alone. Server role: what SETTINGS_MAX_CONCURRENT_STREAMS announces, and what is enforced with REFUSED_STREAM;
	// default 250. A call whose stream was reset counts until it is done (Stream.Done).
	MaxStreams uint32
	// InitialWindow is the window, in bytes, a stream is granted at first; default 65,535, the protocol's own.
	InitialWindow uint32
	// MaxWindow is what a stream's window may grow to when it is measured to be the bottleneck; default 1 MiB.
	MaxWindow uint32
	// InitialConnWindow is the window the whole connection is granted at first; default 256 KiB, at least 65,535 (the
	// protocol knows no way to grant less).
	InitialConnWindow uint32
	// MaxConnWindow is what the connection's window may grow to; default 4 MiB. It bounds what can be held for slow
	// readers of the connection's streams, all together. A window that they use up stops all of the connection's streams,
	// so where streams of many belong to one connection, a huge window that leaves the bound to MaxWindow is better.
	MaxConnWindow uint32
	// Budget bounds what streams hold, together with those of all connections that have the same; default ProcessBudget.
	Budget *Budget
	// MaxFrameSize is the largest frame payload accepted; default and minimum 16 KiB.
	MaxFrameSize uint32
	// MaxHeaderListSize is the largest header list accepted, counted as RFC 9113 section 6.5.2 does (32 bytes per
	// field on top); default 1 MiB, for both roles. On the wire a block may take twice that plus 16 KiB before the
	// connection is closed with ENHANCE_YOUR_CALM.
	MaxHeaderListSize uint32
	// MaxPending is how many bytes may wait for the socket before TryWrite and Write take no more DATA; default
	// 256 KiB. With twice as much waiting (headers of open streams and control frames are not refused) the connection
	// stops reading, and opens no streams, until its peer has read.
	MaxPending int

	// WriteTimeout ends the connection when a blocked socket has taken nothing for so long; default 30 s.
	WriteTimeout time.Duration
	// SettingsTimeout bounds the wait for the preface, for the peer's first SETTINGS and (server role) for its acknowledgement
	// of ours, each counted from the start, and for the end of a header block that was begun; default 10 s.
	SettingsTimeout time.Duration
	// PingInterval sends a PING when nothing was read for so long; 0 is off. Stock gRPC servers close connections
	// that ping more often than every 5 minutes (gRFC A8).
	PingInterval time.Duration
	// PingWithoutStreams pings connections without streams too; stock gRPC servers tolerate it every 2 hours only.
	PingWithoutStreams bool
	// PingTimeout ends the connection when nothing at all is read for so long after such a PING; default 20 s.
	PingTimeout time.Duration
	// IdleTimeout shuts the connection down when it has had no stream for so long since the peer's first SETTINGS; 0 is off.
	IdleTimeout time.Duration

	// ResetBudget is how many streams the peer may make us abandon in a burst (server role: RST_STREAM of the client
	// on calls we had not begun to answer, and violations we answer with RST_STREAM); default 1,000. Resets of calls that
	// are older than a second, or at their deadline (Stream.Expires), cost nothing. It is refilled
	// by ResetRate per second, default 200, and by one for each call that ends in order. An exhausted budget closes
	// the connection with ENHANCE_YOUR_CALM (CVE-2023-44487 "rapid reset", CVE-2025-8671 "made you reset").
	ResetBudget, ResetRate int

	// PeerPrefix is what was already read from the connection.
	PeerPrefix []byte

	// OnSettings is called each time a SETTINGS frame of the peer was applied.
	OnSettings func(*Conn)
	// OnGoAway is called for each GOAWAY of the peer, after the streams it shut out were told; Code and Debug are
	// its. On a client connection no stream can be opened any more.
	OnGoAway func(*Conn, *Error)
	// OnNearlyFull is called, on client connections, when a stream was opened that leaves no more than an eighth of
	// the limit, or that had the last identifier (the connection is draining then), and when the connection has become
	// Tight: it is time for another connection. It runs on the goroutine that opened the stream, or on the timer's.
	OnNearlyFull func(*Conn)
	// OnCapacity is called, on client connections, when a stream's place became free, the peer raised its limit, or it
	// has read what kept streams from being opened (MaxPending). It must be cheap and must not take a lock that is held
	// around calls of Stream and Conn methods.
	OnCapacity func(*Conn)
	// OnIdle is called when the last stream ended.
	OnIdle func(*Conn)
	// OnBatch is called by the reading goroutine after it has handled all frames of one read, before it flushes.
	OnBatch func(*Conn)
	// OnOversized answers, in the server role, a request whose header list was larger than MaxHeaderListSize; fields
	// are those that fitted. Without it, and if it leaves the stream unanswered, the answer is a bare 431.
	OnOversized func(s *Stream, fields []Field)
	// OnClose is called exactly once, when the connection is over and all its streams have been told.
	OnClose func(*Conn, *Error)
}

// withDefaults fills in the defaults and forces values into the protocol's bounds.
func (c Config) withDefaults(client bool) Config {
	if c.MaxStreams == 0 && !client {
		c.MaxStreams = 250
	}
	c.InitialWindow = min(orDefault(c.InitialWindow, protocolWindow), maxWindowLimit)
	c.MaxWindow = min(max(orDefault(c.MaxWindow, 1<<20), c.InitialWindow), maxWindowLimit)
	c.InitialConnWindow = max(orDefault(c.InitialConnWindow, 256<<10), protocolWindow)
	c.MaxConnWindow = min(max(orDefault(c.MaxConnWindow, 4<<20), protocolWindow), maxWindowLimit)
	c.InitialConnWindow = min(c.InitialConnWindow, c.MaxConnWindow)
	c.Budget = orDefault(c.Budget, ProcessBudget)
	c.MaxFrameSize = min(max(c.MaxFrameSize, protocolFrameSize), maxFrameSizeLimit)
	c.MaxHeaderListSize = min(orDefault(c.MaxHeaderListSize, 1<<20), 1<<28)
	c.MaxPending = min(max(orDefault(c.MaxPending, 256<<10), 1), 1<<29) // twice that is still an int of 32 bits
	c.WriteTimeout = positive(c.WriteTimeout, 30*time.Second)
	c.SettingsTimeout = positive(c.SettingsTimeout, 10*time.Second)
	c.PingTimeout = positive(c.PingTimeout, 20*time.Second)
	c.ResetBudget = orDefault(c.ResetBudget, 1000)
	c.ResetRate = orDefault(c.ResetRate, 200)
	return c
}

func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

func positive(d, def time.Duration) time.Duration {
	if d <= 0 {
		return def
	}
	return d
}
