package web

import (
	"sync"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/net/http/httpguts"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// The names that are told of are those that Go's server drops.
func TestLostInTrailers(t *testing.T) {
	for name := range lostInTrailers {
		if httpguts.ValidTrailerHeader(name) {
			t.Errorf("%s is sent", name)
		}
	}
	for _, name := range []string{
		"age", "content-disposition", "date", "etag", "expires", "grpc-message", "grpc-status", "grpc-status-details-bin", "last-modified", "location",
		"retry-after", "server", "set-cookie", "vary", "via", "x-any",
		// And those that are not, or hardly by chance.
		"authorization", "content-type", "host", "proxy-authorization", "range", "realm", "www-authenticate",
	} {
		if lostInTrailers[name] == httpguts.ValidTrailerHeader(name) {
			t.Errorf("%s: lost %v, but Go sends it %v", name, lostInTrailers[name], httpguts.ValidTrailerHeader(name))
		}
	}
}

// One line in the life of a process, and none for trailers that pass.
func TestHintAtTrailers(t *testing.T) {
	before := trailerHint
	trailerHint = new(sync.Once) // another test may have had the line already
	defer func() { trailerHint = before }()
	core, logs := observer.New(zap.InfoLevel)
	l := zap.New(core)
	hintAtTrailers(l, []h2.Field{{Name: "grpc-status", Value: "0"}, {Name: "x-y", Value: "z"}})
	if logs.Len() != 0 {
		t.Errorf("logged %v", logs.All())
	}
	for range 3 {
		hintAtTrailers(l, []h2.Field{{Name: "grpc-status", Value: "0"}, {Name: "www-authenticate", Value: "z"}, {Name: "if-x", Value: "z"}})
	}
	if logs.Len() != 1 || logs.All()[0].ContextMap()["name"] != "www-authenticate" {
		t.Errorf("logged %v", logs.All())
	}
}
