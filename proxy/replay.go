package proxy

import (
	"sync/atomic"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
)

const (
	// maxReplay bounds what is kept of a request for another attempt (linkerd2-proxy: 64 KiB), and maxReplays that of all calls,
	// beyond a small buffer for each.
	maxReplay  = 64 << 10
	maxReplays = 64 << 20
)

// replaysHeld is the bytes that replay buffers hold beyond small ones.
var replaysHeld atomic.Int64

// replay is the request as it is kept for another try, and what the current attempt has not taken yet.
type replay struct {
	backlog // the request from offset start on
	start   int64
	total   int64 // bytes that have come
	held    int64 // what buf counts in replaysHeld
	// keep: all of the request is in buf, since it may have to be sent again.
	keep     bool
	ended    bool  // END_STREAM has come
	credited int64 // so much the client was given back
	// left is how much has left, to whichever attempt is farthest, and framing follows that.
	left    int64
	framing grpcwire.Framing
}

// from is what an attempt that was sent so much is to be sent next.
func (r *replay) from(sent int64) []byte {
	if r.empty() {
		return nil
	}
	return r.bytes()[sent-r.start:]
}

// keepFrom keeps a piece of the request that begins at the offset.
func (r *replay) keepFrom(p []byte, at int64) {
	if len(p) == 0 {
		return
	}
	if r.empty() {
		r.start = at
	}
	r.add(p)
}

// fits tells whether so many bytes more can be kept for another try, and counts them.
func (r *replay) fits(n int) bool {
	size := int64(len(r.bytes()) + n)
	if size > maxReplay {
		return false
	}
	if extra := size - smallBuffer - r.held; extra > 0 {
		if replaysHeld.Load()+extra > maxReplays {
			return false
		}
		replaysHeld.Add(extra)
		r.held += extra
	}
	return true
}

// letGo gives up sending the request again.
func (r *replay) letGo() {
	r.keep = false
	replaysHeld.Add(-r.held)
	r.held = 0
}

// forget drops what was sent, if it is not kept.
func (r *replay) forget(sent int64) {
	if r.keep || r.empty() {
		return
	}
	r.drop(int(sent - r.start))
	r.start = sent
}

func (r *replay) release() {
	r.letGo()
	r.backlog.release()
}
