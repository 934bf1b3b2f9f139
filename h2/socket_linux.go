package h2

import "golang.org/x/sys/unix"

// initPoll makes a TLS connection's socket answer whether it has room.
func (k *socket) initPoll() {
	k.canTry = true
	fds := make([]unix.PollFd, 1)
	k.pollFn = func(fd uintptr) {
		for {
			fds[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT}
			n, err := unix.Poll(fds, 0)
			if err == unix.EINTR {
				continue
			}
			// POLLERR and POLLHUP count as room: the write then fails at once and tells why.
			k.ok = err == nil && n > 0
			return
		}
	}
}
