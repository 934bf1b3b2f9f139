// Package discovery finds out which endpoints there are: by DNS, from files, over HTTP, from any upstream source of
// reverse_proxy's.
//
// A source is a Caddy module in the namespace http.grpc_proxy.discovery whose type implements [Source]. The name after
// the namespace is the word after dynamic in the Caddyfile and the value of "source" in JSON. Modules of others are
// welcome.
package discovery

import (
	"context"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// namespace is where the modules of this package are registered.
const namespace = "http.grpc_proxy.discovery."

// Source is a configured source of endpoints.
type Source interface {
	// Watch hands lists of endpoints to the sink as they change, the first as soon as it is known, until ctx is done. It
	// starts no goroutine that outlives it. It is called at most once for a source, in a goroutine of its own.
	Watch(ctx context.Context, sink Sink)
}

// Refresher is a Source that can look again before it would by itself, since a connection to one of its endpoints was
// lost, which may have moved.
type Refresher interface {
	Source
	// Refresh asks for that. It does not block; how often it is heeded is the source's to decide.
	Refresh()
}

// Sink takes what a source finds. Both methods may block for a moment, and do not keep the slice.
type Sink interface {
	// Update takes the whole list of endpoints. Index and State are not set. An empty list means that there are none
	// now; whether the last ones are kept all the same is the sink's to decide.
	Update(endpoints []upstream.Endpoint)
	// Fail tells that the source could not find out. The last list stays in force.
	Fail(err error)
}
