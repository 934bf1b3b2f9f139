package h2

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"syscall"
	"time"
)

// socket writes to the connection below, blocking or trying. Everything but init is the flusher's, of whom there is
// one at a time; reading (readRaw) is the reader's.
//
//   - A plain TCP or unix socket is tried with one non-blocking write(2), through its RawConn (where the system has
//     that: socket_unix.go).
//   - A TLS connection can neither be tried (a write cut short by a deadline corrupts it) nor interrupted. On Linux
//     poll(2) tells whether the socket below has room for a record or two, and one write of at most 16 KiB follows. That is
//     no guarantee, hence the write deadline.
//   - Anything else only the writer goroutine writes to.
type socket struct {
	nc      net.Conn
	tls     *tls.Conn
	raw     syscall.RawConn
	timeout time.Duration
	armedAt time.Time

	canTry bool // try never blocks
	exact  bool // what was not written has certainly not left
	rawIn  bool // readRaw works

	// Arguments and results of the functions given to RawConn, which are made once.
	buf     []byte
	n       int
	err     error
	ok      bool
	writeFn func(fd uintptr) bool
	pollFn  func(fd uintptr)
	in      *input
	readFn  func(fd uintptr) bool
}

const (
	tlsChunk   = 16 << 10 // one TLS record
	writeChunk = 64 << 10 // progress is judged by chunks
)

func (k *socket) init(c *Conn) {
	k.nc, k.timeout, k.in = c.nc, c.cfg.WriteTimeout, &c.in
	switch nc := c.nc.(type) {
	case *net.TCPConn:
		k.raw, _ = nc.SyscallConn()
		k.exact = true
	case *net.UnixConn:
		k.raw, _ = nc.SyscallConn()
		k.exact = true
	case *tls.Conn:
		k.tls = nc
		if sc, ok := nc.NetConn().(syscall.Conn); ok {
			k.raw, _ = sc.SyscallConn()
		}
	}
	if k.raw != nil {
		k.initOS()
	}
}

// try writes what it can without blocking. n < len(p) without an error: the rest would block.
func (k *socket) try(p []byte) (n int, err error) {
	if k.tls == nil {
		k.buf, k.n, k.err = p, 0, nil
		if err = k.raw.Write(k.writeFn); err == nil {
			err = k.err
		}
		k.buf = nil
		return k.n, k.wrap("write", err)
	}
	for n < len(p) {
		k.ok = false
		if err := k.raw.Control(k.pollFn); err != nil || !k.ok {
			return n, err
		}
		k.arm()
		m, err := k.tls.Write(p[n:min(len(p), n+tlsChunk)])
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// write writes a part of p, at least one byte, and may block. It fails when the socket takes nothing for the timeout.
func (k *socket) write(p []byte) (n int, err error) {
	if !k.exact {
		k.arm()
		chunk := writeChunk
		if k.tls != nil {
			chunk = tlsChunk
		}
		return k.nc.Write(p[:min(len(p), chunk)])
	}
	if k.canTry {
		if n, err = k.try(p); n > 0 || err != nil {
			return n, err
		}
	}
	_ = k.nc.SetWriteDeadline(time.Now().Add(k.timeout))
	n, err = k.nc.Write(p[:min(len(p), writeChunk)])
	_ = k.nc.SetWriteDeadline(time.Time{})
	if n > 0 && isTimeout(err) {
		err = nil // slow, but it moves
	}
	return n, err
}

// arm keeps a write deadline at least three quarters of the timeout away, without setting it for each write.
func (k *socket) arm() {
	now := time.Now()
	if now.Sub(k.armedAt) > k.timeout/4 {
		k.armedAt = now
		_ = k.nc.SetWriteDeadline(now.Add(k.timeout))
	}
}

// wrap gives an errno the form the net package gives it.
func (k *socket) wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	var no syscall.Errno
	if !errors.As(err, &no) {
		return err
	}
	return &net.OpError{
		Op: op, Net: k.nc.LocalAddr().Network(), Source: k.nc.LocalAddr(), Addr: k.nc.RemoteAddr(),
		Err: os.NewSyscallError(op, no),
	}
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// closeWrite tells the peer that nothing more will come: FIN, or the TLS close alert. It returns false where only
// closing can tell.
func (k *socket) closeWrite() bool {
	w, ok := k.nc.(interface{ CloseWrite() error })
	return ok && w.CloseWrite() == nil
}

// abort closes the connection without anything that could block.
func (k *socket) abort() {
	if k.tls != nil {
		_ = k.tls.NetConn().Close()
		return
	}
	_ = k.nc.Close()
}
