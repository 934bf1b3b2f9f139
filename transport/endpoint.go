package transport

import (
	"context"
	"crypto/tls"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

var randFloat = rand.Float64

// Endpoint is the connections to one address. It is shared by all handlers that reach the address in the same way, whatever
// they think of its health, and survives reloads (see Pool). Connections are dialled when calls need them.
type Endpoint struct {
	addr upstream.Address
	cfg  Config
	// link is how the connections are, for the States to show. Clients' parts have their parent's.
	link *upstream.Link
	tls  struct {
		mu        sync.Mutex
		from, cur *tls.Config // cur was made of from
	}
	// logger is the running configuration's, and limits are in force. Clients' parts have their parent's.
	logger *atomic.Pointer[zap.Logger]
	limits *atomic.Pointer[limits]

	// conns are the connections that take new streams, oldest first. The slice is replaced, never changed, under mu;
	// calls read it without a lock.
	conns atomic.Pointer[[]*conn]
	// waiting is len(line.waiters) for those who do not hold mu.
	waiting atomic.Int32
	// gone is released for those who do not hold mu.
	gone atomic.Bool

	// kicked tells serve that there may be room; freed counts the streams that have become free since it has looked.
	kicked chan struct{}
	freed  atomic.Int32

	mu       mutex
	line     line
	serving  bool
	expiry   *time.Timer // fires at expires, when the first of the line has waited for too long
	expires  time.Time
	dialing  bool
	dialled  time.Time // when the last dial began
	early    *conn     // is being made, and may be used for one call (see Ticket.Early)
	released bool
	backoff  backoff
	ping     time.Duration
	stop     context.CancelFunc
	ctx      context.Context
	keepers  []int   // how many connections somebody wants to be kept
	users    []*user // see Use

	clients clients
	guests  guests
}

// conn is one connection in the pool.
type conn struct {
	*h2.Conn
	// used tells whether a stream was ever opened on it.
	used atomic.Bool
	// made is when the peer's SETTINGS had come. It and age are Endpoint.mu's.
	made time.Time
	age  *time.Timer
}

func (c *conn) stopTimer() {
	if c.age != nil {
		c.age.Stop()
	}
}

// Pool is the process's endpoints.
var Pool = upstream.NewPool[*Endpoint]()

// Acquire returns the endpoint for the address and configuration, shared with everyone who asked for the same.
func Acquire(l *upstream.Lease[*Endpoint], addr upstream.Address, cfg Config) (*Endpoint, error) {
	return l.Acquire(Key(addr, cfg), func() (*Endpoint, error) {
		return NewEndpoint(addr, cfg), nil
	})
}

// Key is what endpoints are shared by.
func Key(addr upstream.Address, cfg Config) string { return addr.Key() + " " + cfg.Identity }

// NewEndpoint makes an endpoint outside the pool. The caller calls Destruct when done.
func NewEndpoint(addr upstream.Address, cfg Config) *Endpoint {
	cfg = cfg.withDefaults()
	e := &Endpoint{
		addr: addr, cfg: cfg, link: new(upstream.Link), ping: max(cfg.PingInterval, 0), kicked: make(chan struct{}, 1),
		logger: new(atomic.Pointer[zap.Logger]), limits: new(atomic.Pointer[limits]),
	}
	e.mu.link = e.link
	e.conns.Store(new([]*conn))
	e.logger.Store(cfg.Logger)
	e.limits.Store(cfg.limits())
	e.ctx, e.stop = context.WithCancel(context.Background())
	return e
}

// clientTLS is the configuration for a handshake that begins now. Sessions of one before are not resumed: what they rest on
// may not be trusted any more, and a resumed session is not verified again.
func (e *Endpoint) clientTLS() *tls.Config {
	e.tls.mu.Lock()
	defer e.tls.mu.Unlock()
	from := e.cfg.TLS
	if e.cfg.CurrentTLS != nil {
		from = e.cfg.CurrentTLS(e.logger.Load())
	}
	if e.tls.cur != nil && e.tls.from == from {
		return e.tls.cur
	}
	c := from.Clone()
	c.NextProtos = []string{alpn}
	if c.ServerName = e.cfg.TLS.ServerName; c.ServerName == "" {
		c.ServerName = e.addr.Host()
	}
	if c.ClientSessionCache == nil {
		c.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	}
	e.tls.from, e.tls.cur = from, c
	return c
}

// Address is the endpoint's address as it is logged.
func (e *Endpoint) Address() string { return e.addr.String() }

// Attach has the State show how the endpoint's connections are until detach is called. See upstream.Link.
func (e *Endpoint) Attach(s *upstream.State) (detach func()) { return e.link.Attach(s) }

// Scheme is what :scheme must say on the endpoint's connections: https or http.
func (e *Endpoint) Scheme() string {
	if e.cfg.TLS != nil {
		return "https"
	}
	return "http"
}

// Conns is the number of connections that take new streams.
func (e *Endpoint) Conns() int { return len(*e.conns.Load()) }

// Ready tells whether calls find a connection; where each client has its own, that it is not known.
func (e *Endpoint) Ready() bool { return e.cfg.ProxyProtocol != 0 || len(*e.conns.Load()) > 0 }

// startDialLocked dials in the background unless that is under way or not needed. In a backoff it waits for the end of that.
func (e *Endpoint) startDialLocked() {
	conns := *e.conns.Load()
	switch {
	case e.dialing || len(conns) >= e.MaxConns():
		return
	case slices.ContainsFunc(conns, func(c *conn) bool { return c.Draining() }):
		return // we are about to be told of its end; whether there is to be a pause depends on that
	case e.backoff.activeLocked():
		e.wakeUpLocked()
		return
	case e.released:
		if len(e.line.waiters) == 0 {
			return
		}
		if e.ctx.Err() != nil {
			e.ctx, e.stop = context.WithCancel(context.Background())
		}
	}
	e.dialing, e.dialled = true, time.Now()
	go e.dialInBackground(e.ctx)
}

func (e *Endpoint) dialInBackground(ctx context.Context) {
	c := new(conn)
	err := e.dial(ctx, c)

	e.mu.Lock()
	defer e.mu.Unlock()
	e.dialing, e.early = false, nil
	e.link.Stir()
	e.mu.changed(true)
	if err == nil && c.Draining() {
		// It was sent away before it could be used. What waits here must not dial again and again without a pause.
		err = e.dialError(KindDial, errSentAway)
	}
	switch {
	case err != nil && ctx.Err() != nil && len(e.line.waiters) > 0: // it was given up, and then somebody came
		e.startDialLocked()
		return
	case err != nil:
		e.dialFailedLocked(err)
		return
	}
	switch {
	case e.released && len(e.line.waiters) == 0:
		go c.Shutdown()
		return
	case len(*e.conns.Load()) >= e.MaxConns(): // fewer are allowed than when the dial began
		go c.Shutdown()
		e.trimLocked()
		return
	}
	c.made = time.Now()
	conns := append(slices.Clone(*e.conns.Load()), c)
	e.conns.Store(&conns)
	e.dialledLocked(len(conns))
	if len(conns) == 1 {
		e.connectedLocked(c.made)
	}
	if e.cfg.MaxAge > 0 && !e.released {
		c.age = time.AfterFunc(jitter(e.cfg.MaxAge, 0.1), func() { e.retire(c) })
	}
	select {
	case <-c.Done(): // its OnClose came before it was in the list
		if e.removeLocked(c) {
			c.stopTimer()
			e.lostLocked(c, c.Err())
		}
	default:
	}
	e.noteRoomLocked()
	e.kick()
	if e.shortLocked() || len(*e.conns.Load()) < e.keptLocked() {
		e.startDialLocked()
	}
	e.trimLocked()
	if len(*e.conns.Load()) > 0 {
		e.fullLocked() // the peer may allow no streams
	}
}

// connectedLocked notes that there is a connection, since then, or none any more.
func (e *Endpoint) connectedLocked(since time.Time) {
	if p := e.clients.parent; p == nil {
		e.mu.changed(e.link.SetConnected(since))
	} else if since.IsZero() {
		p.clients.connected.Add(-1)
	} else {
		p.clients.connected.Add(1)
	}
}

// Preconnect makes n connections, one after the other, and replaces those that end, until stop is called. Of those who call it
// the one who wants most gets it. Afterwards the connections stay until they have been idle for long.
func (e *Endpoint) Preconnect(n int) (stop func()) {
	if n == 0 {
		return func() {}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.keepers = append(e.keepers, n); len(*e.conns.Load()) < n {
		e.startDialLocked()
	}
	return sync.OnceFunc(func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		i := slices.Index(e.keepers, n)
		e.keepers = slices.Delete(e.keepers, i, i+1)
	})
}

// keptLocked is how many connections are kept though nobody needs them.
func (e *Endpoint) keptLocked() int {
	most := 0
	for _, n := range e.keepers {
		most = max(most, n)
	}
	return most
}

// connWindow is the flow-control window of a connection to an upstream. All clients' calls share the connection, and
// what a client does not take stays charged to it: with a window that a few such clients can use up, they would stop
// everybody else's answers. So it is as good as none, like the 1 GiB of Go's own client, and what is held for slow readers
// is bounded by the windows of their streams.
const connWindow = 1 << 30

// connConfig binds a connection's events to the endpoint.
func (e *Endpoint) connConfig(c *conn) h2.Config {
	e.mu.Lock()
	ping := e.ping
	e.mu.Unlock()
	return h2.Config{
		MaxStreams:         e.cfg.MaxStreamsPerConn,
		MaxHeaderListSize:  e.cfg.MaxHeaderListSize,
		PingInterval:       ping,
		PingTimeout:        e.cfg.PingTimeout,
		PingWithoutStreams: e.cfg.PingWithoutStreams,
		IdleTimeout:        max(e.cfg.IdleTimeout, 0),
		InitialConnWindow:  connWindow,
		MaxConnWindow:      connWindow,
		OnCapacity:         func(*h2.Conn) { e.capacity() },
		OnIdle:             func(*h2.Conn) { e.idle() },
		OnNearlyFull:       func(*h2.Conn) { e.nearlyFull(c) },
		OnGoAway:           func(_ *h2.Conn, err *h2.Error) { e.goneAway(c, err) },
		OnClose:            func(_ *h2.Conn, err *h2.Error) { e.closed(c, err) },
	}
}

// capacity runs whenever a stream slot became free.
func (e *Endpoint) capacity() {
	switch {
	case e.waiting.Load() > 0:
		e.freed.Add(1)
		e.kick()
	case e.clients.parent == nil && e.link.Has(upstream.NoRoom):
		e.mu.Lock()
		e.noteRoomLocked()
		e.mu.Unlock()
	}
}

// idle runs whenever a connection's last stream has ended.
func (e *Endpoint) idle() {
	if !e.gone.Load() {
		return
	}
	e.mu.Lock()
	e.restLocked()
	e.mu.Unlock()
}

// restLocked lets go of what a released endpoint needs no more.
func (e *Endpoint) restLocked() {
	if !e.released || len(e.line.waiters) > 0 {
		return
	}
	e.stop()
	for _, c := range *e.conns.Load() {
		if c.Streams() == 0 {
			go c.Shutdown() // it may call back
		}
	}
}

// nearlyFull dials another connection before the ones there are full (gRFC A105), so that no call has to wait for it.
func (e *Endpoint) nearlyFull(c *conn) {
	if c.Draining() { // its stream identifiers are used up
		e.retire(c)
		return
	}
	e.guests.leave()
	e.mu.Lock()
	defer e.mu.Unlock()
	conns := *e.conns.Load()
	for _, c := range conns {
		if free := c.Available(); !c.Tight() && free > (free+c.Streams())/8 {
			return
		}
	}
	e.startDialLocked()
}

// goneAway takes the connection out of use; its streams finish. A new one is dialled in time for the next call.
func (e *Endpoint) goneAway(c *conn, err *h2.Error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err.Code == h2.EnhanceYourCalm && err.Debug == "too_many_pings" && e.ping > 0 {
		// gRFC A8: on too_many_pings, double the interval.
		e.ping *= 2
		e.logger.Load().Warn("upstream says its connections are pinged too often; pinging half as often from now on",
			zap.String("upstream", e.Address()), zap.Duration("interval", e.ping))
	}
	if e.removeLocked(c) {
		e.logger.Load().Debug("upstream sent GOAWAY", zap.String("upstream", e.Address()), zap.Error(err))
		e.lostLocked(c, err)
	}
}

func (e *Endpoint) closed(c *conn, err *h2.Error) {
	e.mu.Lock()
	c.stopTimer()
	switch removed := e.removeLocked(c); {
	case removed && err.Kind != h2.KindLocal:
		e.logger.Load().Debug("connection to upstream ended", zap.String("upstream", e.Address()), zap.Error(err))
		e.lostLocked(c, err)
	case removed:
		e.logger.Load().Debug("connection to upstream was idle", zap.String("upstream", e.Address()), zap.Error(err))
		if len(e.keepers) > 0 || e.shortLocked() { // else it may stay away
			e.replaceLocked(c)
		}
	case !c.made.IsZero() && c.proven():
		e.backoff.endLocked() // it was on its way out, and has served its last streams
	}
	unused := e.unusedLocked()
	e.mu.Unlock()
	if unused {
		e.leaveParent()
	}
}

func (e *Endpoint) unusedLocked() bool {
	return len(*e.conns.Load()) == 0 && len(e.line.waiters) == 0 && !e.dialing && !e.backoff.activeLocked()
}

// replaceLocked dials anew if the connection that went away is needed.
func (e *Endpoint) replaceLocked(c *conn) {
	if e.neededLocked(c) {
		e.startDialLocked()
	}
}

// neededLocked tells whether another connection is to take the place of the one that went away.
func (e *Endpoint) neededLocked(c *conn) bool {
	n := len(*e.conns.Load())
	return e.shortLocked() || n == 0 && c.used.Load() && e.clients.parent == nil || n < e.keptLocked()
}

func (e *Endpoint) removeLocked(c *conn) bool {
	old := *e.conns.Load()
	i := slices.Index(old, c)
	if i < 0 {
		return false
	}
	conns := slices.Delete(slices.Clone(old), i, i+1)
	e.conns.Store(&conns)
	if len(conns) == 0 {
		e.line.pace = pace{at: time.Now()}
		if e.clients.parent == nil {
			e.mu.changed(e.link.SetRoom(true))
		}
		e.connectedLocked(time.Time{})
	}
	return true
}

// retire takes an old connection out of use; its streams finish.
func (e *Endpoint) retire(c *conn) {
	e.mu.Lock()
	removed := e.removeLocked(c)
	if removed {
		e.replaceLocked(c)
	}
	e.mu.Unlock()
	if removed {
		c.Shutdown()
	}
}

// Suspect takes a connection out of use on which the upstream has answered nothing for long, as retire does: perhaps it is
// dead, and only its end is not heard of (a proxy in between that has lost the other half, say). Others may well work.
func (e *Endpoint) Suspect(hc *h2.Conn) {
	for _, c := range *e.conns.Load() {
		if c.Conn == hc {
			e.retire(c)
		}
	}
}

// SuspectStuck is Suspect for all connections whose peer has taken nothing and said nothing for so long, although there is
// something for it to take.
func (e *Endpoint) SuspectStuck(d time.Duration) {
	for _, c := range *e.conns.Load() {
		if c.Silence() > d && c.Stats().Pending > 0 {
			e.retire(c)
		}
	}
}

// Destruct is called when the last configuration that uses the endpoint is gone: its connections close when their
// last streams end. Calls that are still under way there may go on and even open streams: on connections that close as
// soon as they have none any more.
func (e *Endpoint) Destruct() error {
	e.mu.Lock()
	e.released = true
	e.gone.Store(true)
	e.backoff.resetLocked()
	e.mu.changed(e.link.SetBackoff(false))
	conns := *e.conns.Load()
	for _, c := range conns {
		e.removeLocked(c)
	}
	if len(e.line.waiters) > 0 {
		e.startDialLocked()
	} else {
		e.stop()
	}
	e.mu.Unlock()
	for _, c := range conns { // without mu: connections may call back
		c.stopTimer()
		c.Shutdown()
	}
	return e.destructClients()
}
