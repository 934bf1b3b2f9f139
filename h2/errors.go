package h2

import (
	"strconv"
	"strings"
)

var kindNames = [...]string{
	KindReset: "reset", KindGoAway: "goaway", KindConnLost: "connection_lost", KindProtocol: "protocol",
	KindTimeout: "timeout", KindHeaderListSize: "header_list_size", KindLocal: "local", KindNoCapacity: "no_capacity",
	KindMemory: "memory", KindNotHTTP2: "not_http2",
}

// String returns a short name in snake case, for logs and metric labels.
func (k ErrorKind) String() string {
	if int(k) < len(kindNames) && kindNames[k] != "" {
		return kindNames[k]
	}
	return "kind(" + strconv.Itoa(int(k)) + ")"
}

// Error describes the event in one line, without the name of the package.
func (e *Error) Error() string {
	var b strings.Builder
	switch e.Kind {
	case KindReset:
		if e.Remote {
			b.WriteString("stream reset by peer: ")
		} else {
			b.WriteString("stream reset: ")
		}
		b.WriteString(e.Code.String())
	case KindGoAway:
		b.WriteString("peer sent GOAWAY ")
		b.WriteString(e.Code.String())
	case KindConnLost:
		b.WriteString("connection lost")
		if e.Code != NoError {
			b.WriteString(" after GOAWAY ")
			b.WriteString(e.Code.String())
		}
	case KindProtocol:
		b.WriteString("peer broke the protocol: ")
		b.WriteString(e.Code.String())
	case KindTimeout:
		b.WriteString("timeout")
	case KindHeaderListSize:
		b.WriteString("header list too large")
	case KindLocal:
		b.WriteString("closed by this side")
		if e.Code != NoError {
			b.WriteString(" with ")
			b.WriteString(e.Code.String())
		}
	case KindNoCapacity:
		b.WriteString("no stream free")
	case KindMemory:
		b.WriteString("stream ended for the sake of memory")
	case KindNotHTTP2:
		b.WriteString("peer does not speak HTTP/2: ")
		b.WriteString(e.Debug)
	default:
		b.WriteString(e.Kind.String())
	}
	switch {
	case e.Debug == "" || e.Kind == KindNotHTTP2:
	case e.Kind == KindGoAway || e.Kind == KindConnLost && e.Code != NoError:
		b.WriteByte(' ')
		b.WriteString(strconv.Quote(e.Debug))
	default:
		b.WriteString(": ")
		b.WriteString(e.Debug)
	}
	if e.Err != nil {
		b.WriteString(": ")
		b.WriteString(e.Err.Error())
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// violation is a connection error of the peer's making (RFC 9113 section 5.4.1).
func violation(code ErrCode, rule string) *Error {
	return &Error{Kind: KindProtocol, Code: code, Debug: rule}
}

// printable makes the start of what a stranger said fit for a log line.
func printable(b []byte) string {
	const most = 64
	cut := len(b) > most
	b = b[:min(len(b), most)]
	var s strings.Builder
	for _, c := range b {
		switch {
		case c == '\r' || c == '\n' || c == '\t':
			s.WriteByte(' ')
		case c < ' ' || c > '~':
			s.WriteByte('.')
		default:
			s.WriteByte(c)
		}
	}
	if cut {
		s.WriteString("...")
	}
	return strings.TrimSpace(s.String())
}

// notHTTP2 explains a first frame that is no SETTINGS frame. Who speaks another protocol has understood nothing of what we
// sent. But what could be a frame, whose length is below 64 KiB, may come from a server that only begins with the wrong one.
func notHTTP2(b []byte) *Error {
	e := &Error{Kind: KindNotHTTP2, Code: ProtocolError, Remote: true, Unprocessed: len(b) > 0 && b[0] != 0}
	switch {
	case len(b) >= 3 && b[0] == 0x15 && b[1] == 3 && b[2] <= 4:
		e.Debug = "it sent a TLS alert, so it expects TLS"
	case len(b) >= 3 && b[0] == 0x16 && b[1] == 3 && b[2] <= 4:
		e.Debug = "it sent a TLS handshake"
	default:
		e.Debug = strconv.Quote(printable(b))
	}
	return e
}
