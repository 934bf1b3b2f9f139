//go:build unix && !linux

package h2

// initPoll: outside Linux a TLS connection's writes are the writer goroutine's; what POLLOUT promises there is unknown.
func (k *socket) initPoll() {}
