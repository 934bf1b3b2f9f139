package grpcwire

import "encoding/binary"

// prefixLen is the length of what stands before each message. PROTOCOL-HTTP2: "Length-Prefixed-Message →
// Compressed-Flag Message-Length Message", "Compressed-Flag → 0 / 1 # encoded as 1 byte unsigned integer",
// "Message-Length → {length of Message} # encoded as 4 byte unsigned integer (big endian)".
const prefixLen = 5

// Framing follows a stream of length-prefixed messages over any split of its bytes ("DATA frame boundaries have no
// relation to Length-Prefixed-Message boundaries", PROTOCOL-HTTP2) without keeping or copying the messages. Its zero
// value stands before the first message. It is not safe for concurrent use.
type Framing struct {
	messages int64
	body     uint32 // Bytes of the current message that are still to come.
	prefix   [prefixLen]byte
	have     uint8 // Bytes of the next message's prefix that have come.
	bad      bool
}

// Add follows the next bytes of the stream. After a bad prefix it does nothing: where the next message begins cannot
// be known any more.
func (f *Framing) Add(p []byte) {
	for len(p) > 0 && !f.bad {
		if f.body > 0 {
			if uint64(len(p)) < uint64(f.body) {
				f.body -= uint32(len(p))
				return
			}
			p = p[f.body:]
			f.body = 0
			f.messages++
			continue
		}
		n := copy(f.prefix[f.have:], p)
		p = p[n:]
		f.have += uint8(n)
		if f.prefix[0] > 1 {
			f.bad = true
			return
		}
		if f.have < prefixLen {
			return
		}
		f.have = 0
		f.body = binary.BigEndian.Uint32(f.prefix[1:])
		if f.body == 0 {
			f.messages++
		}
	}
}

// Messages is the number of messages that have come completely.
func (f *Framing) Messages() int64 { return f.messages }

// AtBoundary tells that the stream could end here: nothing has come yet, or the last message is complete. It is false
// for ever after a bad prefix.
func (f *Framing) AtBoundary() bool { return f.body == 0 && f.have == 0 && !f.bad }

// Bad tells that a message began with a compressed-flag other than 0 or 1, so that this is no stream of gRPC
// messages (or one of gRPC-Web, whose trailers have flag 0x80).
func (f *Framing) Bad() bool { return f.bad }
