package h2

import (
	"cmp"
	"math"
	"slices"
	"sync"
)

// A client's header blocks wait for the socket as they were given, and are compressed when the pending buffer is taken for
// writing. Until then a stream can be discarded without a trace: its peer never hears of it. It could not if its block
// were compressed at once: blocks behind it may refer to what it has put into the table (RFC 7541 section 2.2), so it would have to
// be sent. The identifier of a discarded stream is skipped, which makes it closed at the peer (RFC 9113 section 5.1.1).
//
// Whether a stream has left, or can still be discarded, is decided under mu, in one step with what follows from it. So what is
// told Unprocessed for never having been sent is never sent.

// heads are the header blocks that wait, in wire order. They come from a pool, so that a connection without any has none.
type heads struct {
	queue  []head
	fields []Field // of all blocks, one after the other
	size   int     // of all blocks but those of discarded streams

	dead     []uint32 // streams that were discarded; what they have here and in the pending buffer is removed later
	deadSize int      // of their blocks
	deadData int      // bytes of DATA they have
}

// head is one block.
type head struct {
	s      *Stream
	at     int // where in the pending buffer it belongs
	upto   int // end of its fields
	size   int
	newest uint32 // the newest stream that was opened when the block was appended
	opens  bool   // it opens the stream; else it is trailers
	end    bool
}

var headPool = sync.Pool{New: func() any { return new(heads) }}

// Values of Stream.began of streams whose HEADERS have no place in what is sent. No offset, and no time, is as high as headLost.
const (
	headWaits     = math.MaxInt64 - iota // they wait, so that the stream can be discarded
	headDiscarded                        // it was
	headLost                             // the socket failed before
)

// blockSize is how much memory a block takes while it waits, near enough: it counts as pending bytes.
func blockSize(fields []Field) int {
	n := headerLen
	for i := range fields {
		n += len(fields[i].Name) + len(fields[i].Value)
	}
	return n
}

// queueHeadLocked lets a block wait behind what is in the pending buffer.
func (c *Conn) queueHeadLocked(s *Stream, fields []Field, opens, end bool) {
	out, h := c.outBuffer(), c.heads
	if h == nil {
		h = headPool.Get().(*heads)
		c.heads = h
	}
	size, newest := blockSize(fields), s.id
	if n := len(h.queue); n > 0 {
		newest = max(newest, h.queue[n-1].newest)
	}
	h.fields = append(h.fields, fields...)
	h.queue = append(h.queue, head{s: s, at: len(out.b), upto: len(h.fields), size: size, newest: newest, opens: opens, end: end})
	h.size += size
	if opens {
		s.began = headWaits
	}
}

// sealLocked compresses the blocks that wait, and puts them where they belong: from here on their streams may leave.
func (c *Conn) sealLocked() {
	h := c.heads
	if h == nil {
		return
	}
	if len(h.dead) > 0 {
		c.compactLocked()
	}
	c.heads = nil
	if len(h.queue) == 0 {
		h.free()
		return
	}
	// The shorter part of the buffer is copied away: what stands before the first block, or what stands behind.
	first, spare := h.queue[0].at, outBuffers.Get().(*buffer)
	var rest []byte
	if first > len(c.out.b)/2 {
		spare.b = append(spare.b, c.out.b[first:]...)
		rest = spare.b
		c.out.b = c.out.b[:first]
	} else {
		spare.b = append(spare.b, c.out.b[:first]...)
		rest = c.out.b[first:]
		c.out, spare = spare, c.out
	}
	at, field := first, 0
	for i := range h.queue {
		q := &h.queue[i]
		c.out.b = append(c.out.b, rest[at-first:q.at-first]...)
		if q.opens {
			q.s.began = int64(c.offset())
		}
		c.appendHeaders(q.s.id, h.fields[field:q.upto], q.end)
		at, field = q.at, q.upto
	}
	c.out.b = append(c.out.b, rest[at-first:]...)
	putOutBuffer(spare)
	h.free()
}

// discardLocked takes back a stream that has not left, with all its frames. The connection's window is as it was before.
func (c *Conn) discardLocked(s *Stream) {
	h := c.heads
	i, _ := slices.BinarySearchFunc(h.queue, s.id, func(q head, id uint32) int { return cmp.Compare(q.newest, id) })
	size := h.queue[i].size // the first with this newest stream is the one that opens it
	h.dead = append(h.dead, s.id)
	h.size -= size
	h.deadSize += size
	h.deadData += int(s.staged)
	c.takenBackLocked(int64(s.staged))
	s.began = headDiscarded
	// While the socket takes nothing they must not pile up.
	if waste := h.deadSize + h.deadData; waste > 32<<10 && 2*waste > len(c.out.b)+h.size+h.deadSize {
		c.compactLocked()
	}
	if c.stalled {
		c.cond.Broadcast()
	}
}

// takenBackLocked counts DATA that was appended and never leaves.
func (c *Conn) takenBackLocked(n int64) {
	if n == 0 {
		return
	}
	c.sendWin += n
	c.unacked = max(0, c.unacked-n)
	if !c.shortLocked() {
		c.lowAt = 0
		c.loosenLocked() // the peer, which has nothing to give back, would not bring it about
	}
	c.uncapLocked()
}

// abandonLocked discards all streams that have not left, and notes why they are over. They stay in the table until their
// receivers are told.
func (c *Conn) abandonLocked(e *Error) {
	h := c.heads
	if h == nil {
		return
	}
	own := *e
	own.Unprocessed = true // RFC 9113 section 8.7: nothing of it was ever sent
	for i := range h.queue {
		if s := h.queue[i].s; s.began == headWaits {
			s.err = &own
			h.dead = append(h.dead, s.id)
			s.began = headDiscarded
		}
	}
	c.sealLocked() // what is left is trailers
}

// loseHeadsLocked forgets what waits, since nothing is written any more.
func (c *Conn) loseHeadsLocked() {
	h := c.heads
	if h == nil {
		return
	}
	for i := range h.queue {
		if s := h.queue[i].s; s.began == headWaits {
			s.began = headLost
		}
	}
	c.heads = nil
	h.free()
}

// compactLocked removes what discarded streams have left behind: their blocks, and their frames in the pending buffer.
func (c *Conn) compactLocked() {
	h, b := c.heads, c.out.b
	slices.Sort(h.dead)
	keep, from := 0, 0 // b[:keep] stays, b[from:] was not looked at yet
	seen := false      // a discarded stream may have frames from here on
	move := func(to int) {
		if !seen {
			keep, from = to, to
			return
		}
		for from < to { // frames, of which the buffer has whole ones only
			f := parseHeader(b[from:])
			n := headerLen + f.length
			if _, dead := slices.BinarySearch(h.dead, f.id); dead {
				c.stats.FramesOut--
			} else {
				keep += copy(b[keep:], b[from:from+n])
			}
			from += n
		}
	}
	queue, fields, at := h.queue[:0], h.fields[:0], 0
	h.size = 0
	for _, q := range h.queue {
		move(q.at)
		mine := h.fields[at:q.upto]
		at = q.upto
		if q.s.began == headDiscarded {
			seen = true
			continue
		}
		fields = append(fields, mine...)
		q.at, q.upto = keep, len(fields)
		queue = append(queue, q)
		h.size += q.size
	}
	move(len(b))
	clear(h.queue[len(queue):])
	clear(h.fields[len(fields):])
	c.out.b, h.queue, h.fields = b[:keep], queue, fields
	h.dead, h.deadSize, h.deadData = h.dead[:0], 0, 0
}

// free gives the memory back. The strings of small blocks are overwritten by the next user, or collected with the pool.
func (h *heads) free() {
	clear(h.queue)
	if h.size > 16<<10 {
		clear(h.fields)
	}
	if cap(h.fields) > 4<<10 || cap(h.dead) > 4<<10 {
		return
	}
	*h = heads{queue: h.queue[:0], fields: h.fields[:0], dead: h.dead[:0]}
	headPool.Put(h)
}
