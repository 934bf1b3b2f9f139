package grpcwire

import (
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// ErrorInfo is google.rpc.ErrorInfo (googleapis google/rpc/error_details.proto): the cause of an error for programs
// to read.
type ErrorInfo struct {
	// Reason names the cause, unique within the domain, in upper snake case.
	Reason string
	// Domain says who made the error.
	Domain string
	// Metadata holds further facts as pairs of key and value. Keys should not repeat.
	Metadata [][2]string
}

// typeErrorInfo names the message in an Any.
const typeErrorInfo = "type.googleapis.com/google.rpc.ErrorInfo"

// Field numbers of google.rpc.Status, google.protobuf.Any, google.rpc.ErrorInfo and of a map's entry.
const (
	statusCode, statusMessage, statusDetails = 1, 2, 3
	anyTypeURL, anyValue                     = 1, 2
	infoReason, infoDomain, infoMetadata     = 1, 2, 3
	entryKey, entryValue                     = 1, 2
	lenType                                  = protowire.BytesType
)

// AppendStatusDetails appends a google.rpc.Status (googleapis google/rpc/status.proto) with the code, the message (as
// the reader shall see it, not percent-encoded) and, unless info is nil, one detail. The result is what the field
// grpc-status-details-bin carries, before base64 ([EncodeBin]). Its code and message must repeat grpc-status and
// grpc-message: a client that sees them differ drops the details.
//
// Strings of proto3 must be UTF-8 or the whole message cannot be read, so bytes that are not are replaced by U+FFFD.
func AppendStatusDetails(b []byte, code Code, message string, info *ErrorInfo) []byte {
	if code != OK {
		b = protowire.AppendTag(b, statusCode, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(int64(int32(code)))) // An int32 field is sign-extended.
	}
	b = appendString(b, statusMessage, message)
	if info == nil {
		return b
	}
	detail := info.append(nil)
	b = protowire.AppendTag(b, statusDetails, lenType)
	b = protowire.AppendVarint(b, uint64(sizeField(anyTypeURL, len(typeErrorInfo))+sizeField(anyValue, len(detail))))
	b = appendString(b, anyTypeURL, typeErrorInfo)
	b = protowire.AppendTag(b, anyValue, lenType)
	return protowire.AppendBytes(b, detail)
}

func (e *ErrorInfo) append(b []byte) []byte {
	b = appendString(b, infoReason, e.Reason)
	b = appendString(b, infoDomain, e.Domain)
	for _, kv := range e.Metadata {
		key, value := utf8Only(kv[0]), utf8Only(kv[1])
		b = protowire.AppendTag(b, infoMetadata, lenType)
		b = protowire.AppendVarint(b, uint64(sizeString(entryKey, key)+sizeString(entryValue, value)))
		b = appendString(b, entryKey, key)
		b = appendString(b, entryValue, value)
	}
	return b
}

// appendString appends a string field, or nothing if it is empty, as proto3 does.
func appendString(b []byte, field protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	b = protowire.AppendTag(b, field, lenType)
	return protowire.AppendString(b, utf8Only(s))
}

func sizeString(field protowire.Number, s string) int {
	if s == "" {
		return 0
	}
	return sizeField(field, len(s))
}

func sizeField(field protowire.Number, n int) int {
	return protowire.SizeTag(field) + protowire.SizeBytes(n)
}

func utf8Only(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
