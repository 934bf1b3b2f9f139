package healthcheck

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// randFloat is the source of chance; tests replace it.
var randFloat = rand.Float64

// memory is what is remembered of a check when it stops, by what it asked. A later configuration that asks the same, if at
// other times, goes on from there: a reload neither makes an unhealthy endpoint healthy nor asks it before its time.
type memory struct {
	mu     sync.Mutex
	status status
	why    string
	due    time.Time
	begun  uint32 // calls on the endpoint when it was asked last
}

type memoryKey struct{ question, service string }

// checker is one check of one endpoint: what has been answered, and when to ask again.
type checker struct {
	g *checks
	// Its own: what is under way when the check ends may outlast its next beginning.
	ctx    context.Context
	cancel context.CancelFunc
	target Target // but for Logger
	mem    *memory

	mu      sync.Mutex
	status  status
	passes  int
	fails   int
	edge    bool   // the status has just changed
	begun   uint32 // as in memory
	pushes  uint64 // counts what the endpoint has told unasked
	stopped bool
	timer   *time.Timer

	// See flap.go.
	recoveries recoveries
	holdUntil  time.Time // when good news will have lasted long enough, if it has to
	hold       *time.Timer

	kick    chan struct{} // the endpoint was reconnected to
	watched func()        // stops watching the State
}

func newChecker(g *checks, service string) *checker {
	mem := g.r.memoryLocked(memoryKey{g.settings.Load().question, service})
	c := &checker{g: g, target: g.target, mem: mem, kick: make(chan struct{}, 1)}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.target.Service = service
	return c
}

// asks is the target as of now.
func (c *checker) asks() *Target {
	t := c.target
	t.Logger = c.g.settings.Load().logger
	return &t
}

// spread is the time over which the first checks of many endpoints are spread.
const spread = 100 * time.Millisecond

func (c *checker) start() {
	a := c.g.settings.Load()
	interval := time.Duration(a.Interval)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mem.mu.Lock()
	c.status, c.begun = c.mem.status, c.mem.begun
	why, due := c.mem.why, c.mem.due
	c.mem.mu.Unlock()
	if c.status == connecting && a.Initial == InitialHealthy {
		c.status = healthy
	}
	c.voteLocked(why)

	w, watches := a.prober.(Watcher)
	mode := NoWatch
	if watches {
		mode = w.WatchMode()
	}
	wait := time.Until(due)
	if due.IsZero() || wait > interval {
		wait = time.Duration(randFloat() * float64(min(spread, interval)))
	}
	wait = max(wait, 0)
	if mode != WatchOnly {
		c.timer = time.AfterFunc(wait, c.run)
	}
	if mode != NoWatch {
		c.watched = c.g.state.Watch(func(ch upstream.Change) {
			if ch == upstream.Disconnected {
				select {
				case c.kick <- struct{}{}:
				default:
				}
			}
		})
		go c.watch(w, mode, min(wait, spread))
	}
}

// stop ends the check. What it knew is remembered.
func (c *checker) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	c.cancel()
	c.badNewsLocked()
	if c.timer != nil {
		c.timer.Stop()
	}
	if c.watched != nil {
		c.watched()
	}
	votesOf(c.g.state).withdraw(c.g.state, c)
}

// voteLocked makes the status known.
func (c *checker) voteLocked(why string) {
	votesOf(c.g.state).cast(c.g.state, c, vote{c.status, why})
}

// run asks once and sets the clock for the next time.
func (c *checker) run() {
	c.mu.Lock()
	if c.stopped {
		c.mu.Unlock()
		return
	}
	pushes := c.pushes
	c.mu.Unlock()
	endHung := func() {}
	if c.target.Service == "" && c.g.settings.Load().EndHungCalls {
		endHung = c.g.note()
	}
	v, late := c.probe()
	c.take(v, pushes)
	c.mu.Lock()
	hangs := late && v.Answer == NoAnswer && c.status == unhealthy && !c.stopped
	if !c.stopped {
		wait := c.nextLocked()
		c.mem.mu.Lock()
		c.mem.due, c.mem.begun = time.Now().Add(wait), c.begun
		c.mem.mu.Unlock()
		c.timer.Reset(wait)
	}
	c.mu.Unlock()
	if hangs {
		endHung()
	}
}

// probe asks. late tells whether the time for an answer is over.
func (c *checker) probe() (v Verdict, late bool) {
	ctx, cancel := context.WithTimeout(c.ctx, c.target.Timeout)
	defer cancel()
	defer func() {
		if r := recover(); r != nil {
			c.panicked(r)
			v, late = Verdict{Answer: Undecided}, false
		}
	}()
	v = c.g.settings.Load().prober.Probe(ctx, c.asks())
	if errors.Is(c.ctx.Err(), context.Canceled) {
		v.Answer = Undecided
	}
	if v.Answer == Serving && c.g.state.Has(upstream.Backoff) {
		c.target.conns.retry()
	}
	return v, errors.Is(ctx.Err(), context.DeadlineExceeded)
}

func (c *checker) panicked(r any) {
	c.g.settings.Load().logger.Error("health check panicked", zap.String("upstream", c.target.Endpoint.Address), zap.Any("panic", r), zap.ByteString("stack", debug.Stack()))
}

// take counts the answer to a probe, unless the endpoint has told something newer meanwhile.
func (c *checker) take(v Verdict, pushes uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped || v.Answer == Undecided || c.pushes != pushes && v.Answer != NoAnswer {
		return
	}
	if v.Answer == Serving {
		c.passes, c.fails = c.passes+1, 0
		unejectOn(c.g.state)
		if c.status == connecting || c.status == unhealthy && c.holdUntil.IsZero() && c.passes >= c.g.settings.Load().Passes {
			c.becomeLocked(healthy, "")
		}
		return
	}
	c.passes, c.fails = 0, c.fails+1
	c.badNewsLocked()
	switch {
	case c.status == unhealthy:
		c.sayLocked(v.Text)
	case c.status == connecting || c.fails >= c.g.settings.Load().Fails:
		c.becomeLocked(unhealthy, v.Text)
	}
}

// sayLocked replaces the reason why the status is what it is.
func (c *checker) sayLocked(why string) {
	c.mem.mu.Lock()
	same := c.mem.why == why
	c.mem.why = why
	c.mem.mu.Unlock()
	if !same {
		c.voteLocked(why)
	}
}

// push takes what the endpoint tells unasked: that counts at once.
func (c *checker) push(v Verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pushes++
	switch {
	case c.stopped || v.Answer == Undecided:
	case v.Answer == Serving:
		c.passes, c.fails = 1, 0
		c.goodNewsLocked()
	default:
		c.passes, c.fails = 0, 1
		c.badNewsLocked()
		if c.status == unhealthy {
			c.sayLocked(v.Text)
		} else {
			c.becomeLocked(unhealthy, v.Text)
		}
	}
}

func (c *checker) becomeLocked(s status, why string) {
	if c.target.Service != "" { // changes of the endpoint are told by the Monitor
		c.logLocked(s, why)
	}
	c.status, c.edge = s, true
	c.mem.mu.Lock()
	c.mem.status, c.mem.why = s, why
	c.mem.mu.Unlock()
	c.voteLocked(why)
}

// logLocked says that the service is about to become something else.
func (c *checker) logLocked(s status, why string) {
	logger, fields := c.g.settings.Load().logger, []zap.Field{zap.String("upstream", c.target.Endpoint.Address), zap.String("service", c.target.Service)}
	switch {
	case s == unhealthy:
		logger.Warn("upstream does not serve a service", append(fields, zap.String("reason", why))...)
	case c.status == unhealthy:
		logger.Info("upstream serves a service again", fields...)
	}
}

// nextLocked is how long to wait until the next probe.
func (c *checker) nextLocked() time.Duration {
	a := c.g.settings.Load()
	edge := c.edge
	c.edge = false
	var d time.Duration
	begun := c.g.state.Begun()
	touched := begun != c.begun || c.g.state.Active() > 0
	c.begun = begun
	switch {
	case c.status == unhealthy && edge:
		d = time.Duration(a.UnhealthyEdgeInterval)
	case c.status == unhealthy && c.passes > 0:
		d = time.Duration(a.FastInterval)
	case c.status == unhealthy:
		d = time.Duration(a.UnhealthyInterval)
	case c.fails > 0:
		d = time.Duration(a.FastInterval)
	case edge:
		d = time.Duration(a.HealthyEdgeInterval)
	case !touched:
		d = time.Duration(a.NoTrafficInterval)
	default:
		d = time.Duration(a.Interval)
	}
	if a.Jitter > 0 {
		d = onGrid(time.Duration(float64(d) * (1 + float64(a.Jitter)/100*(2*randFloat()-1))))
	}
	return d
}

// onGrid moves the end of a wait to the next of the moments at which checks of all endpoints are made, which are at most
// a ninth of the wait apart. A thousand endpoints that were checked one by one would wake the process a thousand times,
// which costs more than the checks.
func onGrid(d time.Duration) time.Duration {
	for _, ms := range [...]time.Duration{100, 50, 20, 10, 5, 2, 1} {
		if grid := ms * time.Millisecond; d >= 9*grid {
			return d + grid - time.Duration(time.Now().Add(d).UnixNano()%int64(grid))
		}
	}
	return d
}

// Backoff between attempts to watch, from gRPC's connection backoff (doc/connection-backoff.md), but never longer than
// the interval: who is asked every 10 seconds can be watched as often.
const (
	watchBackoffBase   = time.Second
	watchBackoffFactor = 1.6
	watchBackoffJitter = 0.2

	// renewEvery is how often a Watch that ends in order is opened again without a pause.
	renewEvery = 100 * time.Millisecond
)

func watchBackoff(try int, most time.Duration) time.Duration {
	d := float64(watchBackoffBase)
	for range try {
		if d >= float64(most) {
			break
		}
		d *= watchBackoffFactor
	}
	d = min(d, float64(max(most, watchBackoffBase)))
	return time.Duration(d * (1 + watchBackoffJitter*(2*randFloat()-1)))
}

// watch keeps a Watch open until the check stops. gRFC A17: a Watch that ends with any status but UNIMPLEMENTED is tried
// again with exponential backoff, which a message resets.
func (c *checker) watch(w Watcher, mode WatchMode, wait time.Duration) {
	ctx := c.ctx
	if !sleep(ctx, wait) {
		return
	}
	soon := false // the last one has ended in order, but within renewEvery
	for try := 0; ; try++ {
		told := false
		began := time.Now()
		select { // what happened before concerns an earlier connection
		case <-c.kick:
		default:
		}
		err := c.watchOnce(ctx, w, c.asks(), func(v Verdict) {
			told = true
			c.push(v)
		})
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, ErrCannotWatch) {
			// A17: not again on that connection. The next one may lead to a newer server.
			select {
			case <-c.kick:
			case <-ctx.Done():
				return
			}
			try = -1
			if !sleep(ctx, watchBackoff(0, 0)) {
				return
			}
			continue
		}
		if told {
			try = 0
		}
		// A17: health goes with the connection. Another one tells at once what has become of the endpoint, and until then
		// what it has said last holds: servers end connections that are some time old, or that they lose, as a matter of course.
		if errors.Is(err, ErrInOrder) || told && errors.Is(err, ErrConnectionLost) {
			before := soon
			if soon = time.Since(began) < renewEvery; !soon || !before {
				continue
			}
			if told {
				if !sleep(ctx, watchBackoff(try, time.Duration(c.g.settings.Load().Interval))) {
					return
				}
				continue
			}
		} else {
			soon = false
		}
		c.lost(mode, err)
		if !sleep(ctx, watchBackoff(try, time.Duration(c.g.settings.Load().Interval))) {
			return
		}
	}
}

func (c *checker) watchOnce(ctx context.Context, w Watcher, t *Target, report func(Verdict)) (err error) {
	defer func() {
		if r := recover(); r != nil {
			c.panicked(r)
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return w.Watch(ctx, t, report)
}

// lost deals with a Watch that has ended. Where nothing else tells about the endpoint it is unhealthy (A17:
// TRANSIENT_FAILURE); else it is asked now.
func (c *checker) lost(mode WatchMode, err error) {
	if mode == WatchOnly {
		c.push(Verdict{Answer: NoAnswer, Text: "the health watch ended: " + err.Error()})
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// If the timer has fired already, the probe is under way.
	if !c.stopped && c.status != unhealthy && c.timer.Stop() {
		c.timer.Reset(0)
	}
}

// sleep waits; it is false when ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
