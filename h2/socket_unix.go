//go:build unix

package h2

import (
	"errors"
	"io"
	"syscall"
)

// initOS makes the functions that run inside RawConn.Write and RawConn.Read.
func (k *socket) initOS() {
	if k.tls != nil {
		k.initPoll()
		return
	}
	k.canTry, k.rawIn = true, true
	// Returning true means "do not wait", whatever happened.
	k.writeFn = func(fd uintptr) bool {
		for k.n < len(k.buf) {
			n, err := syscall.Write(int(fd), k.buf[k.n:])
			if n > 0 {
				k.n += n
			}
			switch {
			case err == nil && n > 0 || errors.Is(err, syscall.EINTR):
				continue
			case err == nil || errors.Is(err, syscall.EAGAIN):
				return true
			}
			k.err = err
			return true
		}
		return true
	}
	// An idle connection holds no read buffer: it gets one only for the attempt, and keeps it while bytes are in it.
	k.readFn = func(fd uintptr) bool {
		in := k.in
		in.grab()
		for {
			n, err := syscall.Read(int(fd), in.free())
			switch {
			case errors.Is(err, syscall.EINTR):
				continue
			case errors.Is(err, syscall.EAGAIN):
				in.release()
				return false
			case err != nil:
				in.err = k.wrap("read", err)
			case n == 0:
				in.err = io.EOF
			default:
				in.w += n
				in.got = n
			}
			return true
		}
	}
}
