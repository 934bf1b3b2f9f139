package orca

import (
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// maxReport is far more than a report needs.
const maxReport = 1 << 20

// request is an xds.service.orca.v3.OrcaLoadReportRequest: "google.protobuf.Duration report_interval = 1",
// which is "int64 seconds = 1" and "int32 nanos = 2".
func request(interval time.Duration) []byte {
	var d []byte
	if s := interval / time.Second; s > 0 {
		d = protowire.AppendVarint(protowire.AppendTag(d, 1, protowire.VarintType), uint64(s))
	}
	if ns := interval % time.Second; ns > 0 {
		d = protowire.AppendVarint(protowire.AppendTag(d, 2, protowire.VarintType), uint64(ns))
	}
	return protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), d)
}
