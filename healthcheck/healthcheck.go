// Package healthcheck finds out how endpoints are doing and writes it into their upstream.State, where the next pick sees
// it: by asking them (Active and the checks in this package), by looking at how calls went (Outliers), or both.
//
// A check is a Caddy module in the namespace http.grpc_proxy.health_checks whose type implements [Prober] and, if it can
// be told of changes instead of asking, [Watcher]. The name after the namespace is the word after health_check in the
// Caddyfile and the value of "protocol" in JSON. Modules of others are welcome.
package healthcheck

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// namespace is where the modules of this package are registered.
const namespace = "http.grpc_proxy.health_checks."

// Prober is a configured check: it asks an endpoint how it is doing. Checks outlive a reload that does not change them;
// they then go on with the new configuration's instance, and what is under way on the old one's ends there.
type Prober interface {
	// Probe asks once. The deadline of ctx is the check's timeout; when it passes, the verdict is of no interest any more.
	// Probe is called concurrently for different targets.
	Probe(ctx context.Context, t *Target) Verdict
}

// ServiceProber is a Prober that asks about services of an endpoint.
type ServiceProber interface {
	Prober
	// AskAbout names the services that are asked about besides the server as a whole, each for its own calls.
	AskAbout() (services []string)
}

// WatchMode says how a Watcher wants to be used.
type WatchMode uint8

const (
	// NoWatch: not at all; it is asked only.
	NoWatch WatchMode = iota
	// WatchOnly: it is not asked.
	WatchOnly
	// WatchAndProbe: it is asked as well, since a server that hangs tells nobody.
	WatchAndProbe
)

// Watcher is a Prober that endpoints tell of changes.
type Watcher interface {
	Prober
	WatchMode() WatchMode
	// Watch reports what the endpoint tells, until that ends or ctx does, and returns why. If the endpoint cannot tell,
	// that is ErrCannotWatch, and Watch is called again only when the endpoint was reconnected to.
	Watch(ctx context.Context, t *Target, report func(Verdict)) error
}

var (
	// ErrCannotWatch is returned by a Watch that the endpoint does not support.
	ErrCannotWatch = errors.New("the server cannot be watched")
	// ErrConnectionLost is returned (wrapped) by a Watch that ended with its connection.
	ErrConnectionLost = errors.New("the connection was lost")
	// ErrInOrder is returned (wrapped) by a Watch that the endpoint has ended in good order: it closes the connection as
	// servers do from time to time (GOAWAY), or the Watch with OK.
	ErrInOrder = errors.New("it was ended in order")
)

// Answer is what a probe has found out.
type Answer uint8

const (
	// NoAnswer: there was none, or none that says anything good.
	NoAnswer Answer = iota
	// Serving: all is well.
	Serving
	// NotServing: the endpoint itself says that it is not.
	NotServing
	// Undecided: nothing was found out, through no fault of the endpoint's.
	Undecided
)

// Verdict is the outcome of a probe.
type Verdict struct {
	Answer Answer
	// Text says why, for people; it may be empty if Answer is Serving.
	Text string
}

// Target is what is asked.
type Target struct {
	// Endpoint is the endpoint as its source describes it.
	Endpoint *upstream.Endpoint
	// Address is where to ask: the endpoint's address, with the check's own port if it has one.
	Address upstream.Address
	// Transport is how the endpoint is reached.
	Transport transport.Config
	// Service is the service to ask about, empty for the server as a whole.
	Service string
	// Timeout is how long an answer may take.
	Timeout time.Duration
	// Logger is the running configuration's.
	Logger *zap.Logger

	conns *connections
	// noService is told, if the check knows such a thing, that the server has no health service.
	noService func(why string)
}

// Host is the host that the endpoint was found by, or that its address names; localhost for a unix socket.
func (t *Target) Host() string {
	switch {
	case t.Endpoint.Name != "":
		return t.Endpoint.Name
	case t.Address.Network == "unix":
		return "localhost"
	}
	return t.Address.Host()
}

// HostPort is Host with the address's port.
func (t *Target) HostPort() string {
	if _, port, err := net.SplitHostPort(t.Address.Dial); err == nil && t.Address.Network != "unix" {
		return net.JoinHostPort(t.Host(), port)
	}
	return t.Host()
}

// connections are those that checks of one endpoint use.
type connections struct {
	// end has the connections of the endpoint's calls; calls is the same, or nil if the check has a port of its own.
	end, calls *transport.Endpoint
	addr       upstream.Address
	cfg        transport.Config

	mu     sync.Mutex
	own    *transport.Endpoint
	closed bool
}

// Scheme is what :scheme must say.
func (t *Target) Scheme() string {
	if t.Transport.TLS != nil {
		return "https"
	}
	return "http"
}

// Open opens a stream to the endpoint, on the connections of its calls: what a check proves there, calls will find. If
// these have no room to spare, the check makes a connection of its own, since a busy endpoint is not an ill one, and checks
// must not make it busy.
func (t *Target) Open(ctx context.Context, fields []h2.Field, recv h2.Receiver) (*h2.Stream, *transport.Error) {
	s, _, err := t.open(ctx, fields, recv)
	return s, err
}

// open is Open. If crowded is closed the stream's place is needed for calls.
func (t *Target) open(ctx context.Context, fields []h2.Field, recv h2.Receiver) (s *h2.Stream, crowded <-chan struct{}, err *transport.Error) {
	if t.conns.calls == nil {
		s, err = t.conns.beside().OpenWait(ctx, fields, false, recv)
		return s, nil, err
	}
	end := t.conns.calls.For(netip.Addr{})
	if end.Conns() == 0 {
		end.Retry() // checks have a pace of their own, and end the backoff for calls
	}
	return end.OpenGuest(ctx, func() *transport.Endpoint {
		end.SuspectStuck(t.Timeout)
		return t.conns.beside()
	}, fields, recv)
}

// suspect has a connection replaced on which nothing at all has come within the timeout: whether the endpoint is ill or
// only the connection, the next check shall find out.
func (t *Target) suspect(conn *h2.Conn) {
	if t.conns.calls != nil {
		t.conns.calls.For(netip.Addr{}).Suspect(conn)
	}
	t.conns.mu.Lock()
	own := t.conns.own
	t.conns.mu.Unlock()
	if own != nil {
		own.Suspect(conn)
	}
}

// retry has calls' connections made now: the endpoint was found to be well.
func (c *connections) retry() { c.end.For(netip.Addr{}).Retry() }

// beside has the connections that are not of calls.
func (c *connections) beside() *transport.Endpoint {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.own == nil {
		c.own = transport.NewBeside(c.addr, c.cfg)
		if c.closed {
			_ = c.own.Destruct() // what is opened now, opens a connection for itself
		}
	}
	return c.own
}

func (c *connections) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.own != nil {
		_ = c.own.Destruct()
	}
}

// withPort is the address with another port.
func withPort(a upstream.Address, port int) upstream.Address {
	if port == 0 || a.Network == "unix" {
		return a
	}
	return upstream.Address{Network: a.Network, Dial: net.JoinHostPort(a.Host(), strconv.Itoa(port))}
}
