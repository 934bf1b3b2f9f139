package grpcproxy

import (
	"net/http"
)

// headerMetadata is request metadata kept in an http.Header.
type headerMetadata http.Header

// Values returns all values of the key.
func (m headerMetadata) Values(key string) []string { return http.Header(m).Values(key) }
