//go:build !unix

package h2

// initOS: without non-blocking writes on RawConn all writes are the writer goroutine's.
func (k *socket) initOS() {}
