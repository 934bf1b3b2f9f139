// Package grpcwire holds the facts of gRPC over HTTP/2: content types, status codes and their maps, timeouts, the
// coding of messages and metadata, message framing and status details. It depends on the standard library and on
// protowire only.
//
// Sources, quoted where a rule is implemented: grpc/grpc doc/PROTOCOL-HTTP2.md (the protocol), doc/statuscodes.md,
// doc/http-grpc-status-mapping.md, doc/PROTOCOL-WEB.md, and grpc-go v1.83 where these are silent.
//
// Nothing in the package keeps state but [Framing], and every function may be called concurrently. What comes from
// the wire is never trusted: a parser either says what is wrong or, where the protocol demands a value whatever was
// sent, gives the documented one.
package grpcwire

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// Code is a gRPC status code (grpc/grpc doc/statuscodes.md). Codes above 16 are not assigned, but a peer may send
// one; they are carried as they are.
type Code uint32

// The assigned status codes.
const (
	OK                 Code = 0
	Canceled           Code = 1
	Unknown            Code = 2
	InvalidArgument    Code = 3
	DeadlineExceeded   Code = 4
	NotFound           Code = 5
	AlreadyExists      Code = 6
	PermissionDenied   Code = 7
	ResourceExhausted  Code = 8
	FailedPrecondition Code = 9
	Aborted            Code = 10
	OutOfRange         Code = 11
	Unimplemented      Code = 12
	Internal           Code = 13
	Unavailable        Code = 14
	DataLoss           Code = 15
	Unauthenticated    Code = 16
)

// codeNames are the names of doc/statuscodes.md, by number.
var codeNames = [...]string{
	OK:                 "OK",
	Canceled:           "CANCELLED",
	Unknown:            "UNKNOWN",
	InvalidArgument:    "INVALID_ARGUMENT",
	DeadlineExceeded:   "DEADLINE_EXCEEDED",
	NotFound:           "NOT_FOUND",
	AlreadyExists:      "ALREADY_EXISTS",
	PermissionDenied:   "PERMISSION_DENIED",
	ResourceExhausted:  "RESOURCE_EXHAUSTED",
	FailedPrecondition: "FAILED_PRECONDITION",
	Aborted:            "ABORTED",
	OutOfRange:         "OUT_OF_RANGE",
	Unimplemented:      "UNIMPLEMENTED",
	Internal:           "INTERNAL",
	Unavailable:        "UNAVAILABLE",
	DataLoss:           "DATA_LOSS",
	Unauthenticated:    "UNAUTHENTICATED",
}

// String returns the code's name as doc/statuscodes.md writes it (OK, CANCELLED, DEADLINE_EXCEEDED, …), or CODE(99)
// for a number that is not assigned.
func (c Code) String() string {
	if int64(c) < int64(len(codeNames)) {
		return codeNames[c]
	}
	return "CODE(" + strconv.FormatUint(uint64(c), 10) + ")"
}

// ParseCode reads a code as people write it in a configuration: a number from 0 to 16, the name in snake case
// (DEADLINE_EXCEEDED) or in camel case (DeadlineExceeded), in any mixture of upper and lower case. CANCELLED, the
// name in the specification, and Canceled, the one in most libraries, are the same. The error lists what to write.
//
// It is not for the grpc-status field; see [ParseStatus].
func ParseCode(s string) (Code, error) {
	if n, err := strconv.ParseUint(s, 10, 32); err == nil && n < uint64(len(codeNames)) {
		return Code(n), nil
	}
	for c, name := range codeNames {
		if strings.EqualFold(s, name) || strings.EqualFold(s, strings.ReplaceAll(name, "_", "")) {
			return Code(c), nil
		}
	}
	if strings.EqualFold(s, "CANCELED") {
		return Canceled, nil
	}
	return 0, fmt.Errorf("%q is not a gRPC status code; write a number from 0 to %d or one of %s",
		s, len(codeNames)-1, strings.Join(codeNames[:], ", "))
}

// CodeText is a code in a configuration, as [ParseCode] reads it. In JSON it is a text or a number: "UNAVAILABLE", "14", 14.
type CodeText string

// UnmarshalJSON implements [json.Unmarshaler]. What the text says is left to [ParseCode], which may find placeholders
// replaced.
func (c *CodeText) UnmarshalJSON(raw []byte) error {
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		return err
	}
	switch v := v.(type) {
	case nil: // by convention, nothing happens
	case string:
		*c = CodeText(v)
	case float64:
		*c = CodeText(raw)
	default:
		_, err := ParseCode(string(raw))
		return err
	}
	return nil
}
