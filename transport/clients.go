package transport

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pires/go-proxyproto"
)

// clients splits an endpoint by client: for the PROXY protocol, whose header names one client per connection, so that
// calls of different clients must not share one, and for clients whose calls must not share one with others'. Each
// client's part is an endpoint of its own with the same address and limits; it goes when its last connection does, or when
// none could be made.
type clients struct {
	mu       sync.Mutex
	parts    map[netip.Addr]*Endpoint
	released bool
	parent   *Endpoint // of a part
	client   netip.Addr
	// connected is how many parts have connections.
	connected atomic.Int32
}

// For returns the endpoint to open a client's streams on: e itself, unless PROXY protocol is on.
func (e *Endpoint) For(client netip.Addr) *Endpoint {
	if e.cfg.ProxyProtocol == 0 {
		return e
	}
	return e.Own(client)
}

// Suspects returns the endpoint for streams for which the server may close the connection, whichever client's they are.
func (e *Endpoint) Suspects(client netip.Addr) *Endpoint {
	if e.cfg.ProxyProtocol == 0 {
		client = netip.IPv6Unspecified() // which is no client's
	}
	return e.Own(client)
}

// Own returns the endpoint for streams of this client alone.
func (e *Endpoint) Own(client netip.Addr) *Endpoint {
	c := &e.clients
	client = client.Unmap()
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.parts[client]; p != nil {
		return p
	}
	p := NewEndpoint(e.addr, e.cfg)
	p.link, p.mu.link, p.logger, p.limits = e.link, e.link, e.logger, e.limits
	p.clients.parent, p.clients.client = e, client
	if c.released {
		p.released = true // its connections end with their streams
		p.gone.Store(true)
		p.stop()
	}
	if c.parts == nil {
		c.parts = make(map[netip.Addr]*Endpoint)
	}
	c.parts[client] = p
	return p
}

// leaveParent makes the endpoint forget a client's part that has no connections. Whoever holds the part still can use
// it; the client's next call gets a new one.
func (e *Endpoint) leaveParent() {
	parent := e.clients.parent
	if parent == nil {
		return
	}
	c := &parent.clients
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.parts[e.clients.client] == e {
		delete(c.parts, e.clients.client)
	}
}

func (e *Endpoint) destructClients() error {
	c := &e.clients
	c.mu.Lock()
	parts := c.parts
	c.parts, c.released = nil, true
	c.mu.Unlock()
	for _, p := range parts {
		if err := p.Destruct(); err != nil {
			return err
		}
	}
	return nil
}

// writeProxyHeader opens a connection with the client's address, if that is configured. As in reverse_proxy the
// destination is all zeros: the client's own is not known behind other proxies.
func (e *Endpoint) writeProxyHeader(nc net.Conn) error {
	if e.cfg.ProxyProtocol == 0 {
		return nil
	}
	var src, dst net.Addr // nil: LOCAL or UNKNOWN, for clients without an IP address
	if ip := e.clients.client; ip.IsValid() {
		zero := net.IPv4zero
		if ip.Is6() {
			zero = net.IPv6zero
		}
		src, dst = &net.TCPAddr{IP: ip.AsSlice(), Zone: ip.Zone()}, &net.TCPAddr{IP: zero}
	}
	_ = nc.SetWriteDeadline(time.Now().Add(e.cfg.DialTimeout))
	_, err := proxyproto.HeaderProxyFromAddrs(e.cfg.ProxyProtocol, src, dst).WriteTo(nc)
	_ = nc.SetWriteDeadline(time.Time{})
	return err
}
