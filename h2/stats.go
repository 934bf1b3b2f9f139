package h2

import "time"

// Stats is a snapshot of one connection. Counters count from the start of the connection.
type Stats struct {
	// Streams open now; Opened so far; Peak is the most at one time.
	Streams, Peak int
	Opened        uint64
	// Lingering counts calls of the server role whose streams were reset and that are not done yet (Stream.Done).
	Lingering int
	// Completed is how many streams the peer has ended in order.
	Completed uint64
	// FramesIn and FramesOut count frames, BytesIn and BytesOut bytes on the connection (inside TLS).
	FramesIn, FramesOut uint64
	BytesIn, BytesOut   uint64
	// Reads counts read batches, Flushes the batches given to the socket, HandOvers how often the socket did not take
	// a batch at once and the writer goroutine took over.
	Reads, Flushes, HandOvers uint64
	// Pending is how many bytes wait for the socket, PendingPeak the most so far.
	Pending, PendingPeak int
	// Held is how many DATA bytes receivers have not consumed yet, HeldPeak the most so far.
	Held, HeldPeak int64
	// Window is the window granted to the peer for the connection now; SendWindow what the peer grants us.
	Window     uint32
	SendWindow int64
	// RTT is the last measured round trip, 0 before the first.
	RTT time.Duration

	// What unfriendly peers are counted by.
	ResetsIn          uint64 // RST_STREAM of the peer on open streams
	PrematureResets   uint64 // of them, those that cost budget: server role, before an answer was begun, of young calls
	InducedResets     uint64 // RST_STREAM we had to send because the peer broke a rule
	Refused           uint64 // streams above our limit of concurrent streams
	OversizedHeaders  uint64 // header lists above MaxHeaderListSize
	SettingsIn        uint64 // SETTINGS frames, without acknowledgements
	PingsIn           uint64 // PING frames, without acknowledgements
	EmptyData         uint64 // DATA frames without payload and END_STREAM
	WindowUpdatesIn   uint64
	Continuations     uint64
	Ignored           uint64 // PRIORITY, unknown frames, frames on streams that are over
	FloodsStopped     uint64 // connections closed with ENHANCE_YOUR_CALM: 0 or 1
	ReaderStalls      uint64 // how often reading stopped because the peer did not read
	SettingsAcked     bool   // the peer has acknowledged our SETTINGS
	PeerSettings      bool   // the peer's SETTINGS have been applied
	PeerMaxStreams    uint32
	PeerMaxFrameSize  uint32
	PeerInitialWindow uint32
	PeerMaxHeaderList uint32 // 0: not announced
}

// Stats returns the figures of the connection.
func (c *Conn) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := c.stats
	st.Streams = len(c.streams)
	st.Lingering = c.lingering
	st.Pending = c.pendingLocked()
	st.Held = c.held
	st.Window = uint32(c.window)
	st.SendWindow = c.sendWin
	st.RTT = time.Duration(c.rtt)
	st.SettingsAcked = c.settingsAcked
	st.PeerSettings = c.peerReady
	st.PeerMaxStreams = c.peerMaxStreams
	st.PeerMaxFrameSize = uint32(c.peerMaxFrame)
	st.PeerInitialWindow = uint32(c.peerInitWindow)
	st.PeerMaxHeaderList = c.peerMaxHeaderList
	return st
}
