package proxy

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// What one client does must not cost another its calls, although they share connections to the upstreams: some servers close
// a connection for what they are sent on it. So calls that may provoke that do not share one with the others.

const (
	// Metadata that every server takes on a stream of its own. Beyond it, stock servers close the connection instead of
	// refusing the call: nginx at a field of 8 KiB (large_client_header_buffers), HAProxy at 15 KiB in all (tune.bufsize) and
	// at about 200 fields (tune.http.maxhdr refuses those above 100 in order).
	plainMetadataBytes  = 8 << 10
	plainMetadataFields = 100
)

// cancels counts the calls that each client has lately given up after they were sent, or may have been. Servers count
// RST_STREAM frames per connection, since the rapid reset attack (CVE-2023-44487): Netty closes one after 200 in 30 s.
type cancels struct {
	budget int // 0: none is counted
	window time.Duration

	until atomic.Int64 // when the last of those who have spent their budget may share again, in Unix nanoseconds

	mu      sync.Mutex
	clients map[netip.Addr]*cancelled
	prune   int // at which size old entries are thrown away
}

type cancelled struct {
	since time.Time // when the count began
	n     int
	until time.Time // when it may share again, if it has spent its budget
}

// minPrune is how many clients are remembered before old ones are looked for.
const minPrune = 256

// note counts a cancelled call.
func (c *cancels) note(client netip.Addr, now time.Time) {
	if c.budget <= 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.clients[client]
	if e == nil {
		if len(c.clients) >= max(c.prune, minPrune) {
			c.pruneLocked(now)
		}
		if c.clients == nil {
			c.clients = make(map[netip.Addr]*cancelled)
		}
		e = &cancelled{since: now}
		c.clients[client] = e
	}
	if now.Sub(e.since) > c.window {
		e.since, e.n = now, 0
	}
	if e.n++; e.n > c.budget {
		e.until = now.Add(c.window)
		c.until.Store(max(c.until.Load(), e.until.UnixNano()))
	}
}

func (c *cancels) pruneLocked(now time.Time) {
	for client, e := range c.clients {
		if now.Sub(e.since) > c.window && now.After(e.until) {
			delete(c.clients, client)
		}
	}
	c.prune = 2 * len(c.clients)
}

// spent tells whether the client has used up its budget. It costs nearly nothing while nobody has.
func (c *cancels) spent(client netip.Addr) bool {
	until := c.until.Load()
	if until == 0 {
		return false
	}
	now := time.Now()
	if now.UnixNano() > until {
		c.until.CompareAndSwap(until, 0)
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.clients[client]
	return e != nil && !e.until.IsZero() && !now.After(e.until)
}

// gaveUp tells whether the client, or a deadline that it has set, ended the call: to the upstream that is a RST_STREAM, if it has
// heard of the call at all.
func (f *Flight) gaveUp(a *attempt) bool {
	why := f.result
	return why != nil && (why.EndedBy == call.EndedByClient || why.EndedBy == call.EndedByDeadline && a.stream != nil)
}

// connections are those that the attempt's stream is opened on: what all clients share, or what the call cannot harm others on.
func (f *Flight) connections(a *attempt) *transport.Endpoint {
	if fields := *a.head; len(fields) > plainMetadataFields || metadataBytes(fields) > plainMetadataBytes {
		f.suspect = true
	}
	switch client := f.Call.ClientIP; {
	case f.p.cancels.spent(client):
		return a.end.Own(client)
	case f.suspect:
		return a.end.Suspects(client)
	default:
		return a.end.For(client)
	}
}
