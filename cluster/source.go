package cluster

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/discovery"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Source is a source of endpoints with what the cluster has to know about it.
type Source struct {
	discovery.Source
	// Name is for logs and messages.
	Name string
	// Key identifies the source's configuration: a source of the same key in a later configuration begins with the last
	// list of this one.
	Key string
	// Preferred: once the source has a list, the static endpoints are not used.
	Preferred bool
	// Describe adds what the configuration says of the source's endpoints. Nil: nothing.
	Describe func(*upstream.Endpoint)
}

// source is a Source that is being watched. It is the sink of its own findings.
type source struct {
	Source
	c     *Cluster
	lease *upstream.Lease[*lastList]
	last  *lastList

	// Under the cluster's mu.
	list     []upstream.Endpoint // the last one with endpoints in it
	found    bool                // there was such a list
	answered bool                // the source said something, if only that it has failed
	err      error               // why there is no newer list
}

// describe returns a copy of the list as the configuration describes it.
func (s *source) describe(list []upstream.Endpoint) []upstream.Endpoint {
	list = slices.Clone(list)
	for i := range list {
		if s.Describe != nil {
			s.Describe(&list[i])
		}
	}
	return list
}

// lastList is the last list of a source, for the configuration after this one, which may describe it otherwise.
type lastList struct {
	mu        sync.Mutex
	endpoints []upstream.Endpoint
}

// Destruct implements caddy.Destructor.
func (*lastList) Destruct() error { return nil }

var lastLists = upstream.NewPool[*lastList]()

func (c *Cluster) newSource(s Source) (*source, error) {
	src := &source{Source: s, c: c, lease: lastLists.NewLease()}
	last, err := src.lease.Acquire(s.Key, func() (*lastList, error) { return new(lastList), nil })
	if err != nil {
		return nil, err
	}
	src.last = last
	last.mu.Lock()
	defer last.mu.Unlock()
	if len(last.endpoints) > 0 {
		src.list, src.found, src.answered = src.describe(last.endpoints), true, true
	}
	return src, nil
}

// Update implements discovery.Sink.
func (s *source) Update(endpoints []upstream.Endpoint) {
	list := s.describe(endpoints)
	if len(list) > 0 {
		s.last.mu.Lock()
		s.last.endpoints = slices.Clone(endpoints)
		s.last.mu.Unlock()
	}
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	first := !s.answered
	s.answered = true
	if len(list) == 0 {
		s.failedLocked(errEmpty)
		s.c.changeLocked(false, first)
		return
	}
	if s.err != nil && s.found {
		s.c.cfg.Logger.Info("the source of upstreams answers again", zap.String("source", s.Name))
	}
	first = first || !s.found
	s.list, s.found, s.err = list, true, nil
	s.c.changeLocked(true, first)
}

var errEmpty = errors.New("the source knows of no endpoint")

// Fail implements discovery.Sink.
func (s *source) Fail(err error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	first := !s.answered
	s.answered = true
	s.failedLocked(err)
	if !s.found {
		s.c.changeLocked(false, first) // calls are told why
	}
}

// failedLocked notes and logs why there is no new list; the same reason is logged once.
func (s *source) failedLocked(err error) {
	if s.err != nil && s.err.Error() == err.Error() {
		return
	}
	s.err = err
	if s.c.closed {
		return
	}
	msg := "no upstreams found"
	if s.found {
		msg = "no newer list of upstreams; the last one stays in force"
	}
	s.c.cfg.Logger.Warn(msg, zap.String("source", s.Name), zap.Int("upstreams", len(s.list)), zap.Error(err))
}

// restartAfter is the pause before a source that has stopped by itself is watched again.
const restartAfter = 5 * time.Second

func (s *source) watch(ctx context.Context) {
	for ctx.Err() == nil {
		s.watchOnce(ctx)
		t := time.NewTimer(jitter(restartAfter))
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

// watchOnce keeps a panic in a source, which may be anybody's module, from taking all of Caddy down.
func (s *source) watchOnce(ctx context.Context) {
	defer func() {
		if p := recover(); p != nil {
			s.Fail(fmt.Errorf("panic: %v", p))
			s.c.cfg.Logger.Error("a source of upstreams has panicked", zap.String("source", s.Name), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
		}
	}()
	s.Source.Watch(ctx, s)
}

// jitter returns d ±50 %.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d) //nolint:gosec // not a secret
}
