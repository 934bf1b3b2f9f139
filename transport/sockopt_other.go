//go:build !linux

package transport

import (
	"net"
	"time"
)

// setUserTimeout has no portable form outside Linux; PING finds a vanished peer there.
func setUserTimeout(net.Conn, time.Duration) {}
