package proxy

import (
	"bytes"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// sentMode is when a client's side tells that what it has taken has left.
type sentMode uint8

const (
	sentAtOnce  sentMode = iota // as h2's
	sentLate                    // when the script says so
	sentAtFlush                 // from within Flush
	sentModes
)

// simFlight is a call of the simulation with its client's side, which checks how it is dealt with.
type simFlight struct {
	Flight
	w      *simWorld
	id     int
	window int // how much the client may send ahead
	mode   sentMode
	hedges int
	served bool // Serve was called

	busy   atomic.Bool            // one of Downstream's methods runs
	during atomic.Pointer[func()] // what is to happen during the next one
	pushes sync.Mutex             // is held while the client sends

	cmu      sync.Mutex
	acts     int  // of the client's side that go on
	recycled bool // nobody has the flight any more, or so it was said
	request  []byte
	pushed   int // of it, given to the flight
	ended    bool
	consumed int
	room     int // how much more is taken; -1: everything
	blocked  bool
	unsent   int
	got      []byte
	heads    int
	headEnd  bool
	head     []h2.Field
	trailers []h2.Field
	ends     int // Trailers, and Head with end
	resets   int
	dones    int
	overs    int
	streams  []*simStream
}

// given is what the client has sent.
func (f *simFlight) given() []byte {
	f.cmu.Lock()
	defer f.cmu.Unlock()
	return f.request[:f.pushed]
}

func (f *simFlight) whole() (int, bool) {
	f.cmu.Lock()
	defer f.cmu.Unlock()
	return f.pushed, f.ended
}

func (f *simFlight) begun(s *simStream) {
	f.cmu.Lock()
	defer f.cmu.Unlock()
	f.streams = append(f.streams, s)
}

func (f *simFlight) all() []*simStream {
	f.cmu.Lock()
	defer f.cmu.Unlock()
	return append([]*simStream(nil), f.streams...)
}

func (f *simFlight) done() bool {
	f.cmu.Lock()
	defer f.cmu.Unlock()
	return f.dones > 0
}

// The script acts for the client.

// act does something on the client's side, unless that has the flight no more.
func (f *simFlight) act(do func()) {
	f.cmu.Lock()
	gone := f.recycled
	if !gone {
		f.acts++
	}
	f.cmu.Unlock()
	if gone {
		return
	}
	do()
	f.cmu.Lock()
	f.acts--
	f.cmu.Unlock()
}

// Recycle implements Recycler.
func (d simDownstream) Recycle() {
	f := d.f
	f.cmu.Lock()
	defer f.cmu.Unlock()
	if f.dones != 1 || f.ends != 1 || f.resets > 0 || f.recycled {
		f.w.errorf("flight %d: recycled after %d Done, %d ends and %d resets (before: %t)", f.id, f.dones, f.ends, f.resets, f.recycled)
	}
	f.recycled = true
}

// push sends up to n bytes of the request, as far as its window allows, with its end if that is reached then.
func (f *simFlight) push(n int, end bool) {
	if !f.pushes.TryLock() {
		return
	}
	defer f.pushes.Unlock()
	f.cmu.Lock()
	if f.ended {
		f.cmu.Unlock()
		return
	}
	n = min(n, len(f.request)-f.pushed, f.window+f.consumed-f.pushed)
	p := bytes.Clone(f.request[f.pushed : f.pushed+n])
	f.pushed += n
	f.ended = end
	f.cmu.Unlock()
	if n > 0 || end {
		f.act(func() { f.Data(p, end, nil) })
		clear(p) // it was lent
	}
}

func (f *simFlight) allow(n int) {
	f.cmu.Lock()
	if f.room >= 0 {
		f.room += n
	}
	if n < 0 {
		f.room = -1
	}
	tell := f.blocked && f.room != 0
	f.blocked = f.blocked && !tell
	f.cmu.Unlock()
	if tell {
		f.act(f.Writable)
	}
}

func (f *simFlight) tellSent(n int) {
	f.cmu.Lock()
	n = min(n, f.unsent)
	f.unsent -= n
	f.cmu.Unlock()
	if n > 0 {
		f.act(func() { f.Sent(n) })
	}
}

func (f *simFlight) enter(method string) (leave func()) {
	if !f.busy.CompareAndSwap(false, true) {
		f.w.errorf("flight %d: %s while another method of Downstream runs", f.id, method)
	}
	f.cmu.Lock()
	if f.dones > 0 {
		f.w.errorf("flight %d: %s after Done", f.id, method)
	}
	return func() {
		f.cmu.Unlock()
		if do := f.during.Swap(nil); do != nil {
			go (*do)()
			time.Sleep(time.Microsecond) // until that has come as far as it gets
		}
		f.busy.Store(false)
	}
}

type simDownstream struct{ f *simFlight }

func (d simDownstream) Head(fields []h2.Field, end bool) {
	f := d.f
	defer f.enter("Head")()
	if f.heads++; f.heads > 1 || f.ends+f.resets > 0 {
		f.w.errorf("flight %d: Head for the %d. time, after %d ends and %d resets", f.id, f.heads, f.ends, f.resets)
	}
	if len(fields) == 0 || fields[0].Name != ":status" {
		f.w.errorf("flight %d: the head begins with %v", f.id, fields)
	}
	f.head, f.headEnd = bytesOf(fields), end
	if end {
		f.ends++
	}
}

// bytesOf is a copy that shares nothing.
func bytesOf(fields []h2.Field) []h2.Field { return append([]h2.Field(nil), fields...) }

func (d simDownstream) Data(p []byte) (int, bool) {
	f := d.f
	defer f.enter("Data")()
	switch {
	case f.heads != 1 || f.ends+f.resets > 0:
		f.w.errorf("flight %d: Data after %d heads, %d ends and %d resets", f.id, f.heads, f.ends, f.resets)
	case len(p) == 0:
		f.w.errorf("flight %d: Data of nothing", f.id)
	case f.blocked:
		f.w.errorf("flight %d: Data before Writable", f.id)
	}
	n := len(p)
	if f.room >= 0 {
		n = min(n, f.room)
		f.room -= n
	}
	f.blocked = n < len(p)
	f.got = append(f.got, p[:n]...)
	if f.mode == sentAtOnce {
		return n, true
	}
	f.unsent += n
	return n, false
}

func (d simDownstream) Trailers(fields []h2.Field, _ bool) {
	f := d.f
	defer f.enter("Trailers")()
	if f.ends++; f.heads != 1 || f.ends > 1 || f.resets > 0 {
		f.w.errorf("flight %d: Trailers after %d heads, as end %d, after %d resets", f.id, f.heads, f.ends, f.resets)
	}
	f.trailers = bytesOf(fields)
}

func (d simDownstream) Consumed(n int) {
	f := d.f
	defer f.enter("Consumed")()
	if f.consumed += n; n <= 0 || f.consumed > f.pushed {
		f.w.errorf("flight %d: %d bytes consumed, %d in all, of %d that were sent", f.id, n, f.consumed, f.pushed)
	}
}

func (d simDownstream) Flush(*h2.Conn) {
	f := d.f
	leave := f.enter("Flush")
	n := f.unsent
	if f.mode != sentAtFlush {
		n = 0
	}
	f.unsent -= n
	leave()
	if n > 0 {
		f.Sent(n)
	}
}

func (d simDownstream) Reset(h2.ErrCode) {
	f := d.f
	defer f.enter("Reset")()
	// An answer whose end the client's side has may still be taken back: the client has not read it.
	if f.resets++; f.resets > 1 || f.headEnd {
		f.w.errorf("flight %d: Reset for the %d. time, after %d ends", f.id, f.resets, f.ends)
	}
}

func (d simDownstream) Done() {
	f := d.f
	defer f.enter("Done")()
	if f.dones++; f.ends+f.resets == 0 {
		f.w.errorf("flight %d: Done without an end", f.id)
	}
}

// Over implements Observer.
func (w *simWorld) Over(c *call.Call) {
	f := w.flightOf(c)
	f.cmu.Lock()
	defer f.cmu.Unlock()
	if f.overs++; f.overs > 1 || f.dones > 0 {
		w.errorf("flight %d: over for the %d. time, with Done for %d", f.id, f.overs, f.dones)
	}
}

// start begins a call of so many bytes.
func (w *simWorld) start(size, window int, deadline time.Duration, mode sentMode, room int) *simFlight {
	w.mu.Lock()
	f := &simFlight{w: w, id: len(w.flights), window: window, mode: mode, room: room}
	f.request = messages(uint32(f.id)+99, size)
	f.describe(deadline)
	w.flights = append(w.flights, f)
	w.mu.Unlock()
	w.p.Serve(&f.Flight, simDownstream{f}, nil)
	f.served = true
	return f
}

// describe says what the call is.
func (f *simFlight) describe(deadline time.Duration) {
	f.Call.Path, f.Call.URI, f.Call.Authority = "/s/m", "/s/m", "test"
	f.Call.ClientIP = netip.AddrFrom4([4]byte{10, 0, 0, byte(f.id % 2)})
	f.Request.Path = "/s/m"
	f.Request.Fields = []h2.Field{{Name: "content-type", Value: "application/grpc"}, {Name: "x-flight", Value: strconv.Itoa(f.id)}}
	if deadline > 0 {
		f.Request.Fields = append(f.Request.Fields, h2.Field{Name: "grpc-timeout", Value: strconv.FormatInt(deadline.Milliseconds(), 10) + "m"})
	}
}
