package grpcwire

import (
	"errors"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// The service that servers are asked about their health by (grpc/health/v1/health.proto).
const (
	HealthService = "grpc.health.v1.Health"
	HealthCheck   = "Check"
	HealthList    = "List"
	HealthWatch   = "Watch"
)

// ServingStatus is grpc.health.v1.HealthCheckResponse.ServingStatus.
type ServingStatus uint8

// The values of the enum.
const (
	ServingStatusUnknown ServingStatus = iota
	Serving
	NotServing
	ServiceUnknown // Only a Watch says that; a Check fails with NOT_FOUND.
)

// Field numbers of HealthCheckRequest, HealthCheckResponse and HealthListResponse.
const (
	healthRequestService = 1
	healthResponseStatus = 1
	healthListStatuses   = 1
)

// errHealthRequest is the error for bytes that are no HealthCheckRequest.
var errHealthRequest = errors.New("not a grpc.health.v1.HealthCheckRequest")

// ParseHealthRequest reads a grpc.health.v1.HealthCheckRequest. An empty service stands for the server as a whole.
func ParseHealthRequest(b []byte) (service string, err error) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 || num > protowire.MaxValidNumber {
			return "", errHealthRequest
		}
		b = b[n:]
		if num == healthRequestService && typ == protowire.BytesType {
			service, n = protowire.ConsumeString(b)
			if n < 0 || !utf8.ValidString(service) { // "A string must always contain UTF-8 encoded […] text" (proto3)
				return "", errHealthRequest
			}
		} else if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return "", errHealthRequest
		}
		b = b[n:]
	}
	return service, nil
}

// AppendHealthResponse appends a grpc.health.v1.HealthCheckResponse.
func AppendHealthResponse(b []byte, s ServingStatus) []byte {
	if s == ServingStatusUnknown {
		return b // proto3 leaves zeros out
	}
	b = protowire.AppendTag(b, healthResponseStatus, protowire.VarintType)
	return protowire.AppendVarint(b, uint64(s))
}

// AppendHealthListEntry appends one entry of the map in a grpc.health.v1.HealthListResponse.
func AppendHealthListEntry(b []byte, service string, s ServingStatus) []byte {
	var entry []byte
	entry = appendString(entry, entryKey, service)
	entry = protowire.AppendTag(entry, entryValue, protowire.BytesType)
	entry = protowire.AppendBytes(entry, AppendHealthResponse(nil, s))
	b = protowire.AppendTag(b, healthListStatuses, protowire.BytesType)
	return protowire.AppendBytes(b, entry)
}
