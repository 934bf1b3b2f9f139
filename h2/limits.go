package h2

// maxControls bounds the answers (acknowledgements, RST_STREAM) that wait for the socket.
const maxControls = 10000

// limits are token buckets for what costs us more than the peer. Each holds a burst and is refilled with time; some
// are refilled by work that makes the frames legitimate. They are generous: a bucket is for attackers, not for tuning.
type limits struct {
	resets        bucket // streams abandoned by the peer or because of it (server role)
	settings      bucket // SETTINGS, GOAWAY
	pings         bucket // PING; DATA and HEADERS we send refill it, as gRFC A8 does (BDP probing pings once per round trip)
	windowUpdates bucket // WINDOW_UPDATE; DATA and HEADERS we send refill it
	emptyData     bucket // DATA without payload and END_STREAM; header blocks and DATA with a payload refill it
	ignored       bucket // PRIORITY, unknown frames, frames on closed streams; refilled like pings
	informational bucket // 1xx; final response heads refill it
}

type bucket struct {
	burst, rate, left int32
	at                int64 // nano of the last refill
}

func (l *limits) init(cfg Config, client bool) {
	set := func(b *bucket, burst, rate int) {
		b.burst, b.rate, b.left = int32(burst), int32(rate), int32(burst)
	}
	set(&l.resets, cfg.ResetBudget, cfg.ResetRate)
	set(&l.settings, 100, 10)
	set(&l.pings, 500, 50)
	set(&l.windowUpdates, 20000, 2000)
	set(&l.emptyData, 100, 10)
	set(&l.ignored, 20000, 2000)
	set(&l.informational, 1000, 100)
	if client {
		// A server is not a stranger, and many calls hang on its connection: habits of its that cost next to nothing are no
		// reason to end them. Where a frame belongs to a stream, it is that which ends when it is too much.
		set(&l.settings, 1000, 100)
		set(&l.pings, 20000, 2000)
		set(&l.emptyData, 20000, 2000)
	}
}

// take takes one token, and tells whether there was one.
func (l *limits) take(b *bucket, now int64) bool {
	if b.left == 0 {
		if add := (now - b.at) / 1e6 * int64(b.rate) / 1e3; add > 0 {
			b.left = int32(min(int64(b.burst), add))
			b.at = now
		}
	} else if b.left == b.burst {
		b.at = now
	}
	if b.left <= 0 {
		return false
	}
	b.left--
	return true
}

// progress notes that we have sent DATA or HEADERS: the peer has a reason to talk about the connection.
func (l *limits) progress() {
	l.pings.left = l.pings.burst
	l.windowUpdates.left = l.windowUpdates.burst
	l.ignored.left = l.ignored.burst
}

// content notes a header block, or DATA with a payload: the empty frames before it were a habit of the peer's, not a flood.
func (l *limits) content() { l.emptyData.left = l.emptyData.burst }

// answered notes a final response head.
func (l *limits) answered() { l.informational.left = l.informational.burst }

// completed notes a stream that ended in order.
func (l *limits) completed() { l.resets.left = min(l.resets.left+1, l.resets.burst) }
