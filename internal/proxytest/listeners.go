package proxytest

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// settle waits until each address has one listener. A new configuration opens listeners of its own beside those of the old
// one (SO_REUSEPORT), and a connection that the kernel has given to an old one is reset when that is closed. Where it
// cannot be seen, there is nothing to wait for.
func settle(addrs ...string) {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		table, err := os.ReadFile("/proc/net/tcp")
		if err != nil || !shared(string(table), addrs) {
			return
		}
	}
}

// shared tells whether one of the addresses has several listeners in Linux's table of sockets.
func shared(table string, addrs []string) bool {
	const listening = "0A"
	for _, addr := range addrs {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			continue
		}
		n, err := strconv.Atoi(port)
		if err != nil {
			continue
		}
		suffix := fmt.Sprintf(":%04X", n)
		count := 0
		for line := range strings.Lines(table) {
			if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[1], suffix) && f[3] == listening {
				count++
			}
		}
		if count > 1 {
			return true
		}
	}
	return false
}
