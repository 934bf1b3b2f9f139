package h2

import "context"

// maxProbes is how many PINGs Alive may send while no answer to a request comes. gRPC's servers close connections that ping
// them too often (gRFC A8: more than two PINGs that are less than five minutes apart, or two hours without streams), and
// count anew when they have sent HEADERS or DATA.
const maxProbes = 2

// Alive asks the peer for a sign of life (client role): anything that comes until ctx ends is one, and a PING makes it come
// (RFC 9113 section 6.7: answers to PING should be given higher priority than any other frame). known is false if nothing can
// be said: the connection is over, or the peer must not be asked again yet.
func (c *Conn) Alive(ctx context.Context) (alive, known bool) {
	c.mu.Lock()
	now := c.nano()
	switch asked := c.probeAt != 0 && c.lastRead.Load() < c.probeAt; {
	case c.over != nil:
		c.unlock()
		return false, false
	case asked: // and not answered
		since := c.probeAt
		c.unlock()
		return c.hears(ctx, since)
	case c.probes >= maxProbes:
		c.unlock()
		return false, false
	}
	c.probes++
	c.probeAt = now
	c.unlock()
	if _, err := c.Ping(ctx); err == nil {
		return true, true
	}
	return c.lastRead.Load() >= now, c.Err() == nil
}

// hears waits whether something comes that has not come since a moment.
func (c *Conn) hears(ctx context.Context, since int64) (alive, known bool) {
	select {
	case <-ctx.Done():
	case <-c.done:
	}
	return c.lastRead.Load() >= since, c.Err() == nil
}
