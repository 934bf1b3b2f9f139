package backendtest

import (
	"net"
	"sync"
)

// connListener knows the connections it has accepted.
type connListener struct {
	net.Listener

	mu       sync.Mutex
	accepted int
	conns    map[*conn]struct{}
}

func newConnListener(l net.Listener) *connListener {
	return &connListener{Listener: l, conns: make(map[*conn]struct{})}
}

// Accept returns the next connection.
func (l *connListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: nc, l: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.accepted++
	l.conns[c] = struct{}{}
	return c, nil
}

func (l *connListener) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.accepted
}

func (l *connListener) open() []net.Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := make([]net.Conn, 0, len(l.conns))
	for c := range l.conns {
		all = append(all, c)
	}
	return all
}

// conn leaves its listener's table when it is closed.
type conn struct {
	net.Conn
	l *connListener
}

// Close closes the connection.
func (c *conn) Close() error {
	c.l.mu.Lock()
	delete(c.l.conns, c)
	c.l.mu.Unlock()
	return c.Conn.Close()
}
