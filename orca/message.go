package orca

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

const (
	// prefixLen is the length of what stands before each message (PROTOCOL-HTTP2, "Length-Prefixed-Message").
	prefixLen = 5
	// maxReport is far more than a report needs.
	maxReport = 1 << 20
)

// request is an xds.service.orca.v3.OrcaLoadReportRequest with its prefix: "google.protobuf.Duration report_interval = 1",
// which is "int64 seconds = 1" and "int32 nanos = 2".
func request(interval time.Duration) []byte {
	var d []byte
	if s := interval / time.Second; s > 0 {
		d = protowire.AppendVarint(protowire.AppendTag(d, 1, protowire.VarintType), uint64(s))
	}
	if ns := interval % time.Second; ns > 0 {
		d = protowire.AppendVarint(protowire.AppendTag(d, 2, protowire.VarintType), uint64(ns))
	}
	b := make([]byte, prefixLen, prefixLen+2+len(d))
	b = protowire.AppendBytes(protowire.AppendTag(b, 1, protowire.BytesType), d)
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-prefixLen))
	return b
}

// message is the first message of the bytes, and how many bytes it takes; none if it is not complete.
func message(b []byte) (msg []byte, n int, _ error) {
	if len(b) < prefixLen {
		return nil, 0, nil
	}
	size := binary.BigEndian.Uint32(b[1:])
	switch {
	case b[0] != 0:
		return nil, 0, errors.New("a report is compressed, which was not asked for")
	case size > maxReport:
		return nil, 0, fmt.Errorf("a report is %d bytes long", size)
	case uint64(len(b)-prefixLen) < uint64(size):
		return nil, 0, nil
	}
	n = prefixLen + int(size)
	return b[prefixLen:n:n], n, nil
}
