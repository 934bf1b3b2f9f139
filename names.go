package grpcproxy

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"

	"github.com/caddygrpc/caddy-grpc-proxy/inbound/web"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
)

// checkHeaders refuses names that no field can have, which would never be sent.
func checkHeaders(h *headers.Handler) error {
	if h == nil {
		return nil
	}
	if err := checkHeaderOps(h.Request); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	if h.Response != nil {
		if err := checkHeaderOps(h.Response.HeaderOps); err != nil {
			return fmt.Errorf("response: %w", err)
		}
	}
	return nil
}

func checkHeaderOps(ops *headers.HeaderOps) error {
	if ops == nil {
		return nil
	}
	names := slices.Concat(slices.Collect(maps.Keys(ops.Add)), slices.Collect(maps.Keys(ops.Set)), slices.Collect(maps.Keys(ops.Replace)), ops.Delete)
	slices.Sort(names) // so that it is always the same one that is named
	for _, name := range names {
		if hasPlaceholder(name) { // it is known with each call only
			continue
		}
		if err := checkName(name); err != nil {
			return err
		}
	}
	return nil
}

// checkName refuses what is not the name of a field. The * of patterns is a letter like others.
func checkName(name string) error {
	if !web.ValidName(strings.ToLower(name)) {
		return fmt.Errorf("%q is not the name of a header field; write one such as x-user-id", name)
	}
	return nil
}

// checkOwnMetadata refuses keys of metadata that this proxy makes up, but that are not free.
func checkOwnMetadata(key string) error {
	if err := checkName(key); err != nil {
		return err
	}
	switch canonical := http.CanonicalHeaderKey(key); {
	case canonical == "Grpc-Status", canonical == "Grpc-Message", canonical == "Content-Type":
		return fmt.Errorf("%q follows from the code and the message, and cannot be set; remove it", key)
	case proxy.HopByHop(strings.ToLower(key)):
		return fmt.Errorf("%q belongs to the connection, and cannot be set; remove it", key)
	}
	return nil
}
