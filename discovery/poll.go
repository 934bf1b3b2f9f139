package discovery

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

const (
	// minRefresh is the shortest interval that may be configured.
	minRefresh = 100 * time.Millisecond
	// firstRetry and lastRetry bound the wait after a look that failed, which doubles in between.
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
	// firstHold and lastHold bound how soon after a look a Refresh is heeded. It doubles while what is asked for shows
	// nothing new: an endpoint that is down, but still listed, would else be asked about without end.
	firstHold = time.Second
	lastHold  = 30 * time.Second
)

// look finds out what endpoints there are, and tells the reporter. next is when to look again; 0 means as long as
// failures make it. An error was not reported yet.
type look func(ctx context.Context, r *reporter) (next time.Duration, err error)

// poll looks again and again until ctx is done. A value in refresh makes the next look come soon.
func poll(ctx context.Context, sink Sink, refresh <-chan struct{}, look look) {
	r := &reporter{sink: sink}
	hold, retry := firstHold, firstRetry
	asked := false // Whether the look at hand was asked for by a Refresh.
	timer := time.NewTimer(0)
	defer timer.Stop()
	<-timer.C
	for {
		r.changed = false
		next, err := look(ctx, r)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			r.fail(err)
		}
		switch {
		case next > 0:
			retry = firstRetry
		default:
			next = retry
			retry = min(2*retry, lastRetry)
		}
		switch {
		case r.changed || !asked:
			hold = firstHold
		default:
			hold = min(2*hold, lastHold)
		}
		looked := time.Now()
		planned := looked.Add(jitter(next))
		asked = false
		timer.Reset(time.Until(planned))
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
				waiting = false
			case <-refresh:
				if soon := looked.Add(hold); !asked && soon.Before(planned) {
					asked = true
					timer.Reset(time.Until(soon))
				}
			}
		}
	}
}

// jitter shortens d by up to a tenth, so that proxies that started together do not ask together for ever.
func jitter(d time.Duration) time.Duration {
	return d - rand.N(d/10+1) //nolint:gosec // spreading load
}

// refreshes is how a Refresher asks its poll to look again. It drops what is asked while a request waits already.
type refreshes chan struct{}

func newRefreshes() refreshes { return make(refreshes, 1) }

func (r refreshes) ask() {
	select {
	case r <- struct{}{}:
	default:
	}
}

// reporter hands on what is new.
type reporter struct {
	sink    Sink
	last    []upstream.Endpoint
	current bool // Whether the sink's last word from us is last.
	known   bool
	changed bool
}

// update hands a list on if it differs from the last one, or the sink was told of a failure since.
func (r *reporter) update(list []upstream.Endpoint) {
	if !r.known || !slices.EqualFunc(r.last, list, sameEndpoint) {
		r.changed, r.current = true, false
	}
	if !r.current {
		r.last, r.known, r.current = list, true, true
		r.sink.Update(slices.Clone(list)) // A sink may change its list; ours is what the next one is compared with.
	}
}

// fail hands an error on.
func (r *reporter) fail(err error) {
	r.current = false
	r.sink.Fail(err)
}

func sameEndpoint(a, b upstream.Endpoint) bool {
	return a.Network == b.Network && a.Address == b.Address && a.Name == b.Name && a.Weight == b.Weight &&
		a.Priority == b.Priority && a.Locality == b.Locality && a.Origin == b.Origin && maps.Equal(a.Metadata, b.Metadata)
}
