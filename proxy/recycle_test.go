package proxy

import (
	"fmt"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// A flight is used again after a call that went the straight way, and after no other.
func TestRecycle(t *testing.T) {
	for _, tt := range []struct {
		name     string
		most     uint32 // streams
		deadline time.Duration
		do       func(w *simWorld, f *simFlight)
		want     bool
	}{
		{"unary", 100, 0, func(w *simWorld, f *simFlight) {
			w.only().complete()
		}, true},
		{"with a deadline", 100, time.Second, func(w *simWorld, f *simFlight) {
			w.only().complete()
		}, true},
		{"Trailers-Only", 100, 0, func(w *simWorld, f *simFlight) {
			w.only().trailersOnly("7")
		}, true},
		{"its deadline has passed", 100, time.Second, func(w *simWorld, f *simFlight) {
			time.Sleep(2 * time.Second)
		}, false},
		{"cut", 100, 0, func(w *simWorld, f *simFlight) {
			f.Cut(Fail(grpcwire.Unavailable, ReasonReload, "cut"))
		}, false},
		{"to be cut when its answer was complete", 100, 0, func(w *simWorld, f *simFlight) {
			f.cmu.Lock()
			f.room = 0
			f.cmu.Unlock()
			w.only().complete()
			w.settle()
			f.Cut(Fail(grpcwire.Unavailable, ReasonReload, "cut"))
			w.settle()
			f.allow(-1)
		}, false},
		{"the client resets it", 100, 0, func(w *simWorld, f *simFlight) {
			f.Abandon(ClientGone(), nil)
		}, false},
		{"no trailers", 100, 0, func(w *simWorld, f *simFlight) {
			s := w.only()
			s.respond(100)
			s.stop()
		}, false},
		{"a second attempt", 100, 0, func(w *simWorld, f *simFlight) {
			w.only().rst(h2.RefusedStream)
			w.settle()
			w.only().complete()
		}, false},
		{"it has waited", 0, 0, func(w *simWorld, f *simFlight) {
			w.peers[0].all()[0].allow(1)
			w.settle()
			w.only().complete()
		}, false},
		{"somebody watches it", 100, 0, func(w *simWorld, f *simFlight) {
			end := w.p.NoteCalls(w.cluster.View().Endpoints[0].Endpoint)
			w.only().complete()
			w.settle()
			if n := end(Fail(grpcwire.Unavailable, ReasonHung, "hangs")); n != 0 {
				w.t.Errorf("%d calls hang, and none runs", n)
			}
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			simulate(t, plain(simPeer{most: tt.most}), func(w *simWorld) {
				w.unary() // makes the connection
				w.flights[0].push(20, true)
				w.settle()
				if tt.most > 0 {
					w.only().complete()
				} else {
					w.flights[0].Cut(Fail(grpcwire.Unavailable, ReasonReload, "cut"))
				}
				w.settle()
				f := w.start(20, 65535, tt.deadline, sentAtOnce, -1)
				f.push(20, true)
				w.settle()
				tt.do(w, f)
				w.settle()
				if !f.done() || f.recycled != tt.want {
					w.t.Errorf("done %t, recycled %t, want %t", f.done(), f.recycled, tt.want)
				}
			})
		})
	}
}

// A call whose request has not ended when its answer has is still to hear of that.
func TestNotRecycledBeforeTheRequestsEnd(t *testing.T) {
	simulate(t, plain(simPeer{most: 100}), func(w *simWorld) {
		f := w.unary()
		f.push(20, true)
		w.settle()
		w.only().complete()
		w.settle()
		f = w.start(20, 65535, 0, sentAtOnce, -1)
		f.push(5, false)
		w.settle()
		w.only().complete()
		w.settle()
		if !f.done() || f.recycled {
			w.t.Errorf("done %t, recycled %t", f.done(), f.recycled)
		}
	})
}

// A flight that is used again is as new, its timer too.
func TestReset(t *testing.T) {
	simulate(t, plain(simPeer{most: 100}), func(w *simWorld) {
		f := w.unary() // makes the connection
		f.push(20, true)
		w.settle()
		w.only().complete()
		w.settle()
		f = w.start(20, 65535, time.Minute, sentAtOnce, -1)
		for i := range 5 {
			f.push(20, true)
			w.settle()
			if last := i == 4; last {
				time.Sleep(2 * time.Minute)
			} else {
				w.only().complete()
			}
			w.settle()
			r := f.Call.Result
			if want := grpcwire.OK; i < 4 && (r.Code != want || !f.recycled || r.Attempts != 1 || r.SentMessages != 1 || r.ReceivedBytes != int64(len(f.got))) {
				w.t.Fatalf("call %d: recycled %t, %+v", i, f.recycled, r)
			}
			if want := grpcwire.DeadlineExceeded; i == 4 && (r.Code != want || f.recycled) {
				w.t.Fatalf("call %d: recycled %t, %+v", i, f.recycled, r)
			}
			if i < 4 {
				w.again(f, time.Minute)
			}
		}
		if n := len(f.all()); n != 1 {
			w.t.Errorf("%d streams of the last call", n)
		}
	})
}

// again begins another call with a flight that was recycled.
func (w *simWorld) again(f *simFlight, deadline time.Duration) {
	w.t.Helper()
	w.observed.Add(-int64(f.Call.Result.Attempts))
	f.Reset()
	if got, want := fmt.Sprintf("%+v", f.progress), fmt.Sprintf("%+v", progress{}); got != want || f.timer.loose || !f.timer.at.IsZero() {
		w.t.Errorf("after Reset: %s, timer %+v", got, f.timer)
	}
	f.cmu.Lock()
	f.recycled, f.pushed, f.ended, f.consumed = false, 0, false, 0
	f.got, f.heads, f.headEnd, f.head, f.trailers = nil, 0, false, nil, nil
	f.ends, f.resets, f.dones, f.overs, f.streams = 0, 0, 0, 0, nil
	f.cmu.Unlock()
	w.mu.Lock()
	f.describe(deadline)
	w.mu.Unlock()
	w.p.Serve(&f.Flight, simDownstream{f}, nil)
	w.settle()
}

// The registry of flights is small again after a crowd.
func TestRegistryShrinks(t *testing.T) {
	var d drain
	flights := make([]Flight, 20*drainShards*keptPlaces)
	for i := range flights {
		if why := d.enter(&flights[i]); why != nil {
			t.Fatal(why)
		}
	}
	for i := range flights {
		d.leave(&flights[i])
	}
	for i := range d.shards {
		if n := len(d.shards[i].flights) + len(d.shards[i].free); n > 2*keptPlaces {
			t.Errorf("shard %d keeps %d places", i, n)
		}
	}
}
